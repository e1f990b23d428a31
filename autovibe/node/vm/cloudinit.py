"""Cloud-init as Proxmox VE 9.2 makes it: user, network and meta data from a VM's config, on a NoCloud ISO.

Source of forms: PVE/QemuServer/Cloudinit.pm and recorded dumps. The instance id is a hash of user and network data, so
a change of either makes the guest run its first-boot modules again.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

import pycdlib
import yaml

from autovibe.node.disks import qemu_img
from autovibe.node.disks.volume import DiskError, format_of, partial_file

Kind = Literal["user", "network", "meta"]
Snippet = Callable[[str], Path]
"""Finds the file of a snippet's volid (`Disks.path`)."""

SIZE_BYTES = 4 << 20
"""The size of a cloud-init volume on every storage."""


def build(path: Path, vmid: int, config: Mapping[str, str], *, snippet: Snippet | None = None) -> None:
    """Write the ISO (label `cidata`) into a cloud-init volume's file, by one rename."""
    config = {"name": f"VM{vmid}", **config}
    files = {
        "user-data": dump(config, "user", snippet=snippet),
        "network-config": dump(config, "network", snippet=snippet),
        "meta-data": dump(config, "meta", snippet=snippet),
        "vendor-data": _custom(config, "vendor", snippet) or "",
    }
    image = _iso(files)
    if len(image) > SIZE_BYTES:
        raise DiskError(f"the cloud-init data of VM {vmid} does not fit into 4 MiB")
    with partial_file(path.with_name(f"partial-{path.stem}.raw")) as partial:
        partial.write_bytes(image.ljust(SIZE_BYTES, b"\0"))
        if format_of(path) == "raw":
            partial.replace(path)
            return
        with partial_file(path.with_name(f"partial-{path.stem}.qcow2")) as converted:
            qemu_img.convert(partial, converted, format="raw", to="qcow2", size=SIZE_BYTES, progress=lambda _: None)
            converted.replace(path)
        partial.unlink()


def dump(config: Mapping[str, str], kind: Kind, *, snippet: Snippet | None = None) -> str:
    """The data of one kind, as `cloudinit/dump` answers: the snippet `cicustom` names, else made from the config."""
    custom = _custom(config, kind, snippet)
    if custom is not None:
        return custom
    if kind == "user":
        return _user_data(config)
    if kind == "network":
        return _network_config(config)
    data = dump(config, "user", snippet=snippet) + dump(config, "network", snippet=snippet)
    return f"instance-id: {hashlib.sha1(data.encode(), usedforsecurity=False).hexdigest()}\n"


def _user_data(config: Mapping[str, str]) -> str:
    hostname, fqdn = _names(config)
    lines = ["#cloud-config", f"hostname: {hostname}", "manage_etc_hosts: true", f"fqdn: {fqdn}"]
    if user := config.get("ciuser"):
        lines.append(f"user: {_quote(user)}")
    if password := config.get("cipassword"):
        lines.append(f"password: {_quote(password)}")
    if keys := [key for key in unquote(config.get("sshkeys", "")).splitlines() if key.strip()]:
        lines += ["ssh_authorized_keys:", *(f"  - {_quote(key.strip())}" for key in keys)]
    lines += ["chpasswd:", "  expire: False"]
    if user != "root":
        lines += ["users:", "  - default"]
    if config.get("ciupgrade", "1") not in ("0", 0):
        lines.append("package_upgrade: true")
    return "\n".join(lines) + "\n"


def _names(config: Mapping[str, str]) -> tuple[str, str]:
    """Host name and fully qualified name, from the VM's name and the search domain."""
    name = config.get("name", "VM")
    if "." in name:
        return name.partition(".")[0], name
    domain = config.get("searchdomain", "").split()
    return name, f"{name}.{domain[0]}" if domain else name


def _network_config(config: Mapping[str, str]) -> str:
    """Version 1 of cloud-init's network configuration."""
    lines = ["version: 1", "config:"]
    for index in sorted(int(key[3:]) for key in config if re.fullmatch(r"net\d+", key)):
        mac = re.search(r"(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}", config[f"net{index}"])
        lines += ["    - type: physical", f"      name: eth{index}"]
        if mac:
            lines.append(f"      mac_address: '{mac[0].lower()}'")
        if subnets := _subnets(parse_ipconfig(config.get(f"ipconfig{index}", ""))):
            lines += ["      subnets:", *subnets]
    servers, domains = config.get("nameserver", "").split(), config.get("searchdomain", "").split()
    if servers or domains:
        lines += ["    - type: nameserver"]
        lines += ["      address:", *(f"      - '{server}'" for server in servers)] if servers else []
        lines += ["      search:", *(f"      - '{domain}'" for domain in domains)] if domains else []
    return "\n".join(lines) + "\n"


def _subnets(ip: Mapping[str, str]) -> list[str]:
    lines = []
    if (address := ip.get("ip")) == "dhcp":
        lines.append("      - type: dhcp4")
    elif address:
        lines += ["      - type: static", *_static(address)]
        lines += [f"        gateway: '{ip['gw']}'"] if "gw" in ip else []
    if (address := ip.get("ip6")) == "dhcp":
        lines.append("      - type: dhcp6")
    elif address == "auto":
        lines.append("      - type: ipv6_slaac")
    elif address:
        lines += ["      - type: static6", f"        address: '{address}'"]
        lines += [f"        gateway: '{ip['gw6']}'"] if "gw6" in ip else []
    return lines


def _static(address: str) -> list[str]:
    plain, _, prefix = address.partition("/")
    mask = (0xFFFFFFFF << (32 - int(prefix or 32))) & 0xFFFFFFFF
    netmask = ".".join(str(mask >> shift & 255) for shift in (24, 16, 8, 0))
    return [f"        address: '{plain}'", f"        netmask: '{netmask}'"]


def parse_ipconfig(text: str) -> dict[str, str]:
    """`ip=10.0.0.5/24,gw=10.0.0.1` as a mapping."""
    return dict(part.split("=", 1) for part in text.split(",") if "=" in part)


def _custom(config: Mapping[str, str], kind: str, snippet: Snippet | None) -> str | None:
    volid = parse_ipconfig(config.get("cicustom", "")).get(kind)
    if volid is None:
        return None
    if snippet is None or not re.fullmatch(r"[^:]+:snippets/.+", volid):
        raise DiskError(f"cicustom: '{volid}' is no snippet")
    return snippet(volid).read_text(encoding="utf-8")


def _quote(text: str) -> str:
    """A YAML scalar: plain where that reads back as the same text, else single-quoted."""
    if re.fullmatch(r"[A-Za-z_$][A-Za-z0-9_$@./+=-]*( [A-Za-z0-9_@./+=-]+)*", text) and yaml.safe_load(text) == text:
        return text
    return "'" + text.replace("'", "''").replace("\n", " ") + "'"


def _iso(files: Mapping[str, str]) -> bytes:
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="cidata")
    for number, (name, text) in enumerate(files.items()):
        data = text.encode()
        iso.add_fp(io.BytesIO(data), len(data), f"/FILE{number}.;1", rr_name=name, joliet_path=f"/{name}")
    image = io.BytesIO()
    iso.write_fp(image)
    iso.close()
    return image.getvalue()
