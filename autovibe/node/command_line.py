"""From a VM's config to QEMU's argv: what each key of the config becomes as a device.

Keys and option strings are Proxmox's (`scsi0: local:…,discard=on`, `net0: virtio=BC:24:…,bridge=vmbr0`). A value that
reaches QEMU goes through a pattern or into JSON, so a config cannot smuggle an option in.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from autovibe.node.cloudinit import parse_ipconfig
from autovibe.node.volume import format_of

NIC_MODELS = {
    "virtio": "virtio-net-pci",
    "e1000": "e1000",
    "e1000e": "e1000e",
    "rtl8139": "rtl8139",
    "vmxnet3": "vmxnet3",
}
SCSI_CONTROLLERS = {
    "lsi": "lsi53c895a",
    "lsi53c810": "lsi53c810",
    "megasas": "megasas",
    "pvscsi": "pvscsi",
    "virtio-scsi-pci": "virtio-scsi-pci",
    "virtio-scsi-single": "virtio-scsi-pci",
}
_DRIVE = re.compile(r"(ide|sata|scsi|virtio)(\d{1,2})")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


class ConfigError(Exception):
    """The config asks for something QEMU cannot be given."""


class Places(NamedTuple):
    """Where a VM's sockets and files lie."""

    pid: Path
    qmp: Path
    agent: Path


def build(
    vmid: int,
    config: Mapping[str, str],
    drives: Mapping[str, Path],
    places: Places,
    *,
    accel: str,
    forward: tuple[str, int],
) -> list[str]:
    """The whole argv. `forward` is the host address and port that lead to port 22 of the guest's first card."""
    order = _boot_order(config, drives)
    argv = ["qemu-system-x86_64", "-name", f"vm-{vmid}", "-no-user-config", "-nodefaults"]
    argv += ["-machine", f"{machine(config)},usb=off", *_accel(accel)]
    argv += ["-smp", f"{cpus(config)},sockets={_int(config, 'sockets', 1)},cores={_int(config, 'cores', 1)},threads=1"]
    argv += ["-m", f"{_memory(config)}M", *_identity(config)]
    argv += ["-display", "none", "-vga", "none" if "serial" in config.get("vga", "") else "std", "-rtc", "base=utc"]
    argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    argv += [
        "-chardev",
        f"socket,id=qmp,path={_path(places.qmp)},server=on,wait=off",
        "-mon",
        "chardev=qmp,mode=control",
    ]
    argv += ["-chardev", "ringbuf,id=console,size=262144", "-serial", "chardev:console"]
    argv += ["-device", "virtio-serial-pci,id=channels"]
    argv += ["-chardev", f"socket,id=agent,path={_path(places.agent)},server=on,wait=off"]
    argv += ["-device", "virtserialport,bus=channels.0,chardev=agent,name=org.qemu.guest_agent.0"]
    argv += ["-object", "rng-random,id=random,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=random"]
    for key in sorted(drives, key=_natural):
        argv += _drive(key, drives[key], config, order)
    for key in sorted((key for key in config if re.fullmatch(r"net\d+", key)), key=_natural):
        argv += _nic(key, config, order, forward)
    return [*argv, "-pidfile", str(places.pid)]


def machine(config: Mapping[str, str]) -> str:
    return "q35" if "q35" in config.get("machine", "") else "pc"


def cpus(config: Mapping[str, str]) -> int:
    return _int(config, "sockets", 1) * _int(config, "cores", 1)


def options(text: str) -> dict[str, str]:
    """An option string as a mapping; what stands first without a key (a volid) is under ''."""
    first, _, rest = text.partition(",")
    key, equals, value = first.partition("=")
    found = {key: value} if equals and re.fullmatch(r"[a-z0-9-]+", key) else {"": first}
    return found | dict(part.split("=", 1) for part in rest.split(",") if "=" in part)


def _accel(accel: str) -> list[str]:
    if accel == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    # QEMU's own bound on translated code is 1 GiB a VM; Debian boots as fast with 256 MiB.
    return ["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max"]


def _identity(config: Mapping[str, str]) -> Iterator[str]:
    uuid = options(config.get("smbios1", "")).get("uuid", "")
    if _UUID.fullmatch(uuid):
        yield from ("-uuid", uuid, "-smbios", f"type=1,uuid={uuid}")
    if _UUID.fullmatch(config.get("vmgenid", "")):
        yield from ("-device", f"vmgenid,guid={config['vmgenid']}")


# Drives


