"""Facts about the machine the node runs on, in the shapes of Proxmox's node status."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil


def load(home: Path) -> dict[str, Any]:
    """Use and size of processor, memory and the disk of `home`; bytes, seconds, and a fraction."""
    memory = psutil.virtual_memory()
    disk = psutil.disk_usage(str(home))
    return {
        "cpu": psutil.cpu_percent(None) / 100,
        "maxcpu": psutil.cpu_count() or 1,
        "mem": memory.total - memory.available,
        "maxmem": memory.total,
        "disk": disk.used,
        "maxdisk": disk.total,
        "uptime": int(time.time() - psutil.boot_time()),
    }


def status(home: Path, version: str) -> dict[str, Any]:
    memory, swap, disk = psutil.virtual_memory(), psutil.swap_memory(), psutil.disk_usage(str(home))
    system = platform.uname()
    return {
        "cpu": psutil.cpu_percent(None) / 100,
        "wait": 0,
        "idle": 0,
        "cpuinfo": _processor(),
        "memory": {
            "total": memory.total,
            "used": memory.used,
            "free": memory.free,
            "available": memory.available,
        },
        "swap": {"total": swap.total, "used": swap.used, "free": swap.free},
        "rootfs": {"total": disk.total, "used": disk.used, "free": disk.total - disk.used, "avail": disk.free},
        "loadavg": [f"{value:.2f}" for value in os.getloadavg()],
        "uptime": int(time.time() - psutil.boot_time()),
        "kversion": f"{system.system} {system.release} {system.version}",
        "current-kernel": {
            "sysname": system.system,
            "release": system.release,
            "version": system.version,
            "machine": system.machine,
        },
        "boot-info": {"mode": "efi" if Path("/sys/firmware/efi").exists() else "legacy-bios"},
        "pveversion": version,
        "ksm": {"shared": 0},
    }


def timezone() -> str:
    """The name of the host's time zone, as in `Europe/Vienna`."""
    try:
        name = Path("/etc/timezone").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        name = ""
    _, found, place = os.path.realpath("/etc/localtime").partition("/zoneinfo/")
    return name or (place if found else "UTC")


@functools.cache
def qemu_version() -> str:
    """As in `7.2.22`; `0` where there is no QEMU."""
    try:
        told = subprocess.run(
            ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "0"
    match = re.search(r"version (\d+(?:\.\d+)+)", told.stdout)
    return match[1] if match else "0"


@functools.cache
def _processor() -> dict[str, Any]:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    flags = fields.get("flags", "")
    return {
        "cpus": psutil.cpu_count() or 1,
        "cores": psutil.cpu_count(logical=False) or 1,
        "sockets": 1,
        "model": fields.get("model name", platform.machine()),
        "mhz": fields.get("cpu MHz", "0"),
        "vendor": fields.get("vendor_id", ""),
        "family": fields.get("cpu family", ""),
        "flags": flags,
        "hvm": "1" if {"vmx", "svm"} & set(flags.split()) else "",
        "user_hz": os.sysconf("SC_CLK_TCK"),
    }
