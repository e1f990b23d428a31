"""Who may act: API keys, checked without telling how much of a wrong one was right, and the hub's own SSH key."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy.exc import IntegrityError
from sqlmodel import col, update

from autovibe.domain import ApiKey, HubKey
from autovibe.domain.actor import Actor, hash_secret, split_key
from autovibe.domain.actor import new_key as new_key
from autovibe.domain.columns import now
from autovibe.errors import ConfigurationError, Unauthorized
from autovibe.guest import generate_key
from autovibe.store import Store
from autovibe.store.keys import Keyring
from autovibe.types import KeyStatus, Role

logger = logging.getLogger(__name__)

CACHE_SECONDS = 5.0
"""How long a key may go on working that another hub process has revoked; the one that revokes forgets it at once."""
USED_EVERY = timedelta(minutes=1)
"""How exact `last_used_at` is."""
_CACHE_SIZE = 1000
_SHORTEST_KEY = 16
_NO_KEY = "The API key is not one of this Hub; send 'Authorization: Bearer <key>'."


@dataclass(frozen=True)
class _Known:
    until: float  # by time.monotonic()
    actor: Actor


class Keys:
    """Turns the key of a request into its actor; a good key is looked up at most once in five seconds.

    What a look-up finds out besides (that a key is used, that its hash is of the first release) is written later, by
    `settle`, and so costs no request anything.
    """

    def __init__(self, store: Store, keyring: Keyring) -> None:
        self._store, self._keyring = store, keyring
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}  # by the hash of the whole key: no key lies in memory for long
        self._used: dict[str, datetime] = {}  # id -> when, not yet written
        self._renewed: dict[str, tuple[str, str]] = {}  # id -> its hash, and the one to put in its place
        self._changes = 0

    def cached(self, key: str) -> Actor | None:
        """The actor of a key seen lately. Never touches the database, so it may be called in the event loop."""
        known = self._known.get(hash_secret(key))
        return known.actor if known is not None and known.until > time.monotonic() else None

    def was_good(self, key: str) -> bool:
        """Whether the key opened this hub process before, so that it is no guess."""
        return hash_secret(key) in self._known

    def authenticate(self, key: str) -> Actor:
        """The actor a key stands for. Raises Unauthorized, saying so when the key is revoked or expired."""
        identifier, secret = split_key(key)
        changes = self._changes
        with self._store.reading() as session:
            row = session.get(ApiKey, identifier)
        # An unknown id is compared too, so that the time taken does not tell ids apart.
        known = (
            row if row is not None else ApiKey(id="", name="", secret_hash=hash_secret(""), scheme=self._keyring.scheme)
        )
        if not self._keyring.matches(known, secret) or row is None:
            if row is not None and not self._keyring.knows(row):
                logger.warning("The API key '%s' was made under another server key ('keys.secret').", row.id)
            raise Unauthorized(_NO_KEY)
        if row.status != KeyStatus.usable:
            raise _over(row)
        self._keep(key, row, secret, changes)
        return row.to_actor()

    def _keep(self, key: str, row: ApiKey, secret: str, changes: int) -> None:
        moment = now()
        left = (row.expires_at - moment).total_seconds() if row.expires_at is not None else CACHE_SECONDS
        with self._lock:
            if len(self._known) >= _CACHE_SIZE:
                self._known.clear()
            if changes == self._changes:  # else it was maybe read before it was revoked
                self._known[hash_secret(key)] = _Known(time.monotonic() + min(CACHE_SECONDS, left), row.to_actor())
            if row.last_used_at is None or moment - row.last_used_at > USED_EVERY:
                self._used[row.id] = moment
            if row.scheme != self._keyring.scheme:
                self._renewed[row.id] = (row.secret_hash, self._keyring.hash(secret))

    def forget(self, identifier: str) -> None:
        """Look the key up again at its next use: it was changed."""
        with self._lock:
            self._changes += 1
            self._known = {hashed: known for hashed, known in self._known.items() if known.actor.key_id != identifier}

    def settle(self) -> None:
        """Write down which keys were used, and the hashes under the server key. Raises DatabaseUnavailable."""
        with self._lock:
            used, self._used = self._used, {}
            renewed, self._renewed = self._renewed, {}
        if not used and not renewed:
            return
        with self._store.transaction() as session:
            for identifier, moment in used.items():
                mine = col(ApiKey.id) == identifier
                session.exec(update(ApiKey).where(mine).values(last_used_at=moment))
            for identifier, (old, new) in renewed.items():
                mine = (col(ApiKey.id) == identifier) & (col(ApiKey.secret_hash) == old)
                session.exec(update(ApiKey).where(mine).values(secret_hash=new, scheme=self._keyring.scheme))


def _over(row: ApiKey) -> Unauthorized:
    ended = row.revoked_at or row.expires_at or now()
    return Unauthorized(
        f"The API key '{row.id}' {'was revoked' if row.revoked_at else 'expired'} at "
        f"{ended:%Y-%m-%d %H:%M:%S} UTC; use another one.",
        details={"reason": str(row.status), "key_id": row.id},
    )


def ensure_key(store: Store, keyring: Keyring, given: str | None, kept: str | None) -> str:
    """Make the operator's key valid: the one `given` by the settings, else the one `kept` in a file, else a new one.

    It is an admin key. One that was revoked stays so: remove it (the file `credentials`) and start again to have a new
    one made, which is also the way back in after the last key was lost. Raises ConfigurationError for a key too short
    to be a secret.
    """
    key = given or kept or new_key()
    if len(key) < _SHORTEST_KEY or not key.isascii() or any(c.isspace() for c in key):
        raise ConfigurationError(
            f"The API key must be at least {_SHORTEST_KEY} printable ASCII characters without spaces; "
            "unset AUTOVIBE_API_KEY to have one made."
        )
    identifier, secret = split_key(key)
    try:
        with store.transaction() as session:
            row = session.get(ApiKey, identifier)
            if row is None:
                row = ApiKey(id=identifier, name="operator", secret_hash="", role=Role.admin, created_by="start")
                keyring.seal(row, secret)
                session.add(row)
            elif not keyring.knows(row):  # the server key was lost; who starts the hub owns this key
                keyring.seal(row, secret)
                session.add(row)
            elif not keyring.matches(row, secret):
                raise ConfigurationError(f"Another API key with the id '{identifier}' exists; choose another key.")
    except IntegrityError:
        logger.info("Another hub has registered the API key '%s' at the same moment.", identifier)
        return key
    if row.status != KeyStatus.usable:
        logger.warning(
            "The API key '%s' of this home is %s; remove 'credentials' to have one made.", row.id, row.status
        )
    return key


def ensure_ssh_key(store: Store, key_file: Path, hub: str) -> str:
    """The public line of the hub's SSH key, made at the first start; every spawn authorises the registered ones."""
    public = generate_key(key_file)
    try:
        with store.transaction() as session:
            if session.get(HubKey, public) is None:
                session.add(HubKey(public_key=public, hub=hub))
    except IntegrityError:
        logger.info("Another hub has registered the same SSH key at the same moment.")
    return public
