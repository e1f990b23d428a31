"""Experiments: a second Hub, restored from a checkpoint of this one, with other settings and a share of the budget.

What it may not meet of the original's is taken from its copy (see `experiment_home`): living machines, keys, what is
under way. It has a port, a home, a database and a stretch of vmids of its own; the vmids are allotted to it in the
original's database, so that the original never takes them. `laboratory` starts it and keeps it running. It is never
promoted by itself; when it is over, its machines are terminated and its vmids are free again.
"""

from __future__ import annotations

import json
import logging
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
from sqlmodel import Session, col, select

from autovibe import schemas
from autovibe.domain import Allotment, Experiment, HubState
from autovibe.domain.actor import Actor
from autovibe.domain.columns import now
from autovibe.domain.hub_instance import EXPERIMENT, place_of
from autovibe.errors import Conflict, InvalidRequest, LimitExceeded
from autovibe.hub import Hub, analytics, backups
from autovibe.hub.operations import Accepted, Once, accept
from autovibe.hub.pages import Cut, cut
from autovibe.hub.periods import Window
from autovibe.store import rows
from autovibe.types import ExperimentStatus

logger = logging.getLogger(__name__)

CHANGEABLE = (
    "boot_deadline_seconds",
    "budget_tail_seconds",
    "guest_cores",
    "guest_memory_mb",
    "image",
    "log_level",
    "min_free_gb",
    "price_core_hour",
    "price_disk_gb_hour",
    "price_memory_gb_hour",
    "provision_deadline_seconds",
    "proxmox_storage",
    "workers",
)
"""Settings an experiment may change; the others decide where it is and what it may touch."""

LIVING = (ExperimentStatus.planned, ExperimentStatus.running)
MOST = 3
"""Experiments at a time: each is a Hub of its own."""
VMIDS = 50
FEWEST_VMIDS = 5
_READY_SECONDS = 15.0
_PATIENCE_SECONDS = 3.0  # for an experiment's own figures
_VIEWER = Actor("experiments")


def spawn(hub: Hub, actor: Actor, order: schemas.ExperimentOrder, once: Once | None = None) -> schemas.Experiment:
    """Plan a second Hub; the process that has the checkpoint starts it.

    Raises InvalidRequest for a setting that cannot be changed or a value it cannot have, NotFound and Conflict for the
    checkpoint and a name that is taken, LimitExceeded for too many experiments or vmids, InsufficientSpace.
    """
    _check(hub, order.configuration.settings)
    hub.require_space()
    port = free_port()

    def decide(session: Session, _attempt: int) -> Accepted:
        if session.get(HubState, EXPERIMENT) is not None:
            raise Conflict("This Hub is an experiment itself; ask the one it was made of.")
        base = backups.usable(session, order.checkpoint_uuid)
        if base.place != place_of(hub.name):
            raise Conflict(
                f"Checkpoint '{base.uuid}' of the Hub lies in the home '{base.place}'; ask a Hub process there, or "
                "make one here: autovibe hub checkpoint"
            )
        _require_room(session, order.name)
        stretch = free_stretch(session, hub.vmids)
        row = Experiment(
            name=order.name,
            checkpoint_uuid=base.uuid,
            configuration=order.configuration.model_dump(mode="json"),
            budget_share=order.budget_share,
            place=base.place,
            port=port,
            vmid_first=stretch.start,
            vmid_last=stretch.stop - 1,
            created_at=now(),
            ends_at=now() + timedelta(days=order.duration_days),
        )
        row.path = str(hub.home / "experiments" / str(row.uuid))
        session.add(row)
        session.add_all(Allotment(vmid=vmid, owner_uuid=row.uuid) for vmid in stretch)
        rows.record(session, "experiment.status", row.uuid, status=row.status)
        return Accepted(row.uuid)

    return show(hub, accept(hub, actor, once, "experiment", decide))


def _check(hub: Hub, changes: dict[str, Any]) -> None:
    if unknown := sorted(set(changes) - set(CHANGEABLE)):
        raise InvalidRequest(
            f"An experiment cannot change '{unknown[0]}'; it can change: {', '.join(CHANGEABLE)}.",
            details={"field": "configuration.settings", "settings": list(CHANGEABLE)},
        )
    hub.launch.check(changes)


def _require_room(session: Session, name: str) -> None:
    living = list(session.exec(select(Experiment.name).where(col(Experiment.status).in_(LIVING))))
    if name in living:
        raise Conflict(f"There is already an experiment '{name}'; choose another name.", details={"field": "name"})
    if len(living) >= MOST:
        raise LimitExceeded(f"The Hub has {MOST} experiments already; stop one first: autovibe hub stop-experiment")


