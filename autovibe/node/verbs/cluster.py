"""The cluster, which is this one node: version, nodes, resources, the next vmid, the log."""

from __future__ import annotations

from typing import Any

from autovibe.node import host
from autovibe.node.host import datacenter
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.state import Call, State
from autovibe.node.tasks import Task
from autovibe.node.verbs import vms

RELEASE = "9.2"
VERSION = "9.2.11"
REPOSITORY_ID = "14a22df3deadbeef"
ZONE = "localnetwork"
"""The zone of a node's own bridges, which is always there."""

_INFO, _ERROR = 6, 3  # priorities of the log, as in syslog


def version(_state: State, _call: Call) -> dict[str, str]:
    return {"version": VERSION, "release": RELEASE, "repoid": REPOSITORY_ID}


def root_index(_state: State, _call: Call) -> list[dict[str, str]]:
    return [{"subdir": name} for name in ("version", "cluster", "nodes", "storage", "access", "pools")]


def index(_state: State, _call: Call) -> list[dict[str, str]]:
    names = (
        "log", "options", "resources", "replication", "tasks", "backup", "backup-info", "ha", "status", "nextid",
        "firewall", "config", "sdn", "jobs", "mapping",
    )  # fmt: skip
    return [{"name": name} for name in names]


def nothing(_state: State, _call: Call) -> list[Any]:
    """The list of things of which this node has none."""
    return []


def nodes(state: State, call: Call) -> list[dict[str, Any]]:
    return [{**_node_facts(state, call), "ssl_fingerprint": state.fingerprint}]


def _node_facts(state: State, call: Call) -> dict[str, Any]:
    """How the node does only for those who may know."""
    entry = {"id": f"node/{state.name}", "node": state.name, "type": "node", "status": "online"}
    if not state.allows(call.actor, f"/nodes/{state.name}", "Sys.Audit"):
        return entry
    return {**entry, "level": "", **host.load(state.home)}


def status(state: State, _call: Call) -> list[dict[str, Any]]:
    entry = {"id": f"node/{state.name}", "type": "node", "name": state.name, "ip": state.address, "level": ""}
    return [{**entry, "local": 1, "nodeid": 0, "online": 1}]


def resources(state: State, call: Call) -> list[dict[str, Any]]:
    """What the caller may see of pools, VMs, the node, its storages and networks, at once: a real cluster lags."""
    wanted = call.get("type")
    found: list[dict[str, Any]] = []
    if wanted is None:
        found += [{"id": f"/pool/{pool}", "pool": pool, "type": "pool"} for pool in _visible_pools(state, call)]
    if wanted in (None, "vm"):
        found += _vm_resources(state, call)
    if wanted in (None, "node"):
        facts = _node_facts(state, call)
        found.append({**facts, "cgroup-mode": 2} if "level" in facts else facts)
    if wanted in (None, "storage"):
        found += [
            _storage_resource(state, storage)
            for storage in state.disks.statuses()
            if state.allows(call.actor, f"/storage/{storage['storage']}", "Datastore.Audit")
        ]
    if wanted in (None, "sdn") and state.allows(call.actor, f"/sdn/zones/{ZONE}", "SDN.Audit"):
        place = {"id": f"network/{state.name}/zone/{ZONE}", "node": state.name, "type": "network"}
        found.append({**place, "network": ZONE, "network-type": "zone", "status": "ok"})
    return found


def _visible_pools(state: State, call: Call) -> list[str]:
    return [pool for pool in sorted(state.access.pools()) if state.allows(call.actor, f"/pool/{pool}", "Pool.Audit")]


def _vm_resources(state: State, call: Call) -> list[dict[str, Any]]:
    pools = {vmid: pool for pool in _visible_pools(state, call) for vmid in state.access.pools()[pool].vms}
    return [
        _vm_resource(state, vm, pools.get(vm["vmid"]))
        for vm in vms.facts_of_all(state)
        if state.allows(call.actor, f"/vms/{vm['vmid']}", "VM.Audit")
    ]


