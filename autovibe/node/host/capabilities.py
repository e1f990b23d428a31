"""What the installed QEMU can give guests: machine types, processor models and flags, asked of it once."""

from __future__ import annotations

import functools
import re
import subprocess
from typing import Any

_ABI_LEVELS = ("x86-64-v2", "x86-64-v2-AES", "x86-64-v3", "x86-64-v4")
"""Proxmox's own models, which `processors` makes of QEMU's."""

_FLAGS = {
    "md-clear": "the guest can defend itself against microarchitectural data sampling",
    "pcid": "cheaper defence against Meltdown",
    "spec-ctrl": "the guest can defend itself against Spectre on Intel processors",
    "ssbd": "the guest can defend itself against Spectre v4 on Intel processors",
    "ibpb": "the guest can defend itself against Spectre on AMD processors",
    "virt-ssbd": "the guest can defend itself against Spectre v4 on AMD processors",
    "amd-ssbd": "the same, cheaper",
    "amd-no-ssb": "tells the guest that it need not",
    "pdpe1gb": "pages of 1 GiB",
    "hv-tlbflush": "cheaper memory management of Windows guests",
    "hv-evmcs": "cheaper nested virtualisation of Windows guests on Intel processors",
    "aes": "AES instructions",
}
"""Flags a VM's `cpu` may switch (qemu-server's CPUConfig.pm)."""

_VENDORS = (
    (r"EPYC|Opteron|athlon|phenom", "AuthenticAMD"),
    (r"Dhyana", "HygonGenuine"),
    (r"YongFeng", "CentaurHauls"),
    (r"qemu|kvm|max|host|base|x86-64", "default"),
    (r"", "GenuineIntel"),
)


@functools.cache
def machines() -> list[dict[str, str]]:
    """The versioned PC types, newest first."""
    found = []
    for kind, version in re.findall(r"^pc-(i440fx|q35)-(\d+(?:\.\d+)+) ", _help("-machine"), re.MULTILINE):
        found.append({"id": f"pc-{kind}-{version}", "type": kind, "version": version})
    return sorted(found, key=lambda machine: [-int(part) for part in machine["version"].split(".")])


@functools.cache
def processors() -> list[dict[str, Any]]:
    listed = _help("-cpu").partition("Recognized")[0]
    names = re.findall(r"^(?:x86)? +([\w.-]+)", listed, re.MULTILINE)
    chosen = [name for name in names if name != "base" and not re.search(r"-v\d+$", name)]
    return [{"name": name, "custom": 0, "vendor": _vendor(name)} for name in (*chosen, *_ABI_LEVELS)]


def _vendor(name: str) -> str:
    return next(vendor for pattern, vendor in _VENDORS if re.match(pattern, name))


@functools.cache
def flags() -> list[dict[str, str]]:
    """Those QEMU knows; Hyper-V's are not in its list."""
    known = set(_help("-cpu").partition("Recognized")[2].split())
    return [
        {"name": name, "description": text} for name, text in _FLAGS.items() if name in known or name.startswith("hv-")
    ]


@functools.cache
def _help(option: str) -> str:
    """QEMU's list of an option's values; empty where there is no QEMU."""
    argv = ["qemu-system-x86_64", option, "help"]
    try:
        told = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout
