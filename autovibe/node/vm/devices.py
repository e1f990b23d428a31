"""What a drive or a network card of a config is to QEMU: backend and device, for the command line and QMP alike.

A device's id and its PCI or SCSI address are a function of its key alone, as in Proxmox (net0 is slot 18 of bus 0,
scsi3 is LUN 3): saved RAM, hotplug and the names a guest gives its cards depend on it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from autovibe.node.disks.volume import format_of
from autovibe.node.vm.cloudinit import parse_ipconfig

Properties = dict[str, Any]
"""A device or backend as QMP takes it; on the command line the same as JSON."""

NIC_MODELS = {
    "virtio": "virtio-net-pci",
    "e1000": "e1000",
    "e1000-82540em": "e1000",
    **{
        name: name for name in ("e1000-82544gc", "e1000-82545em", "e1000e", "i82551", "i82557b", "i82559er", "ne2k_isa")
    },
    **{name: name for name in ("ne2k_pci", "pcnet", "rtl8139", "vmxnet3")},
}
SCSI_CONTROLLERS = {
    "lsi": "lsi53c895a",
    "lsi53c810": "lsi53c810",
    "megasas": "megasas",
    "pvscsi": "pvscsi",
    "virtio-scsi-pci": "virtio-scsi-pci",
    "virtio-scsi-single": "virtio-scsi-pci",
}
_KEY = re.compile(r"(ide|sata|scsi|virtio|net)(\d{1,2})")
_LUNS_OF_LSI = 7


class ConfigError(Exception):
    """The config asks for something QEMU cannot be given."""


# Places


def place(name: str) -> Properties:
    """Bus and slot of a PCI device: of a net or virtio key, of a controller or a fixed device by its id."""
    number = int(re.sub(r"\D", "", name) or 0)
    kind = name.rstrip("0123456789")
    match kind:
        case "net":
            bus, slot = ("pci.0", 18 + number) if number < 6 else ("pci.1", number - 5)
        case "virtio":
            bus, slot = ("pci.0", 10 + number) if number < 6 else ("pci.2", number - 5)
        case "scsihw":
            bus, slot = ("pci.0", 5 + number) if number < 2 else ("pci.2", 10 + number)
        case "virtioscsi":
            bus, slot = "pci.3", 1 + number
        case _:
            bus, slot = _FIXED[name]
    return {"bus": bus, "addr": f"0x{slot:x}"}


_FIXED = {
    "balloon0": ("pci.0", 3), "watchdog0": ("pci.0", 4), "ahci0": ("pci.0", 7),
    "channels": ("pci.0", 8), "rng0": ("pci.0", 9), "pci.1": ("pci.0", 30), "pci.2": ("pci.0", 31),
    "pci.3": ("pci.0", 5), "audio0": ("pci.1", 27), "xhci": ("pci.1", 28),
}  # fmt: skip


def split_key(key: str) -> tuple[str, int]:
    match = _KEY.fullmatch(key)
    if match is None:
        raise ConfigError(f"unable to parse drive '{key}'")
    return match[1], int(match[2])


def is_q35(config: Mapping[str, str]) -> bool:
    return "q35" in (config.get("runningmachine") or config.get("machine", ""))


def options(text: str) -> dict[str, str]:
    """An option string as a mapping; what stands first without a key (a volid) is under ''."""
    first, _, rest = text.partition(",")
    key, equals, value = first.partition("=")
    found = {key: value} if equals and re.fullmatch(r"[a-z0-9-]+", key) else {"": first}
    return found | dict(part.split("=", 1) for part in rest.split(",") if "=" in part)


# Drives


def controller(key: str, config: Mapping[str, str]) -> Properties | None:
    """The controller a drive sits on; None where the machine has it anyway, or the drive is a card of its own."""
    bus, index = split_key(key)
    if bus == "sata":
        return {"driver": "ahci", "id": "ahci0", **place("ahci0")}
    if bus != "scsi":
        return None
    name = _scsi_controller(index, config)
    hardware = config.get("scsihw", "lsi")
    found: Properties = {"driver": SCSI_CONTROLLERS[hardware], "id": name, **place(name)}
    chosen = options(config.get(key, ""))
    if hardware == "virtio-scsi-single":
        if "queues" in chosen:
            found["num_queues"] = int(chosen["queues"])
        if chosen.get("iothread") == "1":
            found["iothread"] = f"iothread-{name}"
    return found


def _scsi_controller(index: int, config: Mapping[str, str]) -> str:
    hardware = config.get("scsihw", "lsi")
    if hardware not in SCSI_CONTROLLERS:
        raise ConfigError(f"unknown scsihw '{hardware}'")
    if hardware == "virtio-scsi-single":
        return f"virtioscsi{index}"
    return f"scsihw{index // _LUNS_OF_LSI if hardware.startswith('lsi') else 0}"


def drive_node(key: str, path: Path, chosen: Mapping[str, str]) -> Properties:
    """The block node of a drive's file."""
    discards = chosen.get("discard") == "on"
    node: Properties = {
        "driver": format_of(path),
        "node-name": f"drive-{key}",
        "read-only": chosen.get("media") == "cdrom" or chosen.get("ro") == "1",
        "discard": "unmap" if discards else "ignore",
        "file": {"driver": "file", "filename": str(path)},
    }
    if chosen.get("cache") == "unsafe":
        node["cache"] = {"no-flush": True}
    if chosen.get("detect_zeroes") == "1":
        node["detect-zeroes"] = "unmap" if discards else "on"
    return node