def _vm_resource(state: State, vm: dict[str, Any], pool: str | None) -> dict[str, Any]:
    kept = {key: value for key, value in vm.items() if key not in ("cpus", "serial", "pid", "qmpstatus")}
    place: dict[str, Any] = {"id": f"qemu/{vm['vmid']}", "type": "qemu", "node": state.name, "maxcpu": vm["cpus"]}
    if pool is not None:
        place["pool"] = pool
    read, written = state.sampler.disk_bytes(vm["vmid"])
    return {"template": 0, "diskread": read, "diskwrite": written, **kept, **place}


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
    """The lowest free vmid of the range in the options, a string; nothing is reserved. A given one is only checked."""
    wanted = call.get("vmid")
    if wanted is not None:
        if state.configs.exists(wanted):
            raise faulty({"vmid": f"VM {wanted} already exists"})
        return str(wanted)
    taken = set(state.configs.vmids())
    lower, upper = datacenter.vmid_range(state.home)
    for vmid in range(lower, upper):
        if vmid not in taken:
            return str(vmid)
    raise Refusal(f"unable to get any free VMID in range [{lower}, {upper}]")


def not_backed_up(state: State, call: Call) -> list[dict[str, Any]]:
    """Every VM: there are no backup jobs on this node."""
    found: list[dict[str, Any]] = []
    for vmid in state.configs.vmids():
        config = state.configs.find(vmid)
        if config is not None and state.allows(call.actor, f"/vms/{vmid}", "VM.Audit"):
            name = {"name": config.values["name"]} if config.get("name") else {}
            found.append({"vmid": vmid, "type": "qemu", **name})
    return found


def backup_info_index(_state: State, _call: Call) -> list[dict[str, str]]:
    return [{"subdir": "not-backed-up"}]


def log(state: State, call: Call) -> list[dict[str, Any]]:
    """Begins and ends of tasks, newest first; those of others only with Sys.Syslog."""
    sees_all = state.allows(call.actor, "/", "Sys.Syslog")
    tasks = [*state.tasks.running(), *state.tasks.finished()]
    entries = [entry for task in tasks if sees_all or task.upid.user == call.actor.name for entry in _log_entries(task)]
    entries.sort(key=lambda entry: entry["time"])
    for number, entry in enumerate(entries, 1):
        entry |= {"uid": number, "id": f"{number}:{state.name}"}
    entries.reverse()
    return entries[: call.get("max")]


def _log_entries(task: Task) -> list[dict[str, Any]]:
    upid = task.upid
    base = {"node": upid.node, "pid": upid.pid, "user": upid.user, "tag": "pvedaemon"}
    began = {**base, "time": upid.starttime, "pri": _INFO, "msg": f"starting task {upid}"}
    if task.status is None:
        return [began]
    went_well = task.status == "OK" or task.status.startswith("WARNINGS")
    ended = {"time": task.endtime, "pri": _INFO if went_well else _ERROR, "msg": f"end task {upid} {task.status}"}
    return [began, {**base, **ended}]


def config_index(_state: State, _call: Call) -> list[dict[str, str]]:
    return [{"name": "qdevice"}]


def quorum_device(_state: State, _call: Call) -> dict[str, Any]:
    """None: a single node needs no vote."""
    return {}


def jobs_index(_state: State, _call: Call) -> list[dict[str, str]]:
    return [{"subdir": "realm-sync"}]


def mapping_index(_state: State, _call: Call) -> list[dict[str, str]]:
    return [{"name": name} for name in ("dir", "pci", "usb")]


def network_index(_state: State, _call: Call) -> list[dict[str, str]]:
    return [{"id": name} for name in ("vnets", "zones")]


def replication_job(_state: State, call: Call) -> None:
    raise Refusal(f"no such replication job '{call['id']}'")
