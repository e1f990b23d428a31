"""The home and the database of an experiment, made of a checkpoint of the Hub; what is the original's stays its own.

In the copy every living machine has ended (before the experiment began, so that its figures do not count them), what
was under way has failed, and vmids, keys, open reservations, events and checkpoints of the Hub are gone. Projects,
ended machines and their checkpoints stay: they are what the experiment starts from. Its budgets are its share of the
original's.
"""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session, col, delete, or_, select, update

from autovibe.domain import (
    Account,
    Allotment,
    ApiKey,
    ApiTraffic,
    Event,
    Experiment,
    HubCheckpoint,
    HubKey,
    HubState,
    IdempotencyKey,
    Machine,
    Operation,
    Project,
    Reservation,
)
from autovibe.domain.actor import new_key
from autovibe.domain.budget import LIFE, day_of
from autovibe.domain.columns import now
from autovibe.domain.hub_instance import EXPERIMENT, HUB_UUID
from autovibe.errors import ConfigurationError, Conflict, OperationFailed
from autovibe.hub import Hub
from autovibe.store import Store, bundles, copies
from autovibe.types import MachineStatus, OperationStatus
from autovibe.workflows import hub_checkpoint


def is_built(row: Experiment) -> bool:
    return (Path(row.path) / "config.toml").exists()  # written last


def build(hub: Hub, row: Experiment, base: HubCheckpoint) -> None:
    """Make the home anew. Raises OperationFailed for a checkpoint that was changed, ConfigurationError where
    PostgreSQL does not let the Hub make a database.
    """
    home, bundle = Path(row.path), Path(base.path)
    bundles.verify(bundle)
    shutil.rmtree(home, ignore_errors=True)
    (home / "hub").mkdir(mode=0o700, parents=True)
    for name in ("node/token", "node/fingerprint"):
        if (hub.home / name).exists():
            _write(home / name, (hub.home / name).read_text(encoding="utf-8"))
    _write(home / "credentials", new_key() + "\n")
    for name, secret in hub.launch.secrets.items():
        _write(home / name, secret + "\n")
    try:
        store = _database(hub, row, bundle)
        try:
            store.migrate(home / "hub" / "backups")
            with store.transaction() as session:
                isolate(session, row, base)
        finally:
            store.close()
    except (sqlite3.Error, SQLAlchemyError) as error:
        raise OperationFailed(f"The database of the experiment could not be made: {error}.") from error
    _write(home / "config.toml", _config(hub, row))


def database_of(hub: Hub, row: Experiment) -> Store:
    if hub.store.is_sqlite:
        return Store(f"sqlite:///{Path(row.path) / 'hub' / 'autovibe.db'}")
    return Store(_url(hub, row))


def _url(hub: Hub, row: Experiment) -> str:
    name = f"{(hub.store.url.database or 'autovibe')[:46]}_exp_{row.uuid.hex[:8]}"
    return hub.store.url.set(drivername="postgresql", database=name).render_as_string(hide_password=False)


def _database(hub: Hub, row: Experiment, bundle: Path) -> Store:
    store, source = database_of(hub, row), bundle / hub_checkpoint.database_file(hub.store)
    if hub.store.is_sqlite:
        copies.copy_sqlite(source, store.path)
        return store
    drop_database(hub, row)
    _maintain(hub, "CREATE DATABASE {}", str(store.url.database))
    copies.restore_postgres(store, source, Path(row.path) / "hub" / "restore.sql")
    with store.transaction() as session:  # the original's workflows are not the experiment's
        session.connection().execute(text("DROP SCHEMA IF EXISTS autovibe_durable CASCADE"))
    return store


def drop_database(hub: Hub, row: Experiment) -> None:
    """Remove the database of an experiment; on SQLite it goes with its home."""
    if not hub.store.is_sqlite:
        _maintain(hub, "DROP DATABASE IF EXISTS {} WITH (FORCE)", str(Store(_url(hub, row)).url.database))


