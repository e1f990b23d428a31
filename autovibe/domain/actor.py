"""Who acts: API keys, and the hub processes that may log into guests."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime

from sqlmodel import Field, SQLModel

from autovibe.domain.columns import UtcDateTime, now


@dataclass(frozen=True)
class Actor:
    """Who a request comes from; `name` is what logs, rows and idempotency keys carry."""

    name: str


class ApiKey(SQLModel, table=True):
    """A key's public id and the SHA-256 of its secret: 256 random bits need no slow hash."""

    __tablename__ = "api_key"

    id: str = Field(primary_key=True, max_length=16)
    name: str = Field(max_length=63)
    secret_hash: str = Field(max_length=64)
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)

    def matches(self, secret: str) -> bool:
        return hmac.compare_digest(self.secret_hash, hash_secret(secret))


def new_key() -> str:
    """A fresh key: `av_<id8>_<43 characters>`."""
    return f"av_{secrets.token_hex(4)}_{secrets.token_urlsafe(32)}"


def split_key(key: str) -> tuple[str, str] | None:
    """The id and the secret of a key, or None where it is no key."""
    parts = key.split("_", 2)
    return (parts[1], parts[2]) if len(parts) == 3 and parts[0] == "av" and parts[1] and parts[2] else None


def hash_secret(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class HubKey(SQLModel, table=True):
    """The SSH public key of a hub home. A spawn authorises all of them, so that any hub can go on with the machine."""

    __tablename__ = "hub_key"

    public_key: str = Field(primary_key=True, max_length=400)
    hub: str = Field(max_length=100)
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
