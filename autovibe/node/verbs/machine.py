"""What a client tells a VM's QEMU itself: keys, commands of its monitor; and where the VM could go from here."""

from __future__ import annotations

from typing import Any

from autovibe.node.refusal import Refusal, faulty
from autovibe.node.state import Call, State
from autovibe.node.vm import drives

_READ_ONLY = ("info", "help", "?")


def send_key(state: State, call: Call) -> None:
    """Press keys together, named as QEMU names them: `ctrl-alt-delete`, `ret`, `shift-a`, or a code as in `0x1c`."""
    if call.get("skiplock") and not call.actor.is_root:
        raise faulty({"skiplock": "Only root may use this option."})
    keys = [_key(name) for name in call["key"].split("-") if name]
    if not keys:
        raise faulty({"key": "no key is named"})
    _require_running(state, call)
    state.qemu.press(call.vmid, keys)


def _key(name: str) -> dict[str, Any]:
    if name.startswith("0x"):
        try:
            return {"type": "number", "data": int(name, 16)}
        except ValueError:
            raise faulty({"key": f"invalid key '{name}'"}) from None
    return {"type": "qcode", "data": name}


def monitor(state: State, call: Call) -> str:
    """A command of QEMU's human monitor, and what it printed. What changes something is root@pam's alone."""
    command = call["command"].strip()
    if not call.actor.is_root and command.split(" ")[0] not in _READ_ONLY and not _may_change(state, call):
        raise Refusal(f"Permission check failed (/vms/{call.vmid}, Sys.Modify)", status=403)
    _require_running(state, call)
    return state.qemu.tell(call.vmid, command)


def _may_change(state: State, call: Call) -> bool:
    return state.allows(call.actor, f"/vms/{call.vmid}", "Sys.Modify")


def _require_running(state: State, call: Call) -> None:
    state.configs.load(call.vmid)
    if not state.qemu.is_running(call.vmid):
        raise Refusal(f"VM {call.vmid} not running")


# Migration, of which there is none


def migration(state: State, call: Call) -> dict[str, Any]:
    """What stands against a migration: this is the only node."""
    config = state.configs.load(call.vmid)
    config.check_lock()
    found: dict[str, Any] = {
        "running": int(state.qemu.is_running(call.vmid)),
        "has-dbus-vmstate": 0,
        "local_disks": _local_disks(state, config.values),
        "local_resources": [],
        "mapped-resources": [],
        "mapped-resource-info": {},
    }
    return found if found["running"] else found | {"allowed_nodes": [], "not_allowed_nodes": {}}


def _local_disks(state: State, values: dict[str, str]) -> list[dict[str, Any]]:
    found = []
    for key, text in values.items():
        if key.startswith("unused") or key in dict(drives.attached(values)):
            drive = drives.parse(text)
            if drives.has_volume(drive):
                size = state.disks.size(drive["file"]) if drives.is_owned(drive) else 0
                marks = {"cdrom": int(drives.is_cdrom(drive)), "is_unused": int(key.startswith("unused"))}
                found.append({"volid": drive["file"], "drivename": key, "size": size, **marks})
    return found


def migrate(state: State, call: Call) -> str:
    if call["target"] in (state.name, "localhost"):
        raise faulty({"target": "target is local node."})
    raise Refusal(f"no such cluster node '{call['target']}'")
