"""What a VM is and how it is: lists, status, index."""

from __future__ import annotations

import functools
import time
from typing import Any

import psutil

from autovibe.node.schema.options import typed
from autovibe.node.schema.parameters import split_properties
from autovibe.node.schema.property_strings import MEMORY, VGA
from autovibe.node.state import Call, State, is_agent_enabled
from autovibe.node.vm import drives, usage
from autovibe.node.vm.vmconfig import Config

_CHILDREN = (
    "agent", "clone", "cloudinit", "config", "feature", "firewall", "migrate", "monitor", "move_disk", "pending",
    "resize", "rrddata", "sendkey", "snapshot", "status", "template", "termproxy", "unlink", "vncproxy", "vncwebsocket",
)  # fmt: skip


def index(state: State, call: Call) -> list[dict[str, str]]:
    state.configs.load(call.vmid)
    return [{"subdir": name} for name in _CHILDREN]


def status_index(state: State, call: Call) -> list[dict[str, str]]:
    state.configs.load(call.vmid)
    return [{"subdir": name} for name in ("current", "start", "stop", "shutdown", "reboot", "reset", "suspend")]


def list_all(state: State, call: Call) -> list[dict[str, Any]]:
    """The VMs the caller may see, as the node's list shows them; `full` adds what QEMU itself says."""
    found = [vm for vm in facts_of_all(state) if state.allows(call.actor, f"/vms/{vm['vmid']}", "VM.Audit")]
    return [{**vm, **_told(state, vm)} for vm in found] if call.get("full") else found


def facts_of_all(state: State) -> list[dict[str, Any]]:
    configs = ((vmid, state.configs.find(vmid)) for vmid in state.configs.vmids())
    return [facts(state, vmid, config) for vmid, config in configs if config is not None]


def facts(state: State, vmid: int, config: Config) -> dict[str, Any]:
    """Bytes and seconds; `template`, `lock`, `tags`, `serial` and `pid` only where there is one."""
    is_running = state.qemu.is_running(vmid)
    sockets = int(config.get("sockets", "1"))
    found: dict[str, Any] = {
        "vmid": vmid,
        "name": config.get("name") or f"VM {vmid}",
        "status": "running" if is_running else "stopped",
        "cpus": int(config.get("vcpus") or int(config.get("cores", "1")) * sockets),
        "maxmem": memory_mb(config) << 20,
        "maxdisk": drives.boot_disk_size(config.values),
        **dict.fromkeys(("cpu", "mem", "memhost", "uptime", "disk", "netin", "netout"), 0),
    }
    if config.is_template:
        found["template"] = 1
    if any(key.startswith("serial") for key in config.values):
        found["serial"] = 1
    found |= {key: config.values[key] for key in ("lock", "tags") if config.get(key)}
    return found | _usage(state, vmid, found["cpus"]) if is_running else found


def memory_mb(config: Config) -> int:
    properties = split_properties(MEMORY, config.get("memory", "512"))
    return int(properties["current"])


def _usage(state: State, vmid: int, cpus: int) -> dict[str, Any]:
    """`cpu` is the share of all the VM's own processors."""
    pid, started = state.qemu.pid(vmid), state.qemu.started_at(vmid)
    if pid is None:
        return {}
    usage: dict[str, Any] = {"pid": pid, "uptime": int(time.time() - started) if started else 0}
    try:
        process = _process(pid, started)
        memory = process.memory_info().rss
        cpu = process.cpu_percent(None) / 100 / cpus
    except psutil.Error:  # it ended in this moment
        return usage
    return usage | {"mem": memory, "memhost": memory, "cpu": cpu}


@functools.lru_cache(maxsize=512)
def _process(pid: int, _started: float | None) -> psutil.Process:
    """The same object each time: the processor's use is counted from one call to the next."""
    return psutil.Process(pid)


def current(state: State, call: Call) -> dict[str, Any]:
    config = state.configs.load(call.vmid)
    found = facts(state, call.vmid, config)
    clipboard = split_properties(VGA, config.get("vga")).get("clipboard")
    found |= {"ha": {"managed": 0}, "clipboard": clipboard, **_told(state, found)}
    if is_agent_enabled(config):
        found["agent"] = 1
    return found


def _told(state: State, vm: dict[str, Any]) -> dict[str, Any]:
    """What QEMU says of itself. Its network cards are counted nowhere: user networking keeps no figures."""
    if vm["status"] != "running":
        return {"qmpstatus": "stopped"}
    found: dict[str, Any] = {"qmpstatus": "running", "diskread": 0, "diskwrite": 0, "nics": {}, "proxmox-support": {}}
    found |= state.qemu.status(vm["vmid"])
    if monitor := state.monitor(vm["vmid"]):
        found |= usage.of(monitor, vm["maxmem"])
    return found


def typed_values(values: dict[str, str]) -> dict[str, Any]:
    """A configuration as the API gives it: numbers as numbers, the password hidden."""
    found = {key: typed(key, text) for key, text in values.items() if key != "snapstate"}
    if "cipassword" in found:
        found["cipassword"] = "**********"
    return found
