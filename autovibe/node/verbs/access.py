"""Access: tickets, and what the one user may do (everything)."""

from __future__ import annotations

from typing import Any

from autovibe.node.auth import ROOT
from autovibe.node.state import Call, State

_VM = (
    "VM.Allocate", "VM.Audit", "VM.Backup", "VM.Clone", "VM.Config.CDROM", "VM.Config.CPU", "VM.Config.Cloudinit",
    "VM.Config.Disk", "VM.Config.HWType", "VM.Config.Memory", "VM.Config.Network", "VM.Config.Options", "VM.Console",
    "VM.GuestAgent.Audit", "VM.GuestAgent.FileRead", "VM.GuestAgent.FileSystemMgmt", "VM.GuestAgent.FileWrite",
    "VM.GuestAgent.Unrestricted", "VM.Migrate", "VM.PowerMgmt", "VM.Replicate", "VM.Snapshot", "VM.Snapshot.Rollback",
)  # fmt: skip
_DATASTORE = ("Datastore.Allocate", "Datastore.AllocateSpace", "Datastore.AllocateTemplate", "Datastore.Audit")
_SYS = (
    "Sys.AccessNetwork", "Sys.Audit", "Sys.Console", "Sys.Incoming", "Sys.Modify", "Sys.PowerMgmt", "Sys.Syslog",
)  # fmt: skip
_SDN = ("SDN.Allocate", "SDN.Audit", "SDN.Use")
_MAPPING = ("Mapping.Audit", "Mapping.Modify", "Mapping.Use")
_OTHER = (
    "Group.Allocate", "Permissions.Modify", "Pool.Allocate", "Pool.Audit", "Realm.Allocate", "Realm.AllocateUser",
    "User.Modify",
)  # fmt: skip
PRIVILEGES = (*_VM, *_DATASTORE, *_SYS, *_SDN, *_MAPPING, *_OTHER)
_CAPABILITIES = {
    "access": ("Group.Allocate", "Permissions.Modify", "User.Modify"),
    "dc": ("SDN.Allocate", "SDN.Audit", "SDN.Use", "Sys.Audit", "Sys.Modify"),
    "mapping": (*_MAPPING, "Permissions.Modify"),
    "nodes": (*_SYS, "Permissions.Modify"),
    "sdn": (*_SDN, "Permissions.Modify"),
    "storage": (*_DATASTORE, "Permissions.Modify"),
    "vms": (*_VM, "Permissions.Modify"),
}
_PATHS = ("/", "/access", "/access/groups", "/mapping", "/nodes", "/pool", "/sdn", "/storage", "/vms")


def login_page(_state: State, _call: Call) -> None:
    """What a web page's login form asks for first: nothing."""


def login(state: State, call: Call) -> dict[str, Any]:
    username = call["username"]
    if realm := call.get("realm"):
        username = f"{username}@{realm}"
    ticket, csrf_token = state.auth.login(username, call["password"])
    capabilities = {area: dict.fromkeys(privileges, 1) for area, privileges in _CAPABILITIES.items()}
    return {"username": username, "ticket": ticket, "CSRFPreventionToken": csrf_token, "cap": capabilities}


def domains(_state: State, _call: Call) -> list[dict[str, str]]:
    return [{"realm": "pam", "type": "pam", "comment": "Linux PAM standard authentication"}]


def permissions(_state: State, call: Call) -> dict[str, dict[str, int]]:
    """Every privilege on the asked path, or on the usual ones; nothing for a user this node does not have."""
    if call.get("userid", ROOT).partition("!")[0] != ROOT:
        return {}
    paths = (call["path"],) if call.get("path") else _PATHS
    return {path: dict.fromkeys(PRIVILEGES, 1) for path in paths}
