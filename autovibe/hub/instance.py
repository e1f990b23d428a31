"""The Hub as a whole: its uuid, and how it does."""

from __future__ import annotations

import logging
import threading
import time
from uuid import UUID, uuid4

import psutil
from sqlalchemy.exc import IntegrityError
from sqlmodel import col, func, select

from autovibe import schemas
from autovibe.domain import HubCheckpoint, HubState, Machine, Project
from autovibe.domain.columns import now
from autovibe.domain.hub_instance import EXPERIMENT, HUB_UUID
from autovibe.hub import Hub
from autovibe.hub.health import Watchtower, check
from autovibe.hypervisor.read import NodeStatus
from autovibe.store import Store
from autovibe.types import HubCheckpointStatus, MachineStatus, ProjectStatus
from autovibe.version import __version__

logger = logging.getLogger(__name__)

_MEASURED_SECONDS = 1.0  # a share of processor time over less says nothing


def ensure_uuid(store: Store) -> UUID:
    """The uuid of the Hub whose database this is, made at the first start."""
    try:
        with store.transaction() as session:
            state = session.get(HubState, HUB_UUID)
            if state is None:
                state = HubState(key=HUB_UUID, value={"uuid": str(uuid4())})
                session.add(state)
            return UUID(state.value["uuid"])
    except IntegrityError:
        logger.info("Another process of this Hub has named it at the same moment.")
        with store.reading() as session:
            return UUID(session.get_one(HubState, HUB_UUID).value["uuid"])


class Gauge:
    """Processor, memory and disk of this computer, in percent; asked often it repeats its last answer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times = psutil.cpu_times()
        self._measured_at = time.monotonic()
        self._cpu_percent: float | None = None

    def read(self, hub: Hub) -> schemas.Utilization:
        return schemas.Utilization(
            cpu_percent=self._cpu(),
            memory_percent=round(psutil.virtual_memory().percent, 1),
            disk_percent=round(psutil.disk_usage(str(hub.home)).percent, 1),
        )

    def _cpu(self) -> float:
        with self._lock:
            if self._cpu_percent is None or time.monotonic() - self._measured_at > _MEASURED_SECONDS:
                before, self._times = self._times, psutil.cpu_times()
                self._measured_at = time.monotonic()
                passed = sum(self._times[:8]) - sum(before[:8])  # guest time is part of user time
                idle = self._times.idle + self._times.iowait - before.idle - before.iowait
                self._cpu_percent = round(min(max(100 * (1 - idle / passed), 0.0), 100.0), 1) if passed > 0 else 0.0
            return self._cpu_percent


def status(hub: Hub, gauge: Gauge, watchtower: Watchtower, api: schemas.ServiceHealth) -> schemas.HubStatus:
    """How the Hub does, all its processes together where they can be. Raises DatabaseUnavailable."""
    health = check(hub, watchtower, api)
    with hub.store.reading() as session:
        living = col(Machine.status).not_in([MachineStatus.terminated, MachineStatus.failed])
        machines = session.exec(select(func.count()).select_from(Machine).where(living)).one()
        active = Project.status == ProjectStatus.active
        projects = session.exec(select(func.count()).select_from(Project).where(active)).one()
        ready = select(HubCheckpoint).where(HubCheckpoint.status == HubCheckpointStatus.ready)
        last = session.exec(ready.order_by(col(HubCheckpoint.created_at).desc()).limit(1)).first()
        lately = hub.tally.lately(session)
        experiment = session.get(HubState, EXPERIMENT)
    return schemas.HubStatus(
        uuid=hub.uuid,
        status=health.status,
        uptime_hours=round((now() - hub.started_at).total_seconds() / 3600, 6),
        version=__version__,
        last_checkpoint_uuid=last.uuid if last is not None else None,
        last_checkpoint_at=last.created_at if last is not None else None,
        active_machine_count=machines,
        active_project_count=projects,
        resource_utilization=gauge.read(hub),
        node_utilization=_of_node(watchtower.node),
        api_statistics=schemas.ApiStatistics(
            requests_per_hour=lately.requests,
            average_response_ms=round(lately.total_milliseconds / lately.timed, 2) if lately.timed else None,
            error_rate_percent=round(100 * lately.failures / lately.requests, 3) if lately.requests else 0.0,
        ),
        processes=[
            schemas.HubProcess(name=name, seen_seconds_ago=round(max(age, 0.0), 1))
            for name, age in hub.workflows.alive().items()
        ],
        experiment=experiment.value if experiment is not None else None,
        timestamp=now(),
    )


def _of_node(node: NodeStatus | None) -> schemas.Utilization | None:
    if node is None:
        return None
    return schemas.Utilization(
        cpu_percent=round(100 * node.cpu, 1),
        memory_percent=_used(node.memory_free, node.memory_total),
        disk_percent=_used(node.disk_free, node.disk_total),
    )


def _used(free: int, total: int) -> float:
    return round(100 * (1 - free / total), 1) if total else 0.0
