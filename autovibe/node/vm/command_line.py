"""From a VM's config to QEMU's argv: what each key of the config becomes.

Keys and option strings are Proxmox's (`scsi0: local:…,discard=on`, `net0: virtio=BC:24:…,bridge=vmbr0`). A value that
reaches QEMU goes through a pattern or into JSON, so a config cannot smuggle an option in; only `args`, which root@pam
alone can set, is given as it stands.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from autovibe.node.vm import devices, firmware, processors, qemu_console
from autovibe.node.vm.devices import ConfigError, Properties, options

__all__ = ["ConfigError", "Places", "build", "options"]

_DRIVE = re.compile(r"(ide|sata|scsi|virtio)\d{1,2}")
_MACHINE = re.compile(r"(pc|q35|virt)[A-Za-z0-9.+-]*")
_CPU = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,+=-]*")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


class Places(NamedTuple):
    """Where a VM's sockets and files lie."""

    pid: Path
    qmp: Path
    agent: Path
    vnc: Path


def build(
    vmid: int,
    config: Mapping[str, str],
    drives: Mapping[str, Path],
    places: Places,
    *,
    accel: str,
    forward: tuple[str, int],
    is_restricted: bool = False,
) -> list[str]:
    """The whole argv. `forward` is the host address and port that lead to port 22 of the guest's first card.

    `is_restricted` is what the firewall says of the way out.
    """
    _refuse_missing(config)
    order = devices.boot_order(config, drives)
    argv = [*processors.scheduling(config), "qemu-system-x86_64"]
    argv += ["-name", f"vm-{vmid}", "-no-user-config", "-nodefaults"]
    argv += ["-machine", _fitting(_MACHINE, processors.machine_properties(config)), *_accel(config, accel)]
    argv += ["-smp", processors.topology(config), "-m", f"{processors.memory_mb(config)}M"]
    argv += [*processors.numa(config), *_identity(config), *firmware.arguments(config, drives)]
    argv += ["-rtc", _clock(config), *qemu_console.arguments(config, _path(places.vnc))]
    argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    argv += [
        "-chardev",
        f"socket,id=qmp,path={_path(places.qmp)},server=on,wait=off",
        "-mon",
        "chardev=qmp,mode=control",
    ]
    for bridge in processors.bridges(_buses(config), config):
        argv += ["-device", bridge]
    argv += _device({"driver": "virtio-serial-pci", "id": "channels", **devices.place("channels")})
    argv += ["-chardev", f"socket,id=agent,path={_path(places.agent)},server=on,wait=off"]
    port = {"driver": "virtserialport", "bus": "channels.0", "chardev": "agent", "name": "org.qemu.guest_agent.0"}
    argv += _device(port)  # as its bus: QEMU makes what is not in JSON first
    argv += [*_random(config), *_extras(config), *_drives(config, drives, order)]
    for key in sorted((key for key in config if re.fullmatch(r"net\d+", key)), key=_natural):
        argv += ["-netdev", json.dumps(devices.netdev(key, config, forward, is_restricted=is_restricted))]
        argv += _device(devices.nic_device(key, config, order))
    return [*argv, *shlex.split(config.get("args", "")), "-pidfile", str(places.pid)]


def _refuse_missing(config: Mapping[str, str]) -> None:
    """What this node can hold in a config, and has nothing to make it of."""
    for key, text in config.items():
        kind = key.rstrip("0123456789")
        if kind in ("hostpci", "usb", "parallel", "virtiofs") or (kind == "serial" and text != "socket"):
            raise ConfigError(f"{key}: this node hands no hardware of the host to guests")
        if key in ("amd-sev", "intel-tdx", "hugepages", "ivshmem", "tpmstate0"):
            raise ConfigError(f"{key}: this node has no {_MISSING[key]}")
        if key == "hookscript":
            raise ConfigError(f"hookscript: this node does not run '{text}' on its host")
        if _DRIVE.fullmatch(key) and options(text).get("snapshot") == "1":
            raise ConfigError(f"{key}: drives whose changes are dropped (snapshot=1) are not supported")
        if _DRIVE.fullmatch(key) and options(text).get("scsiblock") == "1":
            raise ConfigError(f"{key}: this node hands no hardware of the host to guests")


_MISSING = {
    "amd-sev": "encrypted memory",
    "intel-tdx": "trust domains",
    "hugepages": "huge pages",
    "ivshmem": "memory that guests share",
    "tpmstate0": "TPM emulator",
}


def _accel(config: Mapping[str, str], accel: str) -> list[str]:
    accel = processors.accelerator(config, accel)
    cpu = _fitting(_CPU, processors.model(config, accel))
    if accel == "kvm":
        return ["-accel", "kvm", "-cpu", cpu]
    # QEMU's own bound on translated code is 1 GiB a VM; Debian boots as fast with 256 MiB.
    return ["-accel", "tcg,thread=multi,tb-size=256", "-cpu", cpu]


def _fitting(pattern: re.Pattern[str], text: str) -> str:
    head = text.partition(",usb=")[0]
    if not pattern.fullmatch(head):
        raise ConfigError(f"invalid argument '{head}'")
    return text


def _identity(config: Mapping[str, str]) -> Iterator[str]:
    smbios = options(config.get("smbios1", ""))
    uuid = smbios.get("uuid", "")
    if _UUID.fullmatch(uuid):
        yield from ("-uuid", uuid)
    if table := _smbios(smbios):
        yield from ("-smbios", f"type=1,{table}")
    if _UUID.fullmatch(config.get("vmgenid", "")):
        yield from ("-device", f"vmgenid,guid={config['vmgenid']}")