def _drive(key: str, path: Path, config: Mapping[str, str], order: Mapping[str, int]) -> Iterator[str]:
    match = _DRIVE.fullmatch(key)
    if match is None:
        raise ConfigError(f"unable to parse drive '{key}'")
    bus, index = match[1], int(match[2])
    chosen = options(config.get(key, ""))
    is_cdrom = chosen.get("media") == "cdrom"
    node = {
        "driver": format_of(path),
        "node-name": f"drive-{key}",
        "read-only": is_cdrom or chosen.get("ro") == "1",
        "discard": "unmap" if chosen.get("discard") == "on" else "ignore",
        "file": {"driver": "file", "filename": str(path)},
    }
    yield from ("-blockdev", json.dumps(node))
    device: dict[str, Any] = {"id": key, "drive": f"drive-{key}"}
    if key in order:
        device["bootindex"] = order[key]
    if "serial" in chosen:
        device["serial"] = chosen["serial"][:20]
    controller, place = _bus(bus, index, is_cdrom, config)
    yield from controller
    yield from ("-device", json.dumps(place | device))


def _bus(bus: str, index: int, is_cdrom: bool, config: Mapping[str, str]) -> tuple[list[str], dict[str, Any]]:
    """The controller a drive needs before it (none where an earlier drive brought it), and the drive's place on it."""
    kind = "cd" if is_cdrom else "hd"
    if bus == "virtio":
        return [], {"driver": "virtio-blk-pci"}
    if bus == "ide" and machine(config) == "pc":
        return [], {"driver": f"ide-{kind}", "bus": f"ide.{index // 2}", "unit": index % 2}
    if bus == "ide":
        return [], {"driver": f"ide-{kind}", "bus": f"ide.{index}"}
    if bus == "sata":
        return _once("ahci,id=ahci0", index, config, "sata"), {"driver": f"ide-{kind}", "bus": f"ahci0.{index}"}
    hardware = config.get("scsihw", "lsi")
    if hardware not in SCSI_CONTROLLERS:
        raise ConfigError(f"unknown scsihw '{hardware}'")
    if hardware == "virtio-scsi-single":
        controller = ["-device", f"{SCSI_CONTROLLERS[hardware]},id=scsihw{index}"]
        return controller, {"driver": f"scsi-{kind}", "bus": f"scsihw{index}.0", "scsi-id": 0, "lun": index}
    name = f"{SCSI_CONTROLLERS[hardware]},id=scsihw0"
    return _once(name, index, config, "scsi"), {"driver": f"scsi-{kind}", "bus": "scsihw0.0", "scsi-id": index % 7}


def _once(device: str, index: int, config: Mapping[str, str], bus: str) -> list[str]:
    lowest = min(int(match[2]) for key in config if (match := _DRIVE.fullmatch(key)) and match[1] == bus)
    return ["-device", device] if index == lowest else []


def _boot_order(config: Mapping[str, str], drives: Mapping[str, Path]) -> dict[str, int]:
    """`boot: order=scsi0;net0`, or where it says nothing: disks, then discs."""
    listed = options(config.get("boot", "")).get("order")
    names = listed.split(";") if listed else sorted(drives, key=lambda key: ("media=cdrom" in config[key], key))
    return {name: position for position, name in enumerate(names, 1) if name in drives or name in config}


# Network cards


def _nic(key: str, config: Mapping[str, str], order: Mapping[str, int], forward: tuple[str, int]) -> Iterator[str]:
    """User networking: no root, no bridge; the guest reaches out, and only its SSH port can be reached."""
    chosen = options(config[key])
    model = next((name for name in NIC_MODELS if name in chosen), None) or chosen.get("model", chosen.get("", ""))
    if model not in NIC_MODELS:
        raise ConfigError(f"{key}: unsupported network card '{model}'")
    index = int(key[3:])
    network = {"type": "user", "id": key, "ipv6": False, **_subnet(config.get(f"ipconfig{index}", ""))}
    guest = network.get("dhcpstart", "")
    if index == 0:
        network["hostfwd"] = [{"str": f"tcp:{forward[0]}:{forward[1]}-{guest}:22"}]
    yield from ("-netdev", json.dumps(network))
    device: dict[str, Any] = {"driver": NIC_MODELS[model], "id": f"nic{index}", "netdev": key}
    mac = chosen.get(model) or chosen.get("macaddr")
    if mac:
        if not re.fullmatch(r"([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}", mac):
            raise ConfigError(f"{key}: invalid MAC address '{mac}'")
        device["mac"] = mac
    if key in order:
        device["bootindex"] = order[key]
    yield from ("-device", json.dumps(device))


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


# Values


def _memory(config: Mapping[str, str]) -> int:
    text = str(config.get("memory", "512"))
    return int(options(text).get("current", text))


def _int(config: Mapping[str, str], key: str, default: int) -> int:
    return int(config.get(key, default))


def _path(path: Path) -> str:
    return str(path).replace(",", ",,")


def _natural(key: str) -> tuple[str, int]:
    return key.rstrip("0123456789"), int(re.sub(r"\D", "", key) or 0)
