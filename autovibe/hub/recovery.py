"""Putting a checkpoint of the Hub back, while no process of the Hub runs. Without a Hub: a store and a home are enough.

    require_stopped   a lock of a running process, its pid file, or its heartbeat in a shared database
    verify            every SHA-256, the kind of database, a schema this autovibe knows, and no file of another place
    save_present      a recovery checkpoint of what is there now
    put_back          keys and settings, journal, database; each beside its place first, then renamed over it
                      (PostgreSQL: one transaction), brought to this version's schema

What ran when the checkpoint was made is begun again at the next start: its steps find what they did.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import sqlite3
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session, col, select, update

from autovibe import durable
from autovibe.domain import Experiment, HubCheckpoint, Operation
from autovibe.domain.columns import now
from autovibe.errors import AutovibeError, ConfigurationError, Conflict, InvalidRequest, NotFound, OperationFailed
from autovibe.store import Store, bundles, copies, rows, schema
from autovibe.types import ExperimentStatus, HubCheckpointStatus, HubCheckpointType, OperationStatus
from autovibe.workflows import hub_checkpoint
from autovibe.workflows.world import Premises

logger = logging.getLogger(__name__)

_NOT_REPLACED = ("node/",)
"""What belongs to another program that may have moved on: put back only where it is missing."""


def find(premises: Premises, word: str) -> Path:
    """The bundle that `word` names: a directory, or the uuid (a unique beginning) of one of this home's checkpoints.

    Raises NotFound, InvalidRequest for a beginning of several.
    """
    if (given := Path(word).expanduser()).is_dir() and "/" in word:
        return given.absolute()
    matches = [path for path in _sealed(premises) if path.name.startswith(word.lower())]
    if len(matches) > 1:
        raise InvalidRequest(f"'{word}' means {len(matches)} checkpoints of the Hub; give more of the uuid.")
    if not matches:
        raise NotFound(f"There is no checkpoint '{word}' of the Hub in '{premises.checkpoints}'; name its directory.")
    return matches[0]


def _sealed(premises: Premises) -> list[Path]:
    return sorted(path.parent for path in premises.checkpoints.glob(f"*/{bundles.MANIFEST}"))


def require_stopped(premises: Premises, store: Store) -> None:
    """Raises Conflict naming what runs, with the remedy."""
    hub_home = premises.home / "hub"
    remedy = "stop it first: autovibe down (or: systemctl stop autovibe-hub)"
    for slot in sorted((hub_home / "executors").glob("slot-*")):
        with slot.open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Conflict(f"The Hub of '{premises.home}' runs; {remedy}.") from None
    with suppress(OSError, ValueError):
        pid = int((hub_home / "hub.pid").read_text(encoding="ascii"))
        if Path("/proc", str(pid)).exists() and b"autovibe" in Path("/proc", str(pid), "cmdline").read_bytes():
            raise Conflict(f"The Hub of '{premises.home}' runs (pid {pid}); {remedy}.")
    if store.is_sqlite:
        return
    if living := durable.alive_on(store.url.render_as_string(hide_password=False)):
        raise Conflict(f"Processes of the Hub use this database: {', '.join(living)}; stop them first.")


def verify(bundle: Path, store: Store) -> bundles.Manifest:
    """Read all of the bundle. Raises OperationFailed for one that was changed, ConfigurationError for one that cannot
    be put into this database.
    """
    manifest = bundles.verify(bundle)
    facts = manifest.facts
    kind = "sqlite" if store.is_sqlite else "postgresql"
    if facts.get("database") != kind:
        raise ConfigurationError(
            f"The checkpoint is of a {facts.get('database')} database and the settings name a {kind} one; set "
            "'database_url' (or AUTOVIBE_DATABASE_URL) to a database of its kind."
        )
    if not schema.knows(facts.get("schema_revision")):
        raise ConfigurationError(
            f"The checkpoint has schema '{facts.get('schema_revision')}', this autovibe knows schemas up to "
            f"'{schema.head()}'; install autovibe {facts.get('version')} or newer."
        )
    _require_whole(bundle, manifest, hub_checkpoint.database_file(store))
    if not store.is_sqlite:
        for program in ("pg_restore", "psql"):
            copies.find_program(store, program)
    return manifest


def _require_whole(bundle: Path, manifest: bundles.Manifest, database: str) -> None:
    """Raises OperationFailed where the database is missing, or where a file would be put where the Hub keeps none."""
    foreign = sorted(
        name
        for name in manifest.files
        if name.startswith(f"{hub_checkpoint.HOME}/") and not _is_of_a_home(name.partition("/")[2])
    )
    if foreign:
        raise OperationFailed(f"The checkpoint in '{bundle}' holds '{foreign[0]}', which no checkpoint of a Hub does.")
    if database not in manifest.files:
        raise OperationFailed(f"The checkpoint in '{bundle}' holds no '{database}'.")


def _is_of_a_home(name: str) -> bool:
    depth = name.count("/")
    return any(
        depth == pattern.count("/") and PurePosixPath(name).match(pattern) for pattern in hub_checkpoint.HOME_FILES
    )


def save_present(premises: Premises, store: Store, reason: str) -> Path | None:
    """A recovery checkpoint of what is there now; None where there is nothing.

    Raises OperationFailed with the way around it, for a damaged database is a reason to restore; InsufficientSpace.
    """
    if store.is_sqlite and not store.path.exists():
        return None
    row = HubCheckpoint(uuid=uuid4(), type=HubCheckpointType.recovery, reason=reason, created_at=now())
    try:
        if schema.revision_of(store) is None:
            return None
        hub_checkpoint.write(store, premises, row)
    except (SQLAlchemyError, OperationFailed) as error:
        words = str(getattr(error, "orig", None) or error).rstrip(".")
        raise OperationFailed(
            f"What is there now cannot be checkpointed: {words}. To lose it, add --without-recovery."
        ) from error
    return premises.place(row.uuid)


def put_back(bundle: Path, manifest: bundles.Manifest, premises: Premises, store: Store, place: str) -> None:
    """Make home and database what the bundle holds. `place` names this home in the rows."""
    _put_files(bundle, manifest, premises)
    if premises.journal is not None:
        _put_sqlite(bundle / hub_checkpoint.JOURNAL, premises.journal)
    source = bundle / hub_checkpoint.database_file(store)
    backups = premises.home / "hub" / "backups"
    if store.is_sqlite:
        store.close()
        _put_sqlite(source, store.path, lambda draft: _finish(Store(f"sqlite:///{draft}"), backups, premises, place))
    else:
        copies.restore_postgres(store, source, premises.home / "hub" / "restore.sql")
        _finish(store, backups, premises, place)


def _put_files(bundle: Path, manifest: bundles.Manifest, premises: Premises) -> None:
    for name in manifest.files:
        relative = name.removeprefix(f"{hub_checkpoint.HOME}/")
        target = premises.home / relative
        if relative == name or (relative.startswith(_NOT_REPLACED) and target.exists()):
            continue
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = target.with_name(target.name + ".restoring")
        copies.create_privately(draft)
        shutil.copyfile(bundle / name, draft)
        copies.sync(draft)
        os.replace(draft, target)


def _put_sqlite(source: Path, target: Path, finish: Any = None) -> None:
    """Replace a SQLite file; without a source, remove it."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".restoring")
    if source.exists():
        copies.copy_sqlite(source, draft)
        if finish is not None:
            finish(draft)
        _gather(draft)
    if target.exists():
        with suppress(sqlite3.Error):  # a damaged one is replaced all the same
            _gather(target)
    for ending in ("-wal", "-shm"):  # of another database they would be the end of the new one
        target.with_name(target.name + ending).unlink(missing_ok=True)
    if source.exists():
        os.replace(draft, target)
    else:
        target.unlink(missing_ok=True)
    copies.sync(target.parent)


