"""The cluster, which is this one node: version, nodes, resources, the next vmid."""

from __future__ import annotations

from typing import Any

from autovibe.node import host
from autovibe.node.refusal import faulty
from autovibe.node.state import Call, State
from autovibe.node.verbs import vms

RELEASE = "9.2"
VERSION = "9.2.11"
REPOSITORY_ID = "14a22df3deadbeef"
_FIRST_VMID, _LAST_VMID = 100, 1_000_000


def version(_state: State, _call: Call) -> dict[str, str]:
    return {"version": VERSION, "release": RELEASE, "repoid": REPOSITORY_ID}


def root_index(_state: State, _call: Call) -> list[dict[str, str]]:
    return [{"subdir": name} for name in ("version", "cluster", "nodes", "access")]


def nodes(state: State, _call: Call) -> list[dict[str, Any]]:
    return [{**_node_facts(state), "ssl_fingerprint": state.fingerprint}]


def _node_facts(state: State) -> dict[str, Any]:
    return {
        "id": f"node/{state.name}",
        "node": state.name,
        "type": "node",
        "status": "online",
        "level": "",
    } | host.load(state.home)


def node_index(_state: State, _call: Call) -> list[dict[str, str]]:
    return [{"name": name} for name in ("qemu", "status", "storage", "tasks", "version")]


def node_status(state: State, _call: Call) -> dict[str, Any]:
    return host.status(state.home, f"pve-manager/{VERSION}/{REPOSITORY_ID}")


def status(state: State, _call: Call) -> list[dict[str, Any]]:
    entry = {"id": f"node/{state.name}", "type": "node", "name": state.name, "ip": state.address, "level": ""}
    return [{**entry, "local": 1, "nodeid": 0, "online": 1}]


def resources(state: State, call: Call) -> list[dict[str, Any]]:
    """VMs, the node and its storages, at once: a real cluster lags up to ten seconds."""
    wanted = call.get("type")
    found: list[dict[str, Any]] = []
    if wanted in (None, "vm"):
        found += [_vm_resource(state, vm) for vm in vms.facts_of_all(state)]
    if wanted in (None, "node"):
        found.append({**_node_facts(state), "cgroup-mode": 2})
    if wanted in (None, "storage"):
        found += [_storage_resource(state, storage) for storage in state.disks.statuses()]
    return found


def _vm_resource(state: State, vm: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in vm.items() if key not in ("cpus", "serial", "pid")}
    place = {"id": f"qemu/{vm['vmid']}", "type": "qemu", "node": state.name, "maxcpu": vm["cpus"]}
    return {"template": 0, "diskread": 0, "diskwrite": 0, **kept, **place}


def _storage_resource(state: State, storage: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"storage/{state.name}/{storage['storage']}",
        "type": "storage",
        "node": state.name,
        "storage": storage["storage"],
        "plugintype": storage["type"],
        "content": storage["content"],
        "shared": storage["shared"],
        "status": "available" if storage["active"] else "unknown",
        "disk": storage["used"],
        "maxdisk": storage["total"],
    }


def next_id(state: State, call: Call) -> str:
    """The lowest free vmid, a string; nothing is reserved. A given vmid is only checked."""
    wanted = call.get("vmid")
    if wanted is not None:
        if state.configs.exists(wanted):
            raise faulty({"vmid": f"VM {wanted} already exists"})
        return str(wanted)
    taken = set(state.configs.vmids())
    return str(next(vmid for vmid in range(_FIRST_VMID, _LAST_VMID) if vmid not in taken))
