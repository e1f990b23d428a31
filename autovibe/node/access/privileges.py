"""Privileges and the roles that every node has, as Proxmox VE 9 defines them (pve-access-control).

Each area has four steps: what only an administrator of everything may, what an administrator of the area may, what its
users may, and what its auditors may see. The roles of an area are sums of these.
"""

from __future__ import annotations

from typing import NamedTuple


class _Area(NamedTuple):
    root: tuple[str, ...] = ()
    admin: tuple[str, ...] = ()
    user: tuple[str, ...] = ()
    audit: tuple[str, ...] = ()


_AREAS = {
    "VM": _Area(
        admin=(
            "VM.Allocate", "VM.Clone", "VM.Config.CPU", "VM.Config.Disk", "VM.Config.HWType", "VM.Config.Memory",
            "VM.Config.Network", "VM.Config.Options", "VM.GuestAgent.FileRead", "VM.GuestAgent.FileSystemMgmt",
            "VM.GuestAgent.FileWrite", "VM.GuestAgent.Unrestricted", "VM.Migrate", "VM.Replicate", "VM.Snapshot",
            "VM.Snapshot.Rollback",
        ),
        user=("VM.Backup", "VM.Config.CDROM", "VM.Config.Cloudinit", "VM.Console", "VM.PowerMgmt"),
        audit=("VM.Audit", "VM.GuestAgent.Audit"),
    ),
    "Sys": _Area(
        root=("Sys.AccessNetwork", "Sys.Incoming", "Sys.Modify", "Sys.PowerMgmt"),
        admin=("Sys.Console", "Sys.Syslog"),
        audit=("Sys.Audit",),
    ),
    "Datastore": _Area(
        admin=("Datastore.Allocate", "Datastore.AllocateTemplate"),
        user=("Datastore.AllocateSpace",),
        audit=("Datastore.Audit",),
    ),
    "SDN": _Area(admin=("SDN.Allocate",), user=("SDN.Use",), audit=("SDN.Audit",)),
    "User": _Area(root=("Realm.Allocate",), admin=("Group.Allocate", "Realm.AllocateUser", "User.Modify")),
    "Pool": _Area(admin=("Pool.Allocate",), user=("Pool.Audit",), audit=("Pool.Audit",)),
    "Mapping": _Area(admin=("Mapping.Modify",), user=("Mapping.Use",), audit=("Mapping.Audit",)),
}  # fmt: skip

PRIVILEGES = frozenset({"Permissions.Modify"}.union(*(step for area in _AREAS.values() for step in area)))
ADMINISTRATOR, NO_ACCESS = "Administrator", "NoAccess"


def _built_in() -> dict[str, frozenset[str]]:
    roles = {ADMINISTRATOR: PRIVILEGES, NO_ACCESS: frozenset[str]()}
    for name, area in _AREAS.items():
        roles[f"PVE{name}Admin"] = frozenset(area.admin + area.user + area.audit)
        if area.user:
            roles[f"PVE{name}User"] = frozenset(area.user + area.audit)
    everything = frozenset().union(*(roles[f"PVE{name}Admin"] for name in _AREAS))
    return roles | {
        "PVEAdmin": everything - {"Mapping.Modify"},
        "PVEAuditor": frozenset[str]().union(*(area.audit for area in _AREAS.values())),
        "PVEMappingAuditor": frozenset(_AREAS["Mapping"].audit),
        "PVETemplateUser": frozenset(("VM.Audit", "VM.Clone")),
    }


BUILT_IN_ROLES = _built_in()
"""Roles that cannot be changed or deleted (`special`)."""
