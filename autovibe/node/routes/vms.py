"""Routes about VMs: their life, configuration, clones and snapshots."""

from __future__ import annotations

from autovibe.node import formats
from autovibe.node.options import DESCRIPTION, DIGEST, FLAG, NODE, OPTIONS, SNAPSHOT, STORAGE, TEXT, VMID
from autovibe.node.parameters import Param, Table
from autovibe.node.permissions import ALL_USERS, both, either, perm
from autovibe.node.routes.route import DELAY, DISK, SECONDS, SKIPLOCK, START, N, Route, V, on_vm, route
from autovibe.node.verbs import clones, cloudinit, config, create, power, snapshots, vms

_CREATE: Table = {
    **OPTIONS,
    "vmid": VMID.required(),
    "archive": Param(max_length=255),
    "bwlimit": START,
    "force": Param("boolean", requires="archive"),
    "import-working-storage": STORAGE,
    "pool": Param(form=formats.pool_id),
    "start": FLAG,
    "storage": STORAGE,
    "unique": Param("boolean", requires="archive"),
}
_CONFIGURE: Table = {
    **OPTIONS,
    "delete": Param(form=formats.config_ids),
    "revert": Param(form=formats.config_ids),
    "digest": DIGEST,
    "force": Param("boolean", requires="delete"),
    **SKIPLOCK,
}
_CLONE: Table = {
    "newid": VMID.required(),
    "name": OPTIONS["name"],
    "description": DESCRIPTION,
    "snapname": SNAPSHOT,
    "full": FLAG,
    "storage": STORAGE,
    "format": Param(enum=("raw", "qcow2", "vmdk")),
    "pool": Param(form=formats.pool_id),
    "target": NODE,
    "bwlimit": START,
}
_STARTING: Table = {
    **SKIPLOCK,
    "timeout": SECONDS,
    "machine": OPTIONS["machine"],
    "force-cpu": TEXT,
    "stateuri": Param(max_length=128),
    "migratedfrom": NODE,
    "targetstorage": TEXT,
}
_STOPPING: Table = {**SKIPLOCK, "timeout": SECONDS, "keepActive": FLAG}

_CONFIGURING = on_vm(
    *(f"VM.Config.{what}" for what in ("Disk", "CDROM", "CPU", "Memory", "Network", "HWType", "Options", "Cloudinit")),
    any=True,
)

ROUTES: tuple[Route, ...] = (
    route("GET", f"{N}/qemu", vms.list_all, ALL_USERS, {"full": FLAG}),
    route("POST", f"{N}/qemu", create.create, ALL_USERS, _CREATE),
    route("GET", V, vms.index, ALL_USERS),
    route(
        "DELETE",
        V,
        create.destroy,
        on_vm("VM.Allocate"),
        {**SKIPLOCK, "purge": FLAG, "destroy-unreferenced-disks": FLAG},
    ),
    route("GET", f"{V}/config", config.get, on_vm("VM.Audit"), {"current": FLAG, "snapshot": SNAPSHOT}),
    route(
        "PUT",
        f"{V}/config",
        config.put,
        _CONFIGURING,
        _CONFIGURE,
    ),
    route(
        "POST",
        f"{V}/config",
        config.post,
        _CONFIGURING,
        {**_CONFIGURE, "background_delay": DELAY},
    ),
    route("GET", f"{V}/pending", config.pending, on_vm("VM.Audit")),
    route(
        "PUT",
        f"{V}/resize",
        config.resize,
        on_vm("VM.Config.Disk"),
        {
            "disk": DISK.required(),
            "size": Param(optional=False, pattern=r"\+?\d+(\.\d+)?[KMGT]?"),
            "digest": DIGEST,
            **SKIPLOCK,
        },
    ),
    route(
        "POST",
        f"{V}/clone",
        clones.clone,
        both(
            on_vm("VM.Clone"),
            either(perm("/vms/{newid}", "VM.Allocate"), perm("/pool/{pool}", "VM.Allocate", param="pool")),
        ),
        _CLONE,
    ),
    route("POST", f"{V}/template", clones.template, on_vm("VM.Allocate"), {"disk": DISK}),
    route(
        "GET",
        f"{V}/feature",
        clones.feature,
        on_vm("VM.Audit"),
        {"feature": Param(optional=False, enum=("snapshot", "clone", "copy")), "snapname": SNAPSHOT},
    ),
    route("GET", f"{V}/status", vms.status_index, ALL_USERS),
    route("GET", f"{V}/status/current", vms.current, on_vm("VM.Audit")),
    route("POST", f"{V}/status/start", power.start, on_vm("VM.PowerMgmt"), _STARTING),
    route(
        "POST",
        f"{V}/status/stop",
        power.stop,
        on_vm("VM.PowerMgmt"),
        {**_STOPPING, "overrule-shutdown": FLAG, "migratedfrom": NODE},
    ),
    route(
        "POST",
        f"{V}/status/shutdown",
        power.shutdown,
        on_vm("VM.PowerMgmt"),
        {**_STOPPING, "forceStop": FLAG},
    ),
    route("POST", f"{V}/status/reboot", power.reboot, on_vm("VM.PowerMgmt"), {"timeout": SECONDS}),
    route("POST", f"{V}/status/reset", power.reset, on_vm("VM.PowerMgmt"), SKIPLOCK),
    route(
        "POST",
        f"{V}/status/suspend",
        power.suspend,
        on_vm("VM.PowerMgmt"),
        {**SKIPLOCK, "todisk": FLAG, "statestorage": Param(form=formats.storage_id, requires="todisk")},
    ),
    route("POST", f"{V}/status/resume", power.resume, on_vm("VM.PowerMgmt"), {**SKIPLOCK, "nocheck": FLAG}),
    route("GET", f"{V}/snapshot", snapshots.list_all, on_vm("VM.Audit")),
    route(
        "POST",
        f"{V}/snapshot",
        snapshots.create,
        on_vm("VM.Snapshot"),
        {"snapname": SNAPSHOT.required(), "description": DESCRIPTION, "vmstate": FLAG},
    ),
    route("GET", f"{V}/snapshot/{{snapname}}", snapshots.index, ALL_USERS),
    route("DELETE", f"{V}/snapshot/{{snapname}}", snapshots.delete, on_vm("VM.Snapshot"), {"force": FLAG}),
    route(
        "GET",
        f"{V}/snapshot/{{snapname}}/config",
        snapshots.get_config,
        on_vm("VM.Snapshot", "VM.Snapshot.Rollback", "VM.Audit", any=True),
    ),
    route(
        "PUT",
        f"{V}/snapshot/{{snapname}}/config",
        snapshots.put_config,
        on_vm("VM.Snapshot"),
        {"description": DESCRIPTION},
    ),
    route(
        "POST",
        f"{V}/snapshot/{{snapname}}/rollback",
        snapshots.rollback,
        on_vm("VM.Snapshot", "VM.Snapshot.Rollback", any=True),
        {"start": FLAG},
    ),
    route("GET", f"{V}/cloudinit", cloudinit.get, on_vm("VM.Audit")),
    route("PUT", f"{V}/cloudinit", cloudinit.put, on_vm("VM.Config.Cloudinit")),
    route(
        "GET",
        f"{V}/cloudinit/dump",
        cloudinit.dump,
        on_vm("VM.Audit"),
        {"type": Param(optional=False, enum=("user", "network", "meta"))},
    ),
)
