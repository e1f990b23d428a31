"""Reconcilers: threads that take no input, look at the rows and do what is due. Recovery is their normal path.

    orders    accepted operations that nobody started (the hub died between commit and start)      every 2 s
    prompts   machines that work: their output is kept, the end of the prompt is recorded          every 0.4 s
    metering  machines whose VM runs: what they use is charged, at a limit they are blocked        when one is due
    brakes    machines near their limit: their guests wait for the word to freeze                  every 2 s
    samples   what the hypervisor says of the VMs, for that                                        every 10 s
    resuming  machines that a daily limit blocked and allows again                                 every 5 s
    adoption  machines that run since before there were budgets                                    every 10 s
    storage   projects whose checkpoints take more than they may                                   every 30 s
    keys      which API keys were used                                                             every 10 s
    pruning   events, idempotency keys, audit lines that are too old to be asked for               every hour
    lab       experiments of this home: started, started again when they died, ended                every 1 s
    itself    the Hub's daily checkpoint, those that are kept no longer, its API's counts          every minute

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

from sqlmodel import col, delete, or_, select, update

from autovibe.domain import ApiKey, AuditEntry, IdempotencyKey, Machine, Operation, RateLease, trace
from autovibe.domain.columns import now
from autovibe.errors import AutovibeError
from autovibe.hub import Hub, adoption, backups, blocking, history, metering, output, storage_limits
from autovibe.hub.laboratory import Laboratory
from autovibe.hub.limits import old_leases
from autovibe.store import rows
from autovibe.types import MachineStatus, OperationStatus

logger = logging.getLogger(__name__)

ORDERS_SECONDS = 2.0
PROMPTS_SECONDS = 0.4
METERING_SECONDS = 0.02  # beside those until the next machine is due
BRAKES_SECONDS = 2.0
SAMPLES_SECONDS = 10.0
RESUMING_SECONDS = 5.0
STORAGE_SECONDS = 30.0
ADOPTION_SECONDS = 10.0
PRUNING_SECONDS = 3600.0
KEYS_SECONDS = 10.0
ITSELF_SECONDS = 60.0
LAB_SECONDS = 1.0
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
        self._samples = metering.Samples()
        self._laboratory = Laboratory(hub)
        self._rests: dict[UUID, tuple[float, float]] = {}  # machine -> (how long, until when by time.monotonic())

    def start(self) -> None:
        self._begin("orders", ORDERS_SECONDS, lambda: start_forgotten(self._hub))
        self._begin("prompts", PROMPTS_SECONDS, self._follow_prompts)
        self._begin("metering", METERING_SECONDS, self._meter)
        self._begin("brakes", BRAKES_SECONDS, lambda: metering.get_ready(self._hub))
        self._begin("samples", SAMPLES_SECONDS, lambda: self._samples.take(self._hub))
        self._begin("resuming", RESUMING_SECONDS, lambda: blocking.resume_allowed(self._hub))
        self._begin("adoption", ADOPTION_SECONDS, lambda: adoption.adopt(self._hub))
        self._begin("storage", STORAGE_SECONDS, lambda: storage_limits.enforce(self._hub))
        self._begin("keys", KEYS_SECONDS, self._hub.keys.settle)
        self._begin("pruning", PRUNING_SECONDS, lambda: prune(self._hub))
        self._begin("traffic", ITSELF_SECONDS, lambda: self._hub.tally.flush(self._hub.store, self._hub.name))
        self._begin("lab", LAB_SECONDS, self._laboratory.look_after)
        self._begin("itself", ITSELF_SECONDS, lambda: look_after_itself(self._hub))

    def close(self) -> None:
        """Stop soon; a pass under way is left to itself, since every pass may break off anywhere."""
        self._closing.set()
        for thread in self._threads:
            thread.join(timeout=1)
        self._followers.shutdown(wait=False, cancel_futures=True)
        self._laboratory.close()
        try:
            release(self._hub)
            if self._hub.name:
                self._hub.tally.flush(self._hub.store, self._hub.name)
        except AutovibeError as error:  # the database may be what is gone; the claims then run out by themselves
            logger.warning("The prompts this process followed are free for others later: %s", error)

    def _begin(self, name: str, seconds: float, do: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._repeat, args=(name, seconds, do), name=f"upkeep-{name}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _repeat(self, name: str, seconds: float, do: Callable[[], None]) -> None:
        failures = 0
        trace.actor.set("upkeep")
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

    def _meter(self) -> None:
        self._closing.wait(metering.meter(self._hub, self._samples))

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
        with trace.about(machine_uuid=uuid):
            self._follow_one(uuid)

    def _follow_one(self, uuid: UUID) -> None:
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
        statement = select(Operation.uuid, Operation.kind).where(
            Operation.status == OperationStatus.accepted, Operation.created_at < now() - FORGOTTEN_AFTER
        )
        forgotten = session.exec(statement.order_by(col(Operation.created_at))).all()
    for uuid, kind in forgotten:
        with trace.about(operation=uuid):
            hub.workflows.start_forgotten(uuid, kind)


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


def look_after_itself(hub: Hub) -> None:
    """Make the Hub's checkpoint of the day, and delete those that are kept no longer."""
    backups.create_daily(hub)
    backups.prune(hub)


def prune(hub: Hub) -> None:
    """Delete what nobody can ask for any more."""
    with hub.store.transaction() as session:
        history.forget(session, now() - EVENTS_KEPT)
        session.exec(delete(IdempotencyKey).where(col(IdempotencyKey.created_at) < now() - KEYS_KEPT))
        session.exec(delete(RateLease).where(old_leases()))
        last = now() - timedelta(days=hub.audit_days)
        session.exec(delete(AuditEntry).where(col(AuditEntry.created_at) < last))
        session.exec(delete(ApiKey).where(col(ApiKey.machine_uuid).is_not(None), col(ApiKey.revoked_at) < last))