def _gather(path: Path) -> None:
    """Have everything in the one file, without a -wal beside it."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE").close()
    copies.sync(path)


def _finish(store: Store, backups: Path, premises: Premises, place: str) -> None:
    try:
        store.migrate(backups)
        with store.transaction() as session:
            _begin_again(session)
            _know_bundles(session, premises, place)
            _end_experiments(session)
    finally:
        store.close()


def _begin_again(session: Session) -> None:
    """What was under way is accepted anew: its journal may be from a moment before, and its deadlines are long over."""
    under_way = col(Operation.status).in_([OperationStatus.accepted, OperationStatus.running])
    session.exec(update(Operation).where(under_way).values(status=OperationStatus.accepted, step=None))


def _end_experiments(session: Session) -> None:
    """Those that ran when the checkpoint was made may be long over: the next start ends what is left of them."""
    living = col(Experiment.status).in_([ExperimentStatus.planned, ExperimentStatus.running])
    session.exec(
        update(Experiment).where(living).values(is_stop_wanted=True, error_message="The Hub was restored meanwhile.")
    )


def _know_bundles(session: Session, premises: Premises, place: str) -> None:
    """The bundles of this home are what there is: also those made after the one that is put back, and itself."""
    found = _readable(premises)
    for row in session.exec(select(HubCheckpoint)):
        path, manifest = found.pop(str(row.uuid), (None, None))
        if path is not None and manifest is not None:
            _mark_ready(session, row, path, manifest, place)
        elif row.place in (place, "") and row.status == HubCheckpointStatus.ready:
            row.status, row.error_message, row.path = HubCheckpointStatus.failed, "Its files are gone.", ""
            session.add(row)
        elif row.status == HubCheckpointStatus.creating:
            row.status, row.error_message = HubCheckpointStatus.failed, "The Hub was restored before it was made."
            session.add(row)
            _end_operation(session, row, OperationStatus.failed)
    for path, manifest in found.values():
        with suppress(ValueError, KeyError):  # what is no whole bundle is no checkpoint
            facts = manifest.facts
            row = HubCheckpoint(
                uuid=UUID(path.name),
                type=HubCheckpointType(facts["type"]),
                reason=str(facts["reason"]),
                description=str(facts["description"]),
                created_at=datetime.fromisoformat(facts["created_at"]),
            )
            _mark_ready(session, row, path, manifest, place)


def _readable(premises: Premises) -> dict[str, tuple[Path, bundles.Manifest]]:
    """The bundles of this home by name. One that is damaged is left out: it stands in nobody's way."""
    found = {}
    for path in _sealed(premises):
        try:
            found[path.name] = (path, bundles.look(path))
        except (AutovibeError, OSError) as error:
            logger.warning("The checkpoint in '%s' cannot be read: %s", path, error)
    return found


def _mark_ready(session: Session, row: HubCheckpoint, path: Path, manifest: bundles.Manifest, place: str) -> None:
    row.status, row.place, row.path, row.error_message = HubCheckpointStatus.ready, place, str(path), None
    row.size_bytes, row.file_count = manifest.size_bytes, len(manifest.files)
    row.version, row.schema_revision = (str(manifest.facts.get(name, "")) for name in ("version", "schema_revision"))
    row.completed_at = row.completed_at or row.created_at
    session.add(row)
    _end_operation(session, row, OperationStatus.succeeded)


def _end_operation(session: Session, row: HubCheckpoint, status: OperationStatus) -> None:
    operation = session.get(Operation, row.operation_uuid) if row.operation_uuid is not None else None
    if operation is None or OperationStatus(operation.status).is_final:
        return
    operation.status, operation.finished_at, operation.progress = status, now(), ""
    if status == OperationStatus.failed:
        operation.error = OperationFailed("The Hub was restored before it was made.").to_dict()
    session.add(operation)
    rows.record(session, "operation.status", operation.uuid, status=str(status))