def free_stretch(session: Session, vmids: range) -> range:
    """The last free vmids of the range side by side: 50, or fewer where the range is small. Raises LimitExceeded."""
    wanted = min(VMIDS, len(vmids) // 4)
    taken = sorted(session.exec(select(Allotment.vmid).where(col(Allotment.vmid).between(vmids.start, vmids.stop - 1))))
    end = vmids.stop
    for vmid in reversed([vmids.start - 1, *taken]):
        if end - vmid - 1 >= wanted >= FEWEST_VMIDS:
            return range(end - wanted, end)
        end = vmid
    raise LimitExceeded(
        f"There are no {max(wanted, FEWEST_VMIDS)} free vmids side by side from {vmids.start} to {vmids.stop - 1} for "
        "an experiment; widen the range by the settings 'vmid_first' and 'vmid_last'."
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(hub: Hub, uuid: UUID) -> schemas.Experiment:
    """End an experiment before its time; one that is over stays as it is. Raises NotFound."""
    with hub.store.transaction() as session:
        row = rows.get(session, Experiment, uuid)
        if not ExperimentStatus(row.status).is_final and not row.is_stop_wanted:
            row.is_stop_wanted = True
            session.add(row)
            rows.record(session, "experiment.status", uuid, status=row.status)
    return show(hub, uuid)


def show(hub: Hub, uuid: UUID) -> schemas.Experiment:
    """With how efficient it was beside the original over the same time, once it runs. Raises NotFound."""
    with hub.store.reading() as session:
        row = rows.get(session, Experiment, uuid)
    figures = ask_figures(row) if row.status == ExperimentStatus.running else None
    return _wire(row, _compared(hub, row, figures or row.report))


def index(hub: Hub, part: Cut, *, status: ExperimentStatus | None = None) -> schemas.ExperimentPage:
    """Newest first, without the comparison."""
    statement = select(Experiment)
    if status is not None:
        statement = statement.where(Experiment.status == status)
    with hub.store.reading() as session:
        found = cut(session, statement.order_by(col(Experiment.created_at).desc(), col(Experiment.uuid)), part)
        return schemas.ExperimentPage(experiments=[_wire(row, None) for row in found.rows], **found.page())


# What it says of itself


def door(row: Experiment, seconds: float = _PATIENCE_SECONDS) -> httpx2.Client:
    """The API of a running experiment, with its own key."""
    key = (Path(row.path) / "credentials").read_text(encoding="utf-8").strip()
    return httpx2.Client(
        base_url=f"http://127.0.0.1:{row.port}/api/v1",
        headers={"Authorization": f"Bearer {key}"},
        timeout=seconds,
        trust_env=False,
    )


def ask_figures(row: Experiment) -> dict[str, Any] | None:
    """An experiment's efficiency since it started, as it says now; None while it does not answer."""
    if row.started_at is None:
        return None
    try:
        with door(row) as client:
            answer = client.get("/analytics/efficiency", params={"from": row.started_at.isoformat()})
            answer.raise_for_status()
            report = schemas.EfficiencyReport.model_validate_json(answer.content)
    except (httpx2.HTTPError, OSError, ValueError) as error:
        logger.info("Experiment '%s' does not tell its figures now: %s", row.name, error)
        return None
    figures: dict[str, Any] = json.loads(report.overall.model_dump_json())
    return {"overall": figures, "until": report.until.isoformat()}


def _compared(hub: Hub, row: Experiment, figures: dict[str, Any] | None) -> schemas.ExperimentComparison | None:
    if figures is None or row.started_at is None:
        return None
    theirs = schemas.OverallEfficiency.model_validate(figures["overall"])
    until = row.ended_at or now()
    original = analytics.efficiency(hub, _VIEWER, Window(row.started_at, until)).overall
    return schemas.ExperimentComparison(
        since=row.started_at,
        until=until,
        experiment=theirs,
        original=original,
        success_rate_difference=_difference(theirs.success_rate, original.success_rate),
        cost_per_success_ratio=_ratio(theirs.average_cost_per_success, original.average_cost_per_success),
    )


def _difference(theirs: float | None, ours: float | None) -> float | None:
    return None if theirs is None or ours is None else round(theirs - ours, 4)


def _ratio(theirs: schemas.MoneyAmount | None, ours: schemas.MoneyAmount | None) -> float | None:
    return None if theirs is None or ours is None or not ours.micros else round(theirs.micros / ours.micros, 4)


def _wire(row: Experiment, comparison: schemas.ExperimentComparison | None) -> schemas.Experiment:
    return schemas.Experiment(
        uuid=row.uuid,
        hub_uuid=row.hub_uuid,
        name=row.name,
        status=ExperimentStatus(row.status),
        checkpoint_uuid=row.checkpoint_uuid,
        configuration=schemas.ExperimentConfiguration.model_validate(row.configuration),
        budget_share=row.budget_share,
        url=f"http://127.0.0.1:{row.port}",
        path=row.path,
        place=row.place,
        pid=row.pid,
        vmid_first=row.vmid_first,
        vmid_last=row.vmid_last,
        start_count=row.start_count,
        is_stopping=row.is_stop_wanted and not ExperimentStatus(row.status).is_final,
        error_message=row.error_message,
        created_at=row.created_at,
        estimated_ready_at=row.started_at or row.created_at + timedelta(seconds=_READY_SECONDS),
        started_at=row.started_at,
        ends_at=row.ends_at,
        ended_at=row.ended_at,
        comparison=comparison,
    )
