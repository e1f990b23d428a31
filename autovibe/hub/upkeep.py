"""Reconcilers: threads that take no input, look at the rows and do what is due. Recovery is their normal path.

    orders    accepted operations that nobody started (the hub died between commit and start)      every 2 s
    prompts   machines that work: their output is kept, the end of the prompt is recorded          every 0.4 s
    pruning   events, idempotency keys that are too old to be asked for                            every hour

Every hub process runs them all. A prompt is followed by one process at a time: it claims the machine for a while by a
compare-and-set, and another process takes over when the claim runs out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from uuid import UUID

from sqlmodel import col, delete, func, or_, select, update

from autovibe.domain import Event, IdempotencyKey, Machine, Operation
from autovibe.domain.columns import now
from autovibe.errors import AutovibeError
from autovibe.hub import Hub, output
from autovibe.store import rows
from autovibe.types import MachineStatus, OperationStatus

logger = logging.getLogger(__name__)

ORDERS_SECONDS = 2.0
PROMPTS_SECONDS = 0.4
PRUNING_SECONDS = 3600.0
FORGOTTEN_AFTER = timedelta(seconds=5)  # an accepted operation that is older was not started by who accepted it
CLAIM = timedelta(seconds=30)
RENEWED_BELOW = timedelta(seconds=15)
EVENTS_KEPT = timedelta(days=7)
KEYS_KEPT = timedelta(hours=24)
_FOLLOWERS = 8  # prompts that are asked at the same moment
_ROUNDS = 16  # pieces of output that are fetched from one guest before another has its turn
_FIRST_REST_SECONDS = 0.4
_QUIET_SECONDS = 2.0  # how long a guest whose prompt writes nothing is left alone, at most
_SILENT_SECONDS = 15.0  # how long one that does not answer


class Upkeep:
    """The reconcilers' threads of one process."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._followers = ThreadPoolExecutor(_FOLLOWERS, thread_name_prefix="prompt")
        self._following: dict[UUID, Future[None]] = {}
        self._rests: dict[UUID, tuple[float, float]] = {}  # machine -> (how long, until when by time.monotonic())

    def start(self) -> None:
        self._begin("orders", ORDERS_SECONDS, lambda: start_forgotten(self._hub))
        self._begin("prompts", PROMPTS_SECONDS, self._follow_prompts)
        self._begin("pruning", PRUNING_SECONDS, lambda: prune(self._hub))

    def close(self) -> None:
        """Stop soon; a pass under way is left to itself, since every pass may break off anywhere."""
        self._closing.set()
        for thread in self._threads:
            thread.join(timeout=1)
        self._followers.shutdown(wait=False, cancel_futures=True)
        try:
            release(self._hub)
        except AutovibeError as error:  # the database may be what is gone; the claims then run out by themselves
            logger.warning("The prompts this process followed are free for others later: %s", error)

    def _begin(self, name: str, seconds: float, do: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._repeat, args=(name, seconds, do), name=f"upkeep-{name}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _repeat(self, name: str, seconds: float, do: Callable[[], None]) -> None:
        failures = 0
        while not self._closing.is_set():
            try:
                do()
                failures = 0
            except Exception as error:
                failures += 1
                is_known = isinstance(error, AutovibeError)
                if failures == 1 or not is_known:
                    logger.warning("Upkeep of %s failed and goes on: %s", name, error, exc_info=not is_known)
            self._closing.wait(min(seconds * 2 ** min(failures, 6), max(seconds, 30.0)))

    def _follow_prompts(self) -> None:
        """Have each working machine that is free for it followed for a moment, a few at a time."""
        self._following = {uuid: future for uuid, future in self._following.items() if not future.done()}
        found = working(self._hub)
        for uuid in set(self._rests) - set(found):
            del self._rests[uuid]
        for uuid in found:
            if uuid not in self._following and time.monotonic() >= self._rests.get(uuid, (0.0, 0.0))[1]:
                self._following[uuid] = self._followers.submit(self._follow, uuid)

    def _follow(self, uuid: UUID) -> None:
        rest = self._rests.get(uuid, (0.0, 0.0))[0]
        try:
            for _ in range(_ROUNDS):
                found = follow(self._hub, uuid)
                if not found.is_behind or self._closing.is_set():
                    break
            # A question costs the guest a few processes: one that is quiet is asked less and less often.
            pause = _FIRST_REST_SECONDS if found.is_news else min(max(rest, _FIRST_REST_SECONDS) * 1.5, _QUIET_SECONDS)
        except Exception as error:
            is_known = isinstance(error, AutovibeError)
            pause = min(2 * max(rest, _FIRST_REST_SECONDS), _SILENT_SECONDS)
            if rest <= _QUIET_SECONDS or not is_known:
                logger.warning("The prompt of %s cannot be followed now: %s", uuid, error, exc_info=not is_known)
        self._rests[uuid] = (pause, time.monotonic() + pause)


def start_forgotten(hub: Hub) -> None:
    """Start what was accepted and not started: its hub died then, or its engine was away. Harmless if it was."""
    with hub.store.reading() as session:
        statement = select(Operation).where(
            Operation.status == OperationStatus.accepted, Operation.created_at < now() - FORGOTTEN_AFTER
        )
        forgotten = [(row.uuid, row.kind) for row in session.exec(statement.order_by(col(Operation.created_at)))]
    for uuid, kind in forgotten:
        hub.workflows.start(uuid, kind)


def working(hub: Hub) -> list[UUID]:
    """The working machines this process follows or may claim."""
    with hub.store.reading() as session:
        statement = select(Machine.uuid).where(
            Machine.status == MachineStatus.working,
            or_(
                col(Machine.watched_by).is_(None),
                Machine.watched_by == hub.name,
                col(Machine.watched_until).is_(None),
                col(Machine.watched_until) < now(),
            ),
        )
        return list(session.exec(statement))


def follow(hub: Hub, uuid: UUID) -> output.Found:
    """Claim the machine, ask its guest once for what the prompt wrote and whether it runs, and keep that.

    Raises GuestUnreachable, GuestCommandFailed.
    """
    with hub.store.reading() as session:
        machine = session.get(Machine, uuid)
    if machine is None or machine.status != MachineStatus.working or not _claim(hub, machine):
        return output.NOTHING
    return output.collect(hub, machine)


def _claim(hub: Hub, machine: Machine) -> bool:
    """Whether the machine is ours to follow; writes only when the claim is new or nearly over."""
    moment = now()
    if machine.watched_by == hub.name and machine.watched_until and machine.watched_until - moment > RENEWED_BELOW:
        return True
    with hub.store.transaction() as session:
        return rows.compare_and_set(
            session,
            Machine,
            machine.uuid,
            expect={"watched_by": machine.watched_by, "watched_until": machine.watched_until},
            change={"watched_by": hub.name, "watched_until": moment + CLAIM},
        )


def release(hub: Hub) -> None:
    """Leave the prompts this process followed to the others."""
    if not hub.name:
        return
    with hub.store.transaction() as session:
        session.exec(update(Machine).where(col(Machine.watched_by) == hub.name).values(watched_until=now()))


def prune(hub: Hub) -> None:
    """Delete what nobody can ask for any more. The newest event stays: SQLite would use its id again."""
    with hub.store.transaction() as session:
        newest = session.exec(select(func.max(Event.id))).one() or 0
        session.exec(delete(Event).where(col(Event.created_at) < now() - EVENTS_KEPT, col(Event.id) < newest))
        session.exec(delete(IdempotencyKey).where(col(IdempotencyKey.created_at) < now() - KEYS_KEPT))
