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
dns_name = _matching(rf"{_LABEL}(\.{_LABEL})*", "value does not look like a valid DNS name")
pool_id = _matching(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+){0,2}", "invalid characters in pool name")
url_encoded = _matching(r"[-%a-zA-Z0-9_.!~*'()]*", "invalid urlencoded string: {}")
tags = _each(_matching(r"[a-zA-Z0-9_][a-zA-Z0-9_+.-]*", "invalid characters in tag"))
mac_address = _matching(
    r"[a-fA-F0-9][02468aceACE](:[a-fA-F0-9]{2}){5}", "value does not look like a valid unicast MAC address"
)
bridge_id = _matching(r"[-_.\w]{1,15}", "invalid bridge '{}'")
cpu_model = _matching(
    r"(cputype=)?(custom-)?[A-Za-z0-9._-]+(,[a-z-]+=[A-Za-z0-9+;._-]+)*", "unable to parse CPU configuration '{}'"
)
hotplug = _matching(
    r"[01]|((network|disk|cpu|memory|usb|cloudinit)([,;\s]+(?=\w))?)+", "unable to parse hotplug option"
)
startup_order = _matching(
    r"((order=)?\d+|(order|up|down)=\d+)(,(order|up|down)=\d+)*", "unable to parse startup options"
)
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


addresses = _each(address)


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
