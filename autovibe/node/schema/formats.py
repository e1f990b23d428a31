"""The named formats of string parameters: each function raises ValueError in Proxmox's words."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_STORAGE = re.compile(r"[a-zA-Z][a-zA-Z0-9._-]*[a-zA-Z0-9]")
_VOLUME = re.compile(r"([a-zA-Z][a-zA-Z0-9._-]*[a-zA-Z0-9]):([A-Za-z0-9_.+@/-]+)")
CONTENTS = ("images", "rootdir", "vztmpl", "iso", "backup", "snippets", "import", "none")


def _matching(pattern: str, fault: str) -> Callable[[str], None]:
    compiled = re.compile(pattern)

    def check(text: str) -> None:
        if not compiled.fullmatch(text):
            raise ValueError(fault.format(text))

    return check


def _each(check: Callable[[str], object], separators: str = r"[,;\s]+") -> Callable[[str], None]:
    def check_list(text: str) -> None:
        for item in filter(None, re.split(separators, text)):
            check(item)

    return check_list


config_id = _matching(r"[a-zA-Z][a-zA-Z0-9_-]+", "invalid configuration ID '{}'")
config_ids = _each(config_id)
node = _matching(r"[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?", "value does not look like a valid node name")
nodes = _each(node)
dns_name = _matching(rf"{_LABEL}(\.{_LABEL})*", "value does not look like a valid DNS name")
pool_id = _matching(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+){0,2}", "invalid characters in pool name")
url_encoded = _matching(r"[-%a-zA-Z0-9_.!~*'()]*", "invalid urlencoded string: {}")
tags = _each(_matching(r"[a-zA-Z0-9_][a-zA-Z0-9_+.-]*", "invalid characters in tag"))
mac_address = _matching(
    r"[a-fA-F0-9][02468aceACE](:[a-fA-F0-9]{2}){5}", "value does not look like a valid unicast MAC address"
)
bridge_id = _matching(r"[-_.\w]{1,15}", "invalid bridge '{}'")
cpu_type = _matching(r"(custom-)?[A-Za-z0-9._-]+", "unable to parse CPU type '{}'")
cpu_flags = _each(_matching(r"[+-][a-zA-Z0-9._-]+", "unable to parse CPU flag '{}'"), r";")
cpu_set = _matching(r"\s*\d+(-\d+)?(,\d+(-\d+)?)*\s*", "unable to parse CPU set '{}'")
pci_addresses = _each(
    _matching(r"([0-9a-fA-F]{4}:)?[0-9a-fA-F]{2}:[0-9a-fA-F]{2}(\.[0-9a-fA-F])?", "invalid PCI address '{}'"), r";"
)
disk_size = _matching(r"\d+(\.\d+)?[KMGT]?", "value does not look like a valid disk size: {}")
hotplug = _matching(
    r"[01]|((network|disk|cpu|memory|usb|cloudinit)([,;\s]+(?=\w))?)+", "unable to parse hotplug option"
)
startup_order = _matching(
    r"((order=)?\d+|(order|up|down)=\d+)(,(order|up|down)=\d+)*", "unable to parse startup options"
)
task_statuses = _each(_matching(r"ok|error|warning|unknown", "invalid task status '{}'"))
UUID_OR_BIT = r"(?:[a-fA-F0-9]{8}(?:-[a-fA-F0-9]{4}){3}-[a-fA-F0-9]{12}|[01])"


def storage_id(text: str) -> None:
    if not _STORAGE.fullmatch(text):
        raise ValueError(f"storage ID '{text}' contains illegal characters")


def volume_id(text: str) -> tuple[str, str]:
    """Storage and name of a volume id; a path may not leave its storage."""
    match = _VOLUME.fullmatch(text)
    if match is None or any(part in ("", ".", "..") for part in match[2].split("/")):
        raise ValueError(f"unable to parse volume ID '{text}'")
    return match[1], match[2]


def drive_file(text: str) -> None:
    """What may stand for a drive's volume: none, a volume id, `<storage>:<GiB>`, `<storage>:cloudinit`."""
    if text not in ("none", "cdrom"):
        volume_id(text)


def not_empty(text: str) -> None:
    if not text.strip(" ,"):
        raise ValueError("value is empty")


def ip_config(text: str) -> None:
    """Beyond its properties: a gateway has no meaning beside an address that is not given."""
    given = dict(part.strip().split("=", 1) for part in text.split(",") if "=" in part)
    for gateway, name in (("gw", "ip"), ("gw6", "ip6")):
        if gateway in given and given.get(name) in ("dhcp", "auto"):
            raise ValueError(f"a gateway cannot be given beside '{name}={given[name]}'")


def content(text: str) -> None:
    if text not in CONTENTS:
        raise ValueError(f"invalid content type '{text}'")


contents = _each(content)


def boot(text: str) -> None:
    """`order=scsi0;net0`, or the letters of old."""
    order = text.removeprefix("order=").removeprefix("legacy=")
    device = r"(ide|sata|scsi|virtio|net|usb|hostpci)\d+"
    if not re.fullmatch(rf"\s*|[acdn]{{1,4}}|({device})(;{device})*", order):
        raise ValueError(f"invalid boot device '{order}'")


def address(text: str) -> None:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"value does not look like a valid IP address: {text}") from None


def host(text: str) -> None:
    """An IP address or a DNS name."""
    if re.fullmatch(r"[0-9.]+|.*:.*", text):
        address(text)
    else:
        dns_name(text)


hosts = _each(host)


def address_v4(text: str) -> None:
    if re.fullmatch(r"[0-9.]+", text) is None:
        raise ValueError(f"value does not look like a valid IPv4 address: {text}")
    address(text)


def address_v6(text: str) -> None:
    if ":" not in text:
        raise ValueError(f"value does not look like a valid IPv6 address: {text}")
    address(text)


def network(text: str) -> None:
    """An address with its prefix length, of either family."""
    try:
        ipaddress.ip_interface(text)
    except ValueError:
        raise ValueError(f"value does not look like a valid CIDR network: {text}") from None
    if not re.fullmatch(r".+/[0-9]{1,3}", text):
        raise ValueError(f"value does not look like a valid CIDR network: {text}")


def storage_pairs(text: str) -> None:
    """`from:to,…`, or one storage, or 1 for the same ones."""
    for pair in filter(None, re.split(r"[,;\s]+", text)):
        for name in pair.split(":", 1):
            if pair != "1":
                storage_id(name)


def network_v4(text: str) -> None:
    if text == "dhcp":
        return
    try:
        ipaddress.IPv4Interface(text)
    except ValueError:
        raise ValueError(f"value does not look like a valid IPv4 network configuration: {text}") from None
    if "/" not in text:
        raise ValueError(f"value does not look like a valid IPv4 network configuration: {text}")


def network_v6(text: str) -> None:
    if text in ("dhcp", "auto"):
        return
    try:
        ipaddress.IPv6Interface(text)
    except ValueError:
        raise ValueError(f"value does not look like a valid IPv6 network configuration: {text}") from None
    if "/" not in text:
        raise ValueError(f"value does not look like a valid IPv6 network configuration: {text}")
