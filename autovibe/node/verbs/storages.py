"""The configuration of storages: `/storage`."""

from __future__ import annotations

from typing import Any

from autovibe.node.disks.storage_config import Section
from autovibe.node.refusal import Refusal
from autovibe.node.schema.parameters import render
from autovibe.node.state import Call, State

_OFFLINE = ("cephfs", "cifs", "esxi", "iscsi", "iscsidirect", "nfs", "pbs", "rbd", "zfs")


def list_all(state: State, call: Call) -> list[dict[str, Any]]:
    configuration = state.disks.configuration
    return [
        configuration.describe(section)
        for section in configuration.sections.values()
        if call.get("type", section.type) == section.type
        and state.allows(call.actor, f"/storage/{section.name}", "Datastore.Audit", "Datastore.AllocateSpace", any=True)
    ]


def get(state: State, call: Call) -> dict[str, Any]:
    configuration = state.disks.configuration
    return configuration.describe(configuration.require(call["storage"]))


def create(state: State, call: Call) -> dict[str, str]:
    """Add a storage: a directory below the folder of all storages, or `local-lvm` after it was removed."""
    name, kind = call["storage"], call["type"]
    if kind not in ("dir", "lvmthin"):
        raise Refusal(f"create storage failed: {_missing_backend(name, kind, call)}")
    section = state.disks.configuration.create(name, kind, _options(call))
    state.disks.configure()
    if not state.has_storage(name):
        state.disks.configuration.delete(name)
        raise Refusal(f"create storage failed: unable to activate storage '{name}' - see the node's log")
    return _answer(section)


def _missing_backend(name: str, kind: str, call: Call) -> str:
    """What Proxmox says where the server, pool or program behind a storage is not there."""
    if kind in _OFFLINE:
        return f"storage '{name}' is not online"
    if kind == "zfspool":
        pool = call.get("pool", "")
        return f"could not activate storage '{name}', zfs error: cannot import '{pool}': no such pool available"
    if kind == "lvm":
        return f"no such volume group '{call.get('vgname', '')}'"
    return f"unable to activate storage '{name}' - '{call.get('path', '')}' is not on a BTRFS file system"


def update(state: State, call: Call) -> dict[str, str]:
    section = state.disks.configuration.update(
        call["storage"], _options(call), call.get("delete", ""), call.get("digest")
    )
    state.disks.configure()
    return _answer(section)


def delete(state: State, call: Call) -> None:
    """Forget a storage. Its files stay, and disks of VMs on it cannot be used until it is there again."""
    state.disks.configuration.delete(call["storage"])
    state.disks.configure()
    state.access.forget_storage(call["storage"])


def _options(call: Call) -> dict[str, str]:
    known = {key: render(value) for key, value in call.parameters.items()}
    return {key: text for key, text in known.items() if key not in ("storage", "type", "digest", "delete")}


def _answer(section: Section) -> dict[str, str]:
    return {"storage": section.name, "type": section.type}