def drive_device(key: str, config: Mapping[str, str], order: Mapping[str, int], *, has_medium: bool) -> Properties:
    """The drive as the guest sees it; a disc drive may be empty."""
    bus, index = split_key(key)
    chosen = options(config.get(key, ""))
    is_disc = chosen.get("media") == "cdrom"
    device: Properties = {**_seat(bus, index, is_disc, config), "id": key}
    if has_medium:
        device["drive"] = f"drive-{key}"
    if key in order:
        device["bootindex"] = order[key]
    if not is_disc:
        device |= _disk_traits(bus, key, chosen)
    return device


def _seat(bus: str, index: int, is_disc: bool, config: Mapping[str, str]) -> Properties:
    kind = "cd" if is_disc else "hd"
    if bus == "virtio":
        return {"driver": "virtio-blk-pci", **place(f"virtio{index}")}
    if bus == "ide" and is_q35(config):
        return {"driver": f"ide-{kind}", "bus": f"ide.{index}"}
    if bus == "ide":
        return {"driver": f"ide-{kind}", "bus": f"ide.{index // 2}", "unit": index % 2}
    if bus == "sata":
        return {"driver": f"ide-{kind}", "bus": f"ahci0.{index}"}
    name = _scsi_controller(index, config)
    if config.get("scsihw", "lsi").startswith("virtio"):
        return {"driver": f"scsi-{kind}", "bus": f"{name}.0", "channel": 0, "scsi-id": 0, "lun": index}
    return {"driver": f"scsi-{kind}", "bus": f"{name}.0", "scsi-id": index % _LUNS_OF_LSI if "lsi" in name else index}


def _disk_traits(bus: str, key: str, chosen: Mapping[str, str]) -> Properties:
    device: Properties = {}
    if "serial" in chosen:
        device["serial"] = unquote(chosen["serial"])[:20]
    if "wwn" in chosen:
        device["wwn"] = int(chosen["wwn"], 16)
    if chosen.get("ssd") == "1":
        device["rotation_rate"] = 1
    for name in ("model", "product", "vendor"):
        if name in chosen:
            text = unquote(chosen[name])
            device["product" if bus == "scsi" and name == "product" else name] = text
    if bus == "virtio" and chosen.get("iothread") == "1":
        device["iothread"] = f"iothread-{key}"
    if chosen.get("cache") in ("writethrough", "directsync"):
        device["write-cache"] = "off"
    for name in ("rerror", "werror"):
        if name in chosen:
            device[name] = chosen[name]
    return device


