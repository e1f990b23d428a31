"""Whether the hub can do its work: its own threads, its database, its Proxmox, its API. Names nobody and nothing."""

from __future__ import annotations

import logging
import threading
import time
from typing import Literal

from sqlmodel import col, func, select

from autovibe import schemas
from autovibe.domain import Checkpoint, Machine
from autovibe.domain.columns import now
from autovibe.errors import AutovibeError, HypervisorUnavailable
from autovibe.hub import Hub
from autovibe.hypervisor import read
from autovibe.types import CheckpointStatus, MachineStatus
from autovibe.version import __version__

logger = logging.getLogger(__name__)

_KEEP_SECONDS = 3.0  # how long an answer of Proxmox is passed on without asking again
_PATIENCE_SECONDS = 4.0  # how long a health request waits for Proxmox when nothing is known of it
_GLANCE_SECONDS = 0.2  # how long when something is
_STALE_SECONDS = 30.0  # the tailer passes every second; without a pass for this long it hangs

Verdict = Literal["healthy", "degraded", "unhealthy"]


class Watchtower:
    """Asks Proxmox once at a time and every few seconds, so that health requests never queue behind a dead node."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fresh = threading.Event()
        self._is_asking = False
        self._asked_at = float("-inf")
        self._answer = schemas.ServiceHealth(status="degraded", message="Not asked yet.")
        self._utilization: float | None = None
        self.node: read.NodeStatus | None = None  # as the last answer had it

    def look(self, hub: Hub) -> tuple[schemas.ServiceHealth, float | None]:
        """How Proxmox is, and where it says so the utilization of its node in percent: of what is nearest its end."""
        with self._lock:
            if time.monotonic() - self._asked_at < _KEEP_SECONDS:
                return self._answer, self._utilization
            if not self._is_asking:
                self._is_asking = True
                self._fresh.clear()
                threading.Thread(target=self._ask, args=(hub,), name="health", daemon=True).start()
            is_known = time.monotonic() - self._asked_at < _STALE_SECONDS
        # Somebody who asks often hears the answer before this one at once, so a node that hangs holds no threads.
        is_fresh = self._fresh.wait(_GLANCE_SECONDS if is_known else _PATIENCE_SECONDS)
        with self._lock:
            if not is_fresh and not is_known:
                self._asked_at = time.monotonic()
                self._answer = schemas.ServiceHealth(status="unhealthy", message="The Proxmox API does not answer.")
                self._utilization = self.node = None
            return self._answer, self._utilization

    def _ask(self, hub: Hub) -> None:
        answer = schemas.ServiceHealth(status="unhealthy", message="The question to Proxmox broke off.")
        utilization = node = None
        start = time.perf_counter()
        try:
            version = read.version(hub.proxmox)
            latency = round((time.perf_counter() - start) * 1000, 1)
            answer = schemas.ServiceHealth(status="healthy", message=f"Proxmox VE {version}.", latency_ms=latency)
            node = read.node_status(hub.proxmox)
            free = (_share(node.memory_free, node.memory_total), _share(node.disk_free, node.disk_total), 1 - node.cpu)
            utilization = round(100 * (1 - max(min(free), 0.0)), 1)
        except AutovibeError as error:
            logger.info("The health check found Proxmox in trouble: %s %s", error.message, error.log_detail)
            is_silent = isinstance(error, HypervisorUnavailable)
            answer = schemas.ServiceHealth(
                status="unhealthy",
                message=f"The Proxmox API {'does not answer' if is_silent else 'refuses the Hub'}; see the Hub's log.",
            )
        finally:
            with self._lock:
                self._answer, self._utilization, self.node = answer, utilization, node
                self._asked_at = time.monotonic()
                self._is_asking = False
                self._fresh.set()


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def check(hub: Hub, watchtower: Watchtower, api: schemas.ServiceHealth) -> schemas.Health:
    """Never raises. unhealthy: the database is gone and nothing works; degraded: some things do not."""
    services = {"hub": _hub(hub), "api": api}
    active, last = 0, None
    try:
        latency = round(hub.store.check() * 1000, 1)
        with hub.store.reading() as session:
            living = col(Machine.status).not_in([MachineStatus.terminated, MachineStatus.failed])
            active = session.exec(select(func.count()).select_from(Machine).where(living)).one()
            newest = select(Checkpoint.created_at).where(Checkpoint.status == CheckpointStatus.ready)
            last = session.exec(newest.order_by(col(Checkpoint.created_at).desc()).limit(1)).first()
        services["database"] = schemas.ServiceHealth(status="healthy", latency_ms=latency)
    except AutovibeError as error:
        logger.warning("The health check found the database in trouble: %s %s", error.message, error.log_detail)
        services["database"] = schemas.ServiceHealth(status="unhealthy", message=type(error)().message)
    services["proxmox"], utilization = watchtower.look(hub)
    return schemas.Health(
        status=_overall(services),
        version=__version__,
        services=services,
        active_machine_count=active,
        utilization_percent=utilization,
        last_checkpoint_at=last,
        timestamp=now(),
    )


def _hub(hub: Hub) -> schemas.ServiceHealth:
    if hub.events.is_closing:
        return schemas.ServiceHealth(status="degraded", message="The Hub is shutting down.")
    if time.monotonic() - hub.events.is_alive_at > _STALE_SECONDS:
        return schemas.ServiceHealth(
            status="degraded", message="Events are not being read; waiting requests answer late."
        )
    try:
        hub.require_space()
    except AutovibeError:
        return schemas.ServiceHealth(status="degraded", message="The disk is nearly full; nothing new is started.")
    return schemas.ServiceHealth(status="healthy")


def _overall(services: dict[str, schemas.ServiceHealth]) -> Verdict:
    if services["database"].status == "unhealthy":
        return "unhealthy"
    return "healthy" if all(service.status == "healthy" for service in services.values()) else "degraded"