def _smbios(given: Mapping[str, str]) -> str:
    found = {}
    for key in ("uuid", "manufacturer", "product", "version", "serial", "sku", "family"):
        if text := given.get(key):
            found[key] = firmware.decode(text) if given.get("base64") == "1" and key != "uuid" else text
    return ",".join(f"{key}={text.replace(',', ',,')}" for key, text in found.items())


def _clock(config: Mapping[str, str]) -> str:
    start = config.get("startdate", "now")
    if start != "now":
        day, _, time = start.partition("T")
        date = "-".join(part.zfill(2) for part in day.split("-"))
        return f"base={date}T" + (":".join(part.zfill(2) for part in time.split(":")) if time else "00:00:00")
    is_windows = config.get("ostype", "").startswith("w")
    return "base=localtime" if config.get("localtime", "1" if is_windows else "0") == "1" else "base=utc"


# Fixed devices


def _buses(config: Mapping[str, str]) -> set[str]:
    """The PCI buses something of the config sits on. That of single SCSI controllers is there for later disks too."""
    found = {devices.place(key)["bus"] for key in config if re.fullmatch(r"(net|virtio)\d+", key)}
    if config.get("scsihw") == "virtio-scsi-single":
        found.add("pci.3")
    for key in config:
        if key.startswith("scsi") and _DRIVE.fullmatch(key) and (controller := devices.controller(key, config)):
            found.add(controller["bus"])
    if config.get("tablet") == "1" or "audio0" in config:
        found.add("pci.1")
    return found


def _random(config: Mapping[str, str]) -> Iterator[str]:
    """A source of random numbers, which each guest has: without one its first boot may wait long."""
    chosen = options(config.get("rng0", ""))
    source = chosen.get("source", chosen.get("", "")) or "/dev/urandom"
    if source == "/dev/hwrng":
        raise ConfigError("rng0: this node hands no hardware of the host to guests")
    yield from ("-object", f"rng-random,id=random,filename={source}")
    card: Properties = {"driver": "virtio-rng-pci", "id": "rng0", "rng": "random", **devices.place("rng0")}
    if "max_bytes" in chosen and chosen["max_bytes"] != "0":
        card |= {"max-bytes": int(chosen["max_bytes"]), "period": int(chosen.get("period", 1000))}
    yield from _device(card)


def _extras(config: Mapping[str, str]) -> Iterator[str]:
    if config.get("balloon") != "0":
        yield from _device({"driver": "virtio-balloon-pci", "id": "balloon0", **devices.place("balloon0")})
    if "watchdog" in config:
        chosen = options(config["watchdog"])
        kind = chosen.get("model", chosen.get("", "i6300esb"))
        spot = devices.place("watchdog0") if kind == "i6300esb" else {}
        yield from _device({"driver": kind, "id": "watchdog0", **spot})
        yield from ("-action", f"watchdog={chosen.get('action', 'reset')}")
    if config.get("tablet") == "1":
        yield from _device({"driver": "qemu-xhci", "id": "xhci", **devices.place("xhci")})
        yield from _device({"driver": "usb-tablet", "id": "tablet", "bus": "xhci.0", "port": "1"})
    if "audio0" in config:
        yield from _audio(options(config["audio0"])["device"])
    if keyboard := config.get("keyboard"):
        yield from ("-k", keyboard)
    if config.get("reboot") == "0":
        yield "-no-reboot"
    if config.get("freeze") == "1":
        yield "-S"


def _audio(device: str) -> Iterator[str]:
    """A sound card whose sound goes nowhere."""
    yield from ("-audiodev", "none,id=silence")
    spot = devices.place("audio0")
    if device == "AC97":
        yield from _device({"driver": device, "id": "audio0", "audiodev": "silence", **spot})
        return
    yield from _device({"driver": device, "id": "audio0", **spot})
    for number, codec in enumerate(("hda-micro", "hda-duplex")):
        name = f"audio0-codec{number}"
        yield from _device({"driver": codec, "id": name, "bus": "audio0.0", "cad": number, "audiodev": "silence"})


# Drives


def _drives(config: Mapping[str, str], drives: Mapping[str, Path], order: Mapping[str, int]) -> Iterator[str]:
    made: set[str] = set()
    discs = {key for key, text in config.items() if _DRIVE.fullmatch(key) and "media=cdrom" in text}
    for key in sorted({*(key for key in drives if _DRIVE.fullmatch(key)), *discs}, key=_natural):
        if key in drives:
            yield from ("-blockdev", json.dumps(devices.drive_node(key, drives[key], options(config.get(key, "")))))
        controller = devices.controller(key, config)
        device = devices.drive_device(key, config, order, has_medium=key in drives)
        for each in (controller, device):
            if each is not None and "iothread" in each and each["iothread"] not in made:
                made.add(each["iothread"])
                yield from ("-object", f"iothread,id={each['iothread']}")
        if controller is not None and controller["id"] not in made:
            made.add(controller["id"])
            yield from _device(controller)
        yield from _device(device)


def _device(properties: Properties) -> list[str]:
    return ["-device", json.dumps(properties)]


def _path(path: Path) -> str:
    return str(path).replace(",", ",,")


def _natural(key: str) -> tuple[str, int]:
    return key.rstrip("0123456789"), int(re.sub(r"\D", "", key) or 0)
