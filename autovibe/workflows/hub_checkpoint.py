"""Hub checkpoint: a copy of the Hub's database, journal, settings and keys, sealed in a directory of this home.

    database.db | database.dump     SQLite's online backup | pg_dump's custom format
    journal.db                      the journal of workflows, where it is not in the database
    settings.json                   the settings that applied, secrets masked
    home/…                          config.toml, credentials, the Hub's keys, the node's token and fingerprint

The journal is copied before the database: what it says is finished is then finished in the database too, and a restore
has what was running begun again, which is harmless. A hub that takes the operation over from one that died does not see
the other's home and makes the copy anew in its own.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
from pathlib import Path
from typing import Any
from uuid import UUID

from autovibe.domain import HubCheckpoint, HubState, Operation
from autovibe.domain.checkpoint import snapshot_name
from autovibe.domain.columns import now
from autovibe.domain.hub_instance import HUB_UUID, place_of
from autovibe.errors import AutovibeError, InsufficientSpace, InternalError, OperationFailed
from autovibe.hypervisor import change, read
from autovibe.store import Store, bundles, copies, rows, schema
from autovibe.types import HubCheckpointKind, HubCheckpointStatus
from autovibe.version import __version__
from autovibe.workflows import vms
from autovibe.workflows.engine import Repeat, Step, Workflow, end_in
from autovibe.workflows.world import Premises, World

_log = logging.getLogger(__name__)

JOURNAL = "journal.db"
SETTINGS = "settings.json"
HOME = "home"
HOME_FILES = ("config.toml", "credentials", "hub/ssh/*", "hub/keys.secret", "node/token", "node/fingerprint")
"""What of the home is copied as it lies; each is private in the bundle."""
_COPY_SECONDS = 6 * 3600.0


def database_file(store: Store) -> str:
    return "database.db" if store.is_sqlite else "database.dump"


# The bundle, also for who has no running hub


def write(store: Store, premises: Premises, row: HubCheckpoint) -> bundles.Manifest:
    """Make and seal the bundle of a checkpoint in this home.

    Raises InsufficientSpace, ConfigurationError when pg_dump is missing or too old, OperationFailed when it fails.
    """
    require_space(store, premises)
    try:
        return _write(store, premises, row)
    except (OSError, sqlite3.Error) as error:
        drop_partials(premises, row.uuid)
        raise OperationFailed(f"The checkpoint of the Hub could not be written: {error}.") from error


def _write(store: Store, premises: Premises, row: HubCheckpoint) -> bundles.Manifest:
    partial = bundles.begin(premises.place(row.uuid))
    if premises.journal is not None and premises.journal.exists():
        copies.copy_sqlite(premises.journal, bundles.place_for(partial, JOURNAL))
    target = bundles.place_for(partial, database_file(store))
    if store.is_sqlite:
        copies.copy_sqlite(store.path, target)
    else:
        copies.dump_postgres(store, target)
    bundles.write_json(partial, SETTINGS, dict(premises.settings))
    for pattern in HOME_FILES:
        for path in sorted(premises.home.glob(pattern)):
            if path.is_file():
                bundles.put(partial, f"{HOME}/{path.relative_to(premises.home).as_posix()}", path)
    return bundles.seal(partial, premises.place(row.uuid), _facts(store, row))


def _facts(store: Store, row: HubCheckpoint) -> dict[str, Any]:
    with store.reading() as session:
        state = session.get(HubState, HUB_UUID)
    return {
        "uuid": str(row.uuid),
        "type": row.type,
        "reason": row.reason,
        "description": row.description,
        "created_at": row.created_at.isoformat(),
        "hub_uuid": state.value["uuid"] if state is not None else None,
        "version": __version__,
        "schema_revision": schema.revision_of(store),
        "database": "sqlite" if store.is_sqlite else "postgresql",
    }


def require_space(store: Store, premises: Premises) -> None:
    """Raises InsufficientSpace when the copy would leave less than what must stay free."""
    journal = premises.journal.stat().st_size if premises.journal is not None and premises.journal.exists() else 0
    needed = copies.size_of(store) + journal + premises.min_free_bytes
    free = shutil.disk_usage(premises.home).free
    if free < needed:
        raise InsufficientSpace(
            f"Only {free / 1e9:.1f} GB are free on the disk of '{premises.home}', and a checkpoint of the Hub needs "
            f"{needed / 1e9:.1f} GB with what must stay free; nothing was started. Free some space, or lower the "
            "setting 'min_free_gb'.",
            details={"path": str(premises.home), "free_bytes": free, "required_bytes": needed},
        )


def drop_partials(premises: Premises, uuid: UUID) -> None:
    """Remove what was not sealed."""
    for partial in bundles.partials_of(premises.place(uuid)):
        shutil.rmtree(partial, ignore_errors=True)


# The steps


def _premises(world: World) -> Premises:
    if world.premises is None:
        raise InternalError("This hub process does not know its own home.")
    return world.premises


def _row(world: World, operation_uuid: UUID) -> HubCheckpoint:
    with world.store.reading() as session:
        return rows.get(session, HubCheckpoint, rows.get(session, Operation, operation_uuid).object_uuid)


def _is_here(world: World, row: HubCheckpoint) -> bool:
    """Whether the sealed bundle lies in this home."""
    is_ours = row.place == place_of(world.executor()) and bool(row.path)
    return is_ours and (Path(row.path) / bundles.MANIFEST).exists()


def copy(world: World, operation_uuid: UUID) -> None:
    row, premises = _row(world, operation_uuid), _premises(world)
    if row.status != HubCheckpointStatus.creating or _is_here(world, row):
        return
    manifest = write(world.store, premises, row)
    with world.store.transaction() as session:
        found = rows.get(session, HubCheckpoint, row.uuid)
        found.place, found.path = place_of(world.executor()), str(premises.place(row.uuid))
        found.size_bytes, found.file_count = manifest.size_bytes, len(manifest.files)
        found.version, found.schema_revision = __version__, str(manifest.facts["schema_revision"])
        session.add(found)


def drop(world: World, operation_uuid: UUID) -> None:
    """Undo of `copy`, in this home."""
    row, premises = _row(world, operation_uuid), _premises(world)
    drop_partials(premises, row.uuid)
    if row.status != HubCheckpointStatus.ready:
        shutil.rmtree(premises.place(row.uuid), ignore_errors=True)


def snapshot(world: World, operation_uuid: UUID) -> None:
    """Snapshot the VM the Hub runs in, where it runs in one of its Proxmox."""
    row, premises = _row(world, operation_uuid), _premises(world)
    if premises.vmid is None or row.status != HubCheckpointStatus.creating:
        return
    vmid, name = premises.vmid, snapshot_name(row.uuid)
    with world.store.transaction() as session:
        found = rows.get(session, HubCheckpoint, row.uuid)
        found.vmid, found.snapshot = vmid, name
        session.add(found)
    text = f"Checkpoint of the Hub: {row.reason or row.type}."
    vms.run_task(world, operation_uuid, "snapshot", vmid, lambda: change.snapshot(world.proxmox, vmid, name, text))


def drop_snapshot(world: World, operation_uuid: UUID) -> None:
    row = _row(world, operation_uuid)
    if row.vmid is None or row.snapshot is None or row.status == HubCheckpointStatus.ready:
        return
    _delete_snapshot(world, operation_uuid, row.vmid, row.snapshot)


def forget_snapshot(world: World, row: HubCheckpoint) -> None:
    """Delete the VM's snapshot of a checkpoint that is kept no longer. Raises NotYet until that is done."""
    if row.vmid is not None and row.snapshot is not None:
        _delete_snapshot(world, row.uuid, row.vmid, row.snapshot)


