"""Who may act: API keys, checked without telling how much of a wrong one was right, and the hub's own SSH key."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from pathlib import Path

from sqlalchemy.exc import IntegrityError

from autovibe.domain import ApiKey, HubKey
from autovibe.domain.actor import Actor, hash_secret, new_key, split_key
from autovibe.errors import ConfigurationError, Unauthorized
from autovibe.guest import generate_key
from autovibe.store import Store

logger = logging.getLogger(__name__)

_CACHE_SECONDS = 5.0  # how long a deleted key may go on working
_CACHE_SIZE = 1000
_SHORTEST_KEY = 16


class Keys:
    """Turns the key of a request into its actor; a good key is looked up at most once in five seconds."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, Actor]] = {}  # by the hash of the whole key: no key lies in memory for long

    def cached(self, key: str) -> Actor | None:
        """The actor of a key seen lately. Never touches the database, so it may be called in the event loop."""
        with self._lock:
            found = self._known.get(hash_secret(key))
        return found[1] if found is not None and found[0] > time.monotonic() else None

    def authenticate(self, key: str) -> Actor:
        """The actor a key stands for. Raises Unauthorized."""
        identifier, secret = _parts(key)
        with self._store.reading() as session:
            row = session.get(ApiKey, identifier)
            # An unknown id is compared too, so that the time taken does not tell ids apart.
            known = row if row is not None else ApiKey(id="", name="", secret_hash=hash_secret(""))
            if not known.matches(secret) or row is None:
                raise Unauthorized("The API key is not one of this Hub; send 'Authorization: Bearer <key>'.")
            actor = Actor(name=row.name)
        with self._lock:
            if len(self._known) >= _CACHE_SIZE:
                self._known.clear()
            self._known[hash_secret(key)] = (time.monotonic() + _CACHE_SECONDS, actor)
        return actor


def _parts(key: str) -> tuple[str, str]:
    """The public id and the secret; a key the operator made up has the start of its hash as id."""
    return split_key(key) or (hashlib.sha256(key.encode()).hexdigest()[:16], key)


def ensure_key(store: Store, given: str | None, kept: str | None) -> str:
    """Make the operator's key valid: the one `given` by the settings, else the one `kept` in a file, else a new one.

    Raises ConfigurationError for a key too short to be a secret.
    """
    key = given or kept or new_key()
    if len(key) < _SHORTEST_KEY or not key.isascii() or any(c.isspace() for c in key):
        raise ConfigurationError(
            f"The API key must be at least {_SHORTEST_KEY} printable ASCII characters without spaces; "
            "unset AUTOVIBE_API_KEY to have one made."
        )
    identifier, secret = _parts(key)
    try:
        with store.transaction() as session:
            row = session.get(ApiKey, identifier)
            if row is None:
                session.add(ApiKey(id=identifier, name="operator", secret_hash=hash_secret(secret)))
            elif not row.matches(secret):
                raise ConfigurationError(f"Another API key with the id '{identifier}' exists; choose another key.")
    except IntegrityError:
        logger.info("Another hub has registered the API key '%s' at the same moment.", identifier)
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
