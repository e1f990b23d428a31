"""Rate limits: how many requests a key may send in a minute, counted once for all hub processes.

A minute is one of the clock (UTC). Each process leases a tenth of a bucket's limit at a time from the database, in one
small transaction, and serves that without asking again; the sum of all leases of a minute never passes the limit. The
price: what one process has leased and does not use is missing to the others until the minute ends, at most a tenth a
process. Buckets: `<key id>`, `<key id>:heavy` (spawn, checkpoint and the Hub's own heavy verbs).

Attempts with a key that is none are counted a client address, by each process for itself: an attempt that was let in
elsewhere is still only one guess, and guesses shall not write to the database.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select

from autovibe.domain import RateLease
from autovibe.errors import RateLimited
from autovibe.store import Store

WINDOW_SECONDS = 60
LEASES_KEPT_MINUTES = 5
_PARTS = 10  # a lease is this part of the limit
_MOST_BUCKETS = 10_000  # in memory; the oldest minute's go first


@dataclass
class Standing:
    """A bucket in one minute as this process knows it: `left` of its leases, `beyond` what nobody had leased then."""

    bucket: str
    limit: int
    minute: int
    left: int = 0
    beyond: int = -1  # unknown

    @property
    def remaining(self) -> int:
        return self.left + (self.beyond if self.beyond >= 0 else self.limit)

    @property
    def resets_at(self) -> int:
        """When the limit is whole again, in seconds since 1970."""
        return (self.minute + 1) * WINDOW_SECONDS


class Limits:
    """The buckets of one process. `per_minute` and `heavy_per_minute` of 0 switch that limit off."""

    def __init__(self, store: Store, per_minute: int, heavy_per_minute: int) -> None:
        self._store = store
        self.per_minute, self.heavy_per_minute = per_minute, heavy_per_minute
        self._lock = threading.Lock()
        self._leasing = threading.Lock()  # one question at a time: who waited for it finds its answer
        self._standings: dict[str, Standing] = {}
        self._failures: dict[str, tuple[int, int]] = {}  # client -> (minute, attempts)

    def take(self, bucket: str, limit: int) -> Standing | None:
        """Count one request if that takes no question to the database; None when it does (then `lease`).

        Raises RateLimited. Never blocks, so it may be called in the event loop.
        """
        with self._lock:
            return self._take(self._standing(bucket, limit))

    def lease(self, bucket: str, limit: int) -> Standing:
        """Count one request, with another lease where the last is used up. Raises RateLimited, DatabaseUnavailable."""
        while True:
            with self._leasing:
                taken = self.take(bucket, limit)
                if taken is not None:
                    return taken
                self._lease(bucket, limit)

    def _standing(self, bucket: str, limit: int) -> Standing:
        minute = int(time.time()) // WINDOW_SECONDS
        found = self._standings.get(bucket)
        if found is None or found.minute != minute or found.limit != limit:
            if len(self._standings) >= _MOST_BUCKETS:
                self._standings = {name: one for name, one in self._standings.items() if one.minute == minute}
            found = self._standings[bucket] = Standing(bucket, limit, minute)
        return found

    @staticmethod
    def _take(standing: Standing) -> Standing | None:
        if standing.left > 0:
            standing.left -= 1
            return standing
        if standing.beyond != 0:
            return None
        raise exceeded(standing)

    def _lease(self, bucket: str, limit: int) -> None:
        """Take as much of this minute's limit as there is, at most a tenth."""
        with self._lock:
            standing = self._standing(bucket, limit)
        wanted = max(1, limit // _PARTS)
        granted, beyond = self._granted(bucket, standing.minute, limit, wanted)
        with self._lock:
            standing.left += granted
            standing.beyond = beyond

    def _granted(self, bucket: str, minute: int, limit: int, wanted: int) -> tuple[int, int]:
        while True:
            try:
                with self._store.transaction() as session:
                    statement = select(RateLease).where(RateLease.bucket == bucket, RateLease.minute == minute)
                    row = session.exec(statement.with_for_update()).first()
                    row = row or RateLease(bucket=bucket, minute=minute, taken=0)
                    granted = max(0, min(wanted, limit - row.taken))
                    row.taken += granted
                    session.add(row)
                    beyond = max(0, limit - row.taken)
            except IntegrityError:
                continue  # another process made the row in the same moment
            return granted, beyond

    def refuse_guessing(self, client: str) -> None:
        """Raises RateLimited when the client has sent too many keys that are none this minute."""
        minute, attempts = self._failures.get(_network(client), (0, 0))
        if self.heavy_per_minute and attempts >= self.heavy_per_minute and minute == int(time.time()) // WINDOW_SECONDS:
            raise exceeded(Standing("", self.heavy_per_minute, minute, 0, 0), "Too many keys that are none")

    def note_failure(self, client: str) -> None:
        minute = int(time.time()) // WINDOW_SECONDS
        with self._lock:
            if len(self._failures) >= _MOST_BUCKETS:
                self._failures = {name: one for name, one in self._failures.items() if one[0] == minute}
            known, attempts = self._failures.get(_network(client), (minute, 0))
            self._failures[_network(client)] = (minute, attempts + 1 if known == minute else 1)


def exceeded(standing: Standing, what: str = "Too many requests with this key") -> RateLimited:
    wait = max(1, standing.resets_at - int(time.time()))
    return RateLimited(
        f"{what}: {standing.limit} a minute are allowed; try again in {wait} s.",
        details={"limit": standing.limit, "retry_after_seconds": wait, "resets_at": standing.resets_at},
    )


def _network(client: str) -> str:
    """The address, of IPv6 its /64: whoever has one address there has them all."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else client


def old_leases() -> Any:
    """The condition for leases nobody asks for any more."""
    return col(RateLease.minute) < int(time.time()) // WINDOW_SECONDS - LEASES_KEPT_MINUTES