def _delete_snapshot(world: World, subject: UUID, vmid: int, name: str) -> None:
    if read.find_vm(world.proxmox, vmid) is None:
        return
    vms.require_unlocked(world, vmid)
    vms.run_task(world, subject, "delete snapshot", vmid, lambda: change.delete_snapshot(world.proxmox, vmid, name))


def record(world: World, operation_uuid: UUID) -> None:
    """The checkpoint is ready. Raises Repeat when its bundle is not in this home: its maker died."""
    row = _row(world, operation_uuid)
    if row.status == HubCheckpointStatus.creating and not _is_here(world, row):
        raise Repeat("copy")
    with world.store.transaction() as session:
        found = rows.get(session, HubCheckpoint, row.uuid)
        if found.status == HubCheckpointStatus.creating:
            found.status, found.completed_at = HubCheckpointStatus.ready, now()
            found.kind = HubCheckpointKind.vm if found.snapshot is not None else HubCheckpointKind.logical
            session.add(found)
            rows.record(session, "hub_checkpoint.status", found.uuid, status=found.status)
        end_in(session, operation_uuid, None)


def fail(world: World, operation_uuid: UUID, error: AutovibeError, pending: str) -> None:
    with world.store.transaction() as session:
        row = rows.get(session, HubCheckpoint, rows.get(session, Operation, operation_uuid).object_uuid)
        if row.status == HubCheckpointStatus.creating:
            row.status, row.error_message, row.completed_at = HubCheckpointStatus.failed, error.message, now()
            row.path, row.size_bytes, row.file_count = "", 0, 0
            session.add(row)
            rows.record(session, "hub_checkpoint.status", row.uuid, status=row.status)
        end_in(session, operation_uuid, error, pending)


SNAPSHOT_STEPS = ("snapshot",)
"""What only a Hub does that runs in a VM of its Proxmox."""

WORKFLOW = Workflow(
    steps=(
        Step("copy", copy, undo=drop, deadline=_COPY_SECONDS),
        Step("snapshot", snapshot, undo=drop_snapshot),
        Step("record", record),
    ),
    fail=fail,
)
