"""API keys as rows: made, compared, revoked, within the caller's transaction.

Of a secret only HMAC-SHA256 under the *server key* is kept. Where the server key lies:

- SQLite: the file `keys.secret` beside the database, mode 0600. A copy of the database alone then does not allow to
  guess a key somebody made up, and who can only write to it cannot put in a row that opens the Hub.
- PostgreSQL: the row of `server_key`, made once. Hubs on several computers must agree, and they share nothing but the
  database and its settings; a file that has to be carried to each of them would be a second way for a Hub to be set up
  wrongly. Keys that autovibe makes have 256 random bits, so nothing can be guessed from their hashes either way.

`scheme` of a row names the server key by the start of its hash, so that a hub which has lost it says so instead of
calling keys wrong. Plain SHA-256 hashes of the first release go on working, and are replaced when the key is used.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from datetime import datetime
from pathlib import Path
from uuid import UUID

from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from autovibe.domain import ApiKey, Machine, ServerKey
from autovibe.domain.actor import PLAIN, hash_secret, new_key, split_key
from autovibe.domain.columns import now
from autovibe.errors import ConfigurationError
from autovibe.store import Store
from autovibe.types import Role

FILE = "keys.secret"
_KEY_BYTES = 32


class Keyring:
    """Hashes and compares secrets under one server key."""

    def __init__(self, server_key: bytes) -> None:
        self._server_key = server_key
        self.scheme = f"hmac:{hashlib.sha256(server_key).hexdigest()[:8]}"

    def hash(self, secret: str) -> str:
        return hmac.new(self._server_key, secret.encode(), hashlib.sha256).hexdigest()

    def matches(self, row: ApiKey, secret: str) -> bool:
        """Whether the secret is the row's; takes as long for a wrong one as for the right one."""
        found = hash_secret(secret) if row.scheme == PLAIN else self.hash(secret)
        return hmac.compare_digest(row.secret_hash, found)

    def knows(self, row: ApiKey) -> bool:
        """Whether the row was made under this server key, or without any."""
        return row.scheme in (PLAIN, self.scheme)

    def seal(self, row: ApiKey, secret: str) -> None:
        row.secret_hash, row.scheme = self.hash(secret), self.scheme

    def issue(
        self,
        session: Session,
        *,
        name: str,
        role: Role,
        created_by: str,
        project_uuid: UUID | None = None,
        machine_uuid: UUID | None = None,
        scopes: str = "",
        expires_at: datetime | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key's row, added to the transaction, and its text, which is kept nowhere."""
        key = new_key()
        identifier, secret = split_key(key)
        row = ApiKey(
            id=identifier,
            name=name,
            secret_hash="",
            role=role,
            project_uuid=project_uuid,
            machine_uuid=machine_uuid,
            scopes=scopes,
            created_by=created_by,
            expires_at=expires_at,
        )
        self.seal(row, secret)
        session.add(row)
        return row, key

    def issue_machine_key(self, session: Session, machine: Machine) -> str:
        """The text of a key that is good for this machine alone. An earlier one of the machine is revoked."""
        revoke_machine_keys(session, machine.uuid)
        _, key = self.issue(
            session,
            name=machine.name,
            role=Role.machine,
            created_by="spawn",
            project_uuid=machine.project_uuid,
            machine_uuid=machine.uuid,
        )
        return key


def revoke_machine_keys(session: Session, machine_uuid: UUID) -> None:
    """For the transaction in which the machine ends."""
    statement = select(ApiKey).where(ApiKey.machine_uuid == machine_uuid, col(ApiKey.revoked_at).is_(None))
    for row in session.exec(statement):
        row.revoked_at = now()
        session.add(row)


def open_keyring(store: Store) -> Keyring:
    """The keyring of this database; its server key is made at the first call. Raises ConfigurationError."""
    return Keyring(_key_of_file(store.path.with_name(FILE)) if store.is_sqlite else _key_of_database(store))


def _key_of_file(file: Path) -> bytes:
    if not file.exists():
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as text:
            text.write(secrets.token_hex(_KEY_BYTES) + "\n")
            text.flush()
            os.fsync(text.fileno())
        try:
            os.link(temporary, file)  # unlike a rename it never replaces what another hub process has just made
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    if file.stat().st_mode & 0o077:
        raise ConfigurationError(f"'{file}' holds a secret and may be read by others; run: chmod 600 '{file}'.")
    return _decoded(file.read_text(encoding="ascii", errors="replace").strip(), f"'{file}'")


def _key_of_database(store: Store) -> bytes:
    while True:
        with store.reading() as session:
            row = session.get(ServerKey, 1)
        if row is not None:
            return _decoded(row.key_hex, "The table 'server_key'")
        try:
            with store.transaction() as session:
                session.add(ServerKey(key_hex=secrets.token_hex(_KEY_BYTES)))
        except IntegrityError:
            continue  # another hub was quicker


def _decoded(text: str, place: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise ConfigurationError(f"{place} holds no server key: {2 * _KEY_BYTES} hexadecimal digits are expected.")
    return key
