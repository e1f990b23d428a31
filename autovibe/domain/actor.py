"""Who acts: API keys, and the hub processes that may log into guests.

A key is `av_<id>_<secret>`; the id is public, of the secret only a hash lies in the database:

    usable -> revoked            for good; the row stays, so that the audit log can name it
    usable -> expired            by itself, at `expires_at`
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID, uuid4

from sqlalchemy import Index, text
from sqlmodel import Field, SQLModel

from autovibe.domain.columns import UtcDateTime, now
from autovibe.types import KeyStatus, Role

PLAIN = "sha256"
"""The scheme of a hash without a server key, as the first release wrote it."""


@dataclass(frozen=True)
class Actor:
    """Who a request comes from; `name` is what logs, events and rows show.

    `project_uuid` narrows it to one project's objects, `machine_uuid` to one machine, `scopes` to nouns and verbs.
    """

    name: str
    key_id: str = ""
    role: Role = Role.admin
    project_uuid: UUID | None = None
    machine_uuid: UUID | None = None
    scopes: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """What tells it from every other actor: names may be given twice, ids not."""
        return self.key_id or self.name


class ApiKey(SQLModel, table=True):
    """One key; `scopes` stand in one text with spaces between.

    `scheme` says how `secret_hash` was made: PLAIN, or `hmac:` and which server key (see store.keys).
    """

    __tablename__ = "api_key"
    __table_args__ = (Index("uq_api_key_uuid", "uuid", unique=True),)

    id: str = Field(primary_key=True, max_length=16)
    uuid: UUID = Field(default_factory=uuid4)
    name: str = Field(max_length=63)
    secret_hash: str = Field(max_length=64)
    scheme: str = Field(default=PLAIN, max_length=16, sa_column_kwargs={"server_default": text(f"'{PLAIN}'")})
    role: str = Field(default=Role.admin, max_length=10, sa_column_kwargs={"server_default": text("'admin'")})
    project_uuid: UUID | None = Field(default=None, index=True)
    machine_uuid: UUID | None = Field(default=None, index=True)
    scopes: str = Field(default="", max_length=1000, sa_column_kwargs={"server_default": text("''")})
    created_by: str = Field(default="", max_length=100, sa_column_kwargs={"server_default": text("''")})
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
    expires_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    last_used_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    revoked_at: datetime | None = Field(default=None, sa_type=UtcDateTime)

    @property
    def status(self) -> KeyStatus:
        if self.revoked_at is not None:
            return KeyStatus.revoked
        is_over = self.expires_at is not None and self.expires_at <= now()
        return KeyStatus.expired if is_over else KeyStatus.usable

    def to_actor(self) -> Actor:
        return Actor(
            name=self.name,
            key_id=self.id,
            role=Role(self.role),
            project_uuid=self.project_uuid,
            machine_uuid=self.machine_uuid,
            scopes=tuple(self.scopes.split()),
        )


def new_key() -> str:
    """A fresh key: `av_<id8>_<43 characters>`."""
    return f"av_{secrets.token_hex(4)}_{secrets.token_urlsafe(32)}"


def split_key(key: str) -> tuple[str, str]:
    """The public id and the secret; a key the operator made up has the start of its hash as id."""
    parts = key.split("_", 2)
    if len(parts) == 3 and parts[0] == "av" and 0 < len(parts[1]) <= 16 and parts[2]:
        return parts[1], parts[2]
    return hash_secret(key)[:16], key


def hash_secret(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class ServerKey(SQLModel, table=True):
    """What secrets are hashed under where hubs on several computers share a database (see store.keys); one row."""

    __tablename__ = "server_key"

    id: int = Field(default=1, primary_key=True, sa_column_kwargs={"autoincrement": False})
    key_hex: str = Field(max_length=64)
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class HubKey(SQLModel, table=True):
    """The SSH public key of a hub home. A spawn authorises all of them, so that any hub can go on with the machine."""

    __tablename__ = "hub_key"

    public_key: str = Field(primary_key=True, max_length=400)
    hub: str = Field(max_length=100)
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
