"""A VM's processors and memory as QEMU is told: model and flags, topology, NUMA nodes, scheduling on the host."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping

from autovibe.node.vm.devices import ConfigError, is_q35, options

_V2 = "+popcnt,+pni,+sse4.1,+sse4.2,+ssse3"
_V3 = f"{_V2},+aes,+avx,+avx2,+bmi1,+bmi2,+f16c,+fma,+abm,+movbe,+xsave"
_LEVELS = {
    "x86-64-v2": f"qemu64,{_V2}",
    "x86-64-v2-AES": f"qemu64,{_V2},+aes",
    "x86-64-v3": f"qemu64,{_V3}",
    "x86-64-v4": f"qemu64,{_V3},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl",
}
"""Proxmox's own names for the levels of the x86-64 ABI (CPUConfig.pm), which QEMU does not know."""

_DEFAULT_UNITS = 100


def accelerator(config: Mapping[str, str], accel: str) -> str:
    """KVM where the node has it and the VM does not decline it."""
    return "tcg" if config.get("kvm") == "0" else accel


def model(config: Mapping[str, str], accel: str) -> str:
    """QEMU's `-cpu`. Without a choice of the VM's it is all the accelerator can do, as in `host`."""
    if running := config.get("runningcpu"):
        return running
    text = config.get("cpu", "")
    chosen = options(text)
    name = chosen.get("cputype", chosen.get("", ""))
    if name.startswith("custom-"):
        raise ConfigError(f"custom cputype '{name.removeprefix('custom-')}' not found")
    best = "host" if accel == "kvm" else "max"
    found = best if name in ("", "host", "max") else _LEVELS.get(name, name)
    found += "".join(f",{flag}" for flag in chosen.get("flags", "").split(";") if flag)
    if chosen.get("hidden") == "1":
        found += ",kvm=off"
    return found


def topology(config: Mapping[str, str]) -> str:
    """QEMU's `-smp`: `vcpus` of all sockets' cores are there at the start, the others can be plugged in."""
    sockets, cores = number(config, "sockets", 1), number(config, "cores", 1)
    present = number(config, "vcpus", sockets * cores)
    if present > sockets * cores:
        raise ConfigError("MAX VCPUS is smaller than the number of vcpus")
    return f"{present},sockets={sockets},cores={cores},threads=1,maxcpus={sockets * cores}"


def machine(config: Mapping[str, str]) -> str:
    """The machine's type. `+pve0` is a revision that only Proxmox's own QEMU has."""
    if running := config.get("runningmachine"):
        return running
    chosen = options(config.get("machine", ""))
    found = re.sub(r"(\+pve\d+)?(\.pxe)?$", "", chosen.get("type", chosen.get("", ""))) or "pc"
    if found.startswith("virt") or config.get("arch", "x86_64") != "x86_64":
        raise ConfigError("this node runs guests of the architecture x86_64 only")
    return found


def machine_properties(config: Mapping[str, str]) -> str:
    found = f"{machine(config)},usb=off"
    if config.get("acpi") == "0":
        found += ",acpi=off"
    if config.get("tdf") == "1":
        found += ",hpet=off"
    return found


def bridges(keys: set[str], config: Mapping[str, str]) -> Iterator[str]:
    """The PCI buses beyond the first, where something sits on one of them; q35's first bus is itself one of them."""
    if is_q35(config):
        yield "pcie-pci-bridge,id=pcidmi,bus=pcie.0,addr=0x1e"
        yield "pci-bridge,id=pci.0,chassis_nr=1,bus=pcidmi,addr=0x1"
    numbers = {"pci.1": 2, "pci.2": 3, "pci.3": 4}
    slots = {"pci.1": "0x1e", "pci.2": "0x1f", "pci.3": "0x5"}
    for bus in sorted(keys & numbers.keys()):
        yield f"pci-bridge,id={bus},chassis_nr={numbers[bus]},bus=pci.0,addr={slots[bus]}"


def numa(config: Mapping[str, str]) -> Iterator[str]:
    """NUMA nodes as `numaN` says, or with `numa: 1` one a socket."""
    if config.get("numa") != "1":
        return
    memory, cores = memory_mb(config), number(config, "cores", 1)
    nodes = [options(config[key]) for key in (f"numa{index}" for index in range(8)) if key in config]
    if not nodes:
        sockets = number(config, "sockets", 1)
        share = memory // sockets
        nodes = [
            {"cpus": f"{index * cores}-{(index + 1) * cores - 1}", "memory": str(share)} for index in range(sockets)
        ]
        nodes[-1]["memory"] = str(memory - share * (sockets - 1))
    if sum(int(float(node.get("memory", 0))) for node in nodes) != memory:
        raise ConfigError("total memory for NUMA nodes must be equal to vm static memory")
    for index, node in enumerate(nodes):
        if "hostnodes" in node:
            raise ConfigError(f"numa{index}: this node cannot bind a guest's memory to nodes of the host")
        yield from ("-object", f"memory-backend-ram,id=ram-node{index},size={int(float(node['memory']))}M")
        cpus = "".join(f",cpus={each}" for each in node["cpus"].split(";"))
        yield from ("-numa", f"node,nodeid={index}{cpus},memdev=ram-node{index}")


def scheduling(config: Mapping[str, str]) -> Iterator[str]:
    """What runs QEMU with a smaller share of the host's processors, or on some of them only: no root is needed.

    `cpuunits` below the default become niceness; more than it, and `cpulimit`, need control groups.
    """
    units = number(config, "cpuunits", _DEFAULT_UNITS)
    if units < _DEFAULT_UNITS:
        yield from ("nice", "-n", str(next(nice for nice in range(1, 20) if nice == 19 or 1.25**-nice * 100 <= units)))
    if affinity := config.get("affinity", "").strip():
        if shutil.which("taskset") is None:
            raise ConfigError("affinity: 'taskset' is not installed; run: apt install util-linux")
        yield from ("taskset", "--cpu-list", affinity)


def memory_mb(config: Mapping[str, str]) -> int:
    text = str(config.get("memory", "512"))
    return int(options(text).get("current", text))


def number(config: Mapping[str, str], key: str, default: int) -> int:
    return int(config.get(key, default))
