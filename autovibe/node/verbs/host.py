"""The node itself: its status, time, networks, services, and the objects that clients ask every node for."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from autovibe.node import host
from autovibe.node.host import capabilities, networks
from autovibe.node.host.node_log import PARTS
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.state import Call, State
from autovibe.node.verbs import cluster

SERVICES = (
    "chrony", "corosync", "cron", "ksmtuned", "lxcfs", "postfix", "proxmox-firewall", "pve-cluster", "pve-firewall",
    "pve-ha-crm", "pve-ha-lrm", "pve-lxc-syscalld", "pvedaemon", "pvefw-logger", "pveproxy", "pvescheduler", "pvestatd",
    "qmeventd", "spiceproxy", "sshd", "syslog", "systemd-journald", "systemd-timesyncd",
)  # fmt: skip
"""The names Proxmox knows services by; those that are no part of this node are not found on it."""

_PARTS = {
    "pveproxy": "The node's HTTPS server",
    "pvedaemon": "The node's API and tasks",
    "pvestatd": "The node's sampler of figures",
}
_BACKUP_DEFAULTS = {
    "all": 0, "bwlimit": 0, "compress": "0", "dumpdir": "/var/lib/vz/dump", "fleecing": {"enabled": 0}, "ionice": 7,
    "lockwait": 180, "mailnotification": "always", "mode": "snapshot", "notification-mode": "auto",
    "performance": {"max-workers": 16, "pbs-entries-max": 1048576}, "pigz": 0, "prune-backups": "keep-all=1",
    "quiet": 0, "remove": 1, "stdexcludes": 1, "stop": 0, "stopwait": 10, "zstd": 1,
}  # fmt: skip
_SHOP = "https://www.proxmox.com/en/proxmox-virtual-environment/pricing"


def index(_state: State, _call: Call) -> list[dict[str, str]]:
    names = (
        "aplinfo", "capabilities", "config", "dns", "firewall", "hosts", "journal", "lxc", "netstat", "network", "qemu",
        "replication", "report", "rrddata", "services", "status", "storage", "subscription", "syslog", "tasks", "time",
        "version", "vzdump",
    )  # fmt: skip
    return [{"name": name} for name in names]


def status(state: State, _call: Call) -> dict[str, Any]:
    return host.status(state.home, f"pve-manager/{cluster.VERSION}/{cluster.REPOSITORY_ID}")


def backup_defaults(state: State, call: Call) -> dict[str, Any]:
    """What a backup does that is not told otherwise. This node makes none: POST vzdump answers 501."""
    return {**_BACKUP_DEFAULTS, "storage": state.require_storage(call.get("storage", "local"))}


def power(state: State, _call: Call) -> None:
    """The machine is its owner's: nobody may end it from here."""
    raise _denied(f"/nodes/{state.name}", "Sys.PowerMgmt")


def _denied(path: str, privilege: str) -> Refusal:
    return Refusal(f"Permission check failed ({path}, {privilege})", status=403)


def read_time(_state: State, _call: Call) -> dict[str, Any]:
    """Seconds since the epoch, and the same as if local time were UTC."""
    now = int(time.time())
    return {"time": now, "localtime": now + time.localtime(now).tm_gmtoff, "timezone": host.timezone()}


def dns(_state: State, _call: Call) -> dict[str, str]:
    return networks.name_servers()


def hosts(_state: State, _call: Call) -> dict[str, str]:
    data = Path("/etc/hosts").read_bytes()
    return {"data": data.decode("utf-8", "replace"), "digest": hashlib.sha1(data).hexdigest()}  # noqa: S324


def list_networks(state: State, call: Call) -> list[dict[str, Any]]:
    """All to auditors of the node; its bridge to those who may use it. `type` picks a kind."""
    wanted, found = call.get("type"), []
    for name, facts in sorted(networks.interfaces().items()):
        is_bridge = facts["type"] == "bridge"
        is_wanted = wanted in (None, "include_sdn", facts["type"]) or (is_bridge and wanted.startswith("any_"))
        if is_wanted and _is_visible(state, call, name, is_bridge=is_bridge):
            found.append({"iface": name, **facts})
    return found