def throttle(chosen: Mapping[str, str]) -> Properties:
    """A drive's limits as `block_set_io_throttle` takes them: bytes and operations a second, 0 for none."""
    found: Properties = {}
    for name in ("", "_rd", "_wr"):
        megabytes = float(chosen.get(f"mbps{name}", 0))
        bursts = float(chosen.get(f"mbps{name}_max", 0))
        found[f"bps{name}"] = int(chosen.get(f"bps{name}", 0)) or int(megabytes * 1024 * 1024)
        found[f"iops{name}"] = int(chosen.get(f"iops{name}", 0))
        found |= _burst(f"bps{name}", int(bursts * 1024 * 1024), chosen)
        found |= _burst(f"iops{name}", int(chosen.get(f"iops{name}_max", 0)), chosen)
    return found


def _burst(name: str, most: int, chosen: Mapping[str, str]) -> Properties:
    length = {f"{name}_max_length": int(chosen.get(f"{name}_max_length", 1))} if most else {}
    return {f"{name}_max": most, **length} if most else {}


# Network cards


def model_of(text: str) -> str:
    """The model of a net string, which may stand as its first key."""
    chosen = options(text)
    return next((name for name in NIC_MODELS if name in chosen), None) or chosen.get("model", chosen.get("", ""))


def netdev(key: str, config: Mapping[str, str], forward: tuple[str, int], *, is_restricted: bool = False) -> Properties:
    """User networking: no root, no bridge; the guest reaches out, and only the first card's SSH port can be reached.

    On a card with `firewall=1` a restricted guest does not reach out; its SSH port can still be reached.
    """
    index = int(key[3:])
    network: Properties = {"type": "user", "id": key, "ipv6": False, **_subnet(config.get(f"ipconfig{index}", ""))}
    if index == 0:
        guest = network.get("dhcpstart", "")
        network["hostfwd"] = [{"str": f"tcp:{forward[0]}:{forward[1]}-{guest}:22"}]
    if is_restricted and options(config[key]).get("firewall") == "1":
        network["restrict"] = True
    return network


def nic_device(key: str, config: Mapping[str, str], order: Mapping[str, int]) -> Properties:
    chosen, model = options(config[key]), model_of(config[key])
    if model not in NIC_MODELS:
        raise ConfigError(f"{key}: unsupported network card '{model}'")
    device: Properties = {"driver": NIC_MODELS[model], "id": key, "netdev": key}
    if model != "ne2k_isa":
        device |= place(key)
    mac = chosen.get(model) or chosen.get("macaddr")
    if mac:
        if not re.fullmatch(r"([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}", mac):
            raise ConfigError(f"{key}: invalid MAC address '{mac}'")
        device["mac"] = mac
    if key in order:
        device["bootindex"] = order[key]
    if model == "virtio" and int(chosen.get("mtu", "1")) > 1:
        device["host_mtu"] = int(chosen["mtu"])
    return device


def _subnet(ipconfig: str) -> dict[str, str]:
    """The user network in which a guest's static address is right; {} (10.0.2.0/24, DHCP) where it has none."""
    ip = parse_ipconfig(ipconfig)
    try:
        guest = ipaddress.IPv4Interface(ip.get("ip", ""))
        gateway = ipaddress.IPv4Address(ip["gw"]) if "gw" in ip else None
    except ValueError:
        return {}
    if guest.network.prefixlen > 29 or guest.ip not in guest.network:
        return {}
    spare = (each for each in guest.network.hosts() if each not in (guest.ip, gateway))
    host = gateway if gateway in guest.network else next(spare)
    return {"net": str(guest.network), "host": str(host), "dns": str(next(spare)), "dhcpstart": str(guest.ip)}


def boot_order(config: Mapping[str, str], present: Mapping[str, Path]) -> dict[str, int]:
    """`boot: order=scsi0;net0`, or where it says nothing: disks, then discs."""
    listed = options(config.get("boot", "")).get("order")
    disks = [key for key in present if key not in ("efidisk0", "tpmstate0")]
    names = listed.split(";") if listed else sorted(disks, key=lambda key: ("media=cdrom" in config[key], key))
    return {name: position for position, name in enumerate(names, 1) if name in present or name in config}
