"""The node's networks: the bridge that guests' cards are on, and the host's own interfaces that have an address.

`vmbr0` is QEMU's user network, which every card has to itself: the node is 10.0.2.2 in it, and routes for the guest.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from pathlib import Path
from typing import Any

import psutil

BRIDGE = "vmbr0"
_NODE_IN_BRIDGE = ipaddress.IPv4Interface("10.0.2.2/24")
_ROUTES = Path("/proc/net/route")


def interface_name(text: str) -> None:
    """The format of an interface's name."""
    if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_]{1,20}([:.][0-9]+)?", text):
        raise ValueError("invalid network interface name '" + text + "'")


def interfaces() -> dict[str, dict[str, Any]]:
    """By name, as Proxmox lists them; the loopback is none of them."""
    found = {
        name: {"type": "eth", "priority": number, **_common("static"), **_addresses(name, addresses)}
        for number, (name, addresses) in enumerate(sorted(psutil.net_if_addrs().items()), 3)
        if name != "lo" and any(address.family == socket.AF_INET for address in addresses)
    }
    bridge = {"type": "bridge", "priority": 2, "bridge_ports": "", **_common("static"), **_v4(_NODE_IN_BRIDGE)}
    return {**found, BRIDGE: {**bridge, "comments": "QEMU user networking, one network for each card\n"}}


def _common(method: str) -> dict[str, Any]:
    return {"active": 1, "autostart": 1, "exists": 1, "families": ["inet"], "method": method, "method6": "manual"}


def _addresses(name: str, addresses: list[Any]) -> dict[str, Any]:
    address = next(address for address in addresses if address.family == socket.AF_INET)
    found = _v4(ipaddress.IPv4Interface(f"{address.address}/{address.netmask or 32}"))
    gateway = _gateway(name)
    return {**found, "gateway": gateway} if gateway else found


def _v4(interface: ipaddress.IPv4Interface) -> dict[str, Any]:
    return {"address": str(interface.ip), "netmask": str(interface.network.prefixlen), "cidr": str(interface)}


def _gateway(name: str) -> str | None:
    """The default route's gateway on an interface (proc_net(5): hexadecimal, in the host's byte order)."""
    try:
        lines = _ROUTES.read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return None
    for fields in map(str.split, lines):
        if fields[0] == name and fields[1] == "00000000" and fields[2] != "00000000":
            return socket.inet_ntoa(bytes.fromhex(fields[2])[::-1])
    return None


def name_servers() -> dict[str, str]:
    """resolv.conf: `search` and up to three name servers, `dns1` …"""
    found: dict[str, str] = {}
    try:
        lines = Path("/etc/resolv.conf").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    servers = [words[1] for words in map(str.split, lines) if len(words) > 1 and words[0] == "nameserver"]
    for words in map(str.split, lines):
        if len(words) > 1 and words[0] in ("search", "domain"):
            found["search"] = words[1]
    return found | {f"dns{number}": server for number, server in enumerate(servers[:3], 1)}