def _maintain(hub: Hub, statement: str, name: str) -> None:
    url = hub.store.url.set(drivername="postgresql").render_as_string(hide_password=False)
    try:
        with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
            connection.execute(sql.SQL(statement).format(sql.Identifier(name)))
    except psycopg.Error as error:
        raise ConfigurationError(
            f"PostgreSQL does not let the Hub have the database '{name}' for an experiment: {str(error).strip()}. An "
            "administrator allows it with: ALTER ROLE … CREATEDB"
        ) from error


def isolate(session: Session, row: Experiment, base: HubCheckpoint) -> None:
    """Take from the copy what is the original's."""
    for table in (Experiment, HubCheckpoint, Allotment, ApiKey, HubKey, IdempotencyKey, ApiTraffic, Event):
        session.exec(delete(table))
    living = col(Machine.status).not_in([MachineStatus.terminated, MachineStatus.failed])
    ended = {"ended_at": base.created_at, "terminated_at": base.created_at, "updated_at": base.created_at}
    nothing = dict.fromkeys(("resume_status", "reservation_uuid", "metered_at", "blocked", "watched_by"))
    reason = "It belongs to the Hub this experiment was made of."
    session.exec(
        update(Machine)
        .where(living)
        .values(status=MachineStatus.terminated, termination_reason=reason, **ended, **nothing)
    )
    failed = Conflict("It belongs to the Hub this experiment was made of.").to_dict()
    session.exec(
        update(Operation)
        .where(col(Operation.finished_at).is_(None))
        .values(status=OperationStatus.failed, error=failed, finished_at=now())
    )
    session.exec(update(Reservation).values(reserved_micros=0, closed_at=base.created_at))
    today = or_(col(Account.period) == day_of(now()), col(Account.period) == day_of(base.created_at))
    session.exec(delete(Account).where(today, col(Account.period) != LIFE))
    session.exec(update(Account).values(reserved_micros=0))
    for project in session.exec(select(Project)):
        _scale(project, row.budget_share)
        session.add(project)
    for key, value in _state(session, row).items():
        session.merge(HubState(key=key, value=value, updated_at=now()))


def _scale(project: Project, share: float) -> None:
    """Explicit limits; the share of the pool follows from the pool's own."""
    if project.daily_money_micros is not None:
        project.daily_money_micros = int(project.daily_money_micros * share)
    if project.daily_time_hours is not None:
        project.daily_time_hours *= share
    if project.daily_api_calls is not None:
        project.daily_api_calls = int(project.daily_api_calls * share)
    if project.max_concurrent_machines is not None:
        project.max_concurrent_machines = math.ceil(project.max_concurrent_machines * share)


def _state(session: Session, row: Experiment) -> dict[str, dict[str, Any]]:
    original = session.get(HubState, HUB_UUID)
    return {
        HUB_UUID: {"uuid": str(row.hub_uuid)},
        EXPERIMENT: {
            "uuid": str(row.uuid),
            "name": row.name,
            "original_hub_uuid": original.value["uuid"] if original is not None else None,
            "checkpoint_uuid": str(row.checkpoint_uuid),
            "configuration": row.configuration,
            "budget_share": row.budget_share,
            "ends_at": row.ends_at.isoformat(),
        },
    }


def _config(hub: Hub, row: Experiment) -> str:
    """Its config.toml: the original's settings, its own place, its share, and what the experiment changes."""
    share = {name: value * row.budget_share for name, value in hub.launch.pool.items() if value is not None}
    share = {name: int(value) if name == "pool_daily_api_calls" else value for name, value in share.items()}
    values: dict[str, Any] = {
        **hub.launch.settings,
        **{f"{name.replace('-', '_')}_file": str(Path(row.path) / name) for name in hub.launch.secrets},
        **share,
        "hub_host": "127.0.0.1",
        "hub_port": row.port,
        "vmid_first": row.vmid_first,
        "vmid_last": row.vmid_last,
        "hub_checkpoint_daily": False,
        "database_url": "" if hub.store.is_sqlite else _url(hub, row),
        **row.configuration.get("settings", {}),
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in sorted(values.items()) if value is not None]
    return f"# The experiment '{row.name}' of another Hub.\n" + "\n".join(lines) + "\n"


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    copies.create_privately(draft)
    draft.write_text(content, encoding="utf-8")
    draft.replace(path)