def _is_visible(state: State, call: Call, name: str, *, is_bridge: bool) -> bool:
    if state.allows(call.actor, f"/nodes/{state.name}", "Sys.Audit"):
        return True
    path = f"/sdn/zones/{cluster.ZONE}/{name}"
    return is_bridge and state.allows(call.actor, path, "SDN.Audit", "SDN.Use", any=True)


def network(_state: State, call: Call) -> dict[str, Any]:
    found = networks.interfaces().get(call["iface"])
    if found is None:
        raise faulty({"iface": "interface does not exist"})
    return found


def services(_state: State, _call: Call) -> list[dict[str, str]]:
    return [_service(name) for name in SERVICES]


def service_index(_state: State, _call: Call) -> list[dict[str, str]]:
    return [{"subdir": "state"}]


def service_state(_state: State, call: Call) -> dict[str, str]:
    return _service(call["service"])


def _service(name: str) -> dict[str, str]:
    """A part of the node runs as long as it can answer; nothing else is there."""
    entry = {"service": name, "name": name, "desc": _PARTS.get(name, f"{name}.service")}
    if name in PARTS:
        return {**entry, "state": "running", "active-state": "active", "unit-state": "enabled"}
    return {**entry, "state": "dead", "active-state": "inactive", "unit-state": "not-found"}


def subscription(state: State, call: Call) -> dict[str, str]:
    """None. The server's number, for auditors, is made of its certificate's."""
    found = {"status": "notfound", "message": "There is no subscription key", "url": _SHOP}
    if state.allows(call.actor, f"/nodes/{state.name}", "Sys.Audit"):
        found["serverid"] = hashlib.sha256(state.fingerprint.encode()).hexdigest()[:32].upper()
    return found


def report(state: State, _call: Call) -> str:
    """What a person who is asked for help would want to know; no secrets."""
    found = status(state, _call)
    sections = {
        "version": [found["pveversion"], f"QEMU {host.qemu_version()}", found["kversion"]],
        "load": [" ".join(found["loadavg"]), *(f"{key}: {found[key]}" for key in ("memory", "swap", "rootfs"))],
        "storages": [
            f"{storage['storage']}: {storage['type']}, {storage['used']} of {storage['total']} bytes"
            for storage in state.disks.statuses()
        ],
        "VMs": [f"{vmid}: {'running' if state.qemu.is_running(vmid) else 'stopped'}" for vmid in state.configs.vmids()],
        "networks": [f"{name}: {facts.get('cidr', '-')}" for name, facts in sorted(networks.interfaces().items())],
    }
    return "".join(
        f"==== {title} ====\n\n" + "".join(f"{line}\n" for line in sections[title]) + "\n" for title in sections
    )


def wake(state: State, call: Call) -> None:
    """There is no other node, and one that answers is awake."""
    raise Refusal(f"'{call.get('node', state.name)}' is local node, cannot wake my self!")


# Capabilities


def capabilities_index(_state: State, _call: Call) -> list[dict[str, str]]:
    return [{"name": "qemu"}]


def qemu_index(_state: State, _call: Call) -> list[dict[str, str]]:
    return [{"name": name} for name in ("cpu", "cpu-flags", "machines", "migration")]


def processors(_state: State, call: Call) -> list[dict[str, Any]]:
    return [] if _is_foreign(call) else capabilities.processors()


def processor_flags(_state: State, call: Call) -> list[dict[str, str]]:
    return [] if _is_foreign(call) else capabilities.flags()


def machines(_state: State, call: Call) -> list[dict[str, str]]:
    return [] if _is_foreign(call) else capabilities.machines()


def _is_foreign(call: Call) -> bool:
    return bool(call.get("arch", "x86_64") != "x86_64")


def migration(_state: State, _call: Call) -> dict[str, int]:
    return {"has-dbus-vmstate": 0}
