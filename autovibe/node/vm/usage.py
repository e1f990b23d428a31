"""What a running VM says of its disks and its memory, in the shapes of Proxmox's status."""

from __future__ import annotations

import time
from typing import Any

from autovibe.node.vm.monitor import Monitor, MonitorError

BALLOON = "/machine/peripheral/balloon0"
POLL_SECONDS = 2
"""How often a guest's balloon driver is asked for its figures."""

_FIGURES = {"stat-free-memory": "free_mem", "stat-total-memory": "total_mem", "stat-available-memory": "mem_available"}
_FAULTS = {"stat-major-faults": "major_page_faults", "stat-minor-faults": "minor_page_faults"}
_SWAPS = {"stat-swap-in": "mem_swapped_in", "stat-swap-out": "mem_swapped_out"}


def of(monitor: Monitor, max_bytes: int) -> dict[str, Any]:
    """`blockstat`, and with a balloon `balloon`, `ballooninfo` and, when the guest tells it, `freemem`; bytes.

    Without an answer of QEMU there is nothing.
    """
    try:
        found: dict[str, Any] = {"blockstat": _disks(monitor)}
        return found | _balloon(monitor, max_bytes)
    except MonitorError:
        return {}


def _disks(monitor: Monitor) -> dict[str, Any]:
    found = {}
    for each in monitor.execute("query-blockstats"):
        path = str(each.get("qdev", "")).removeprefix("/machine/peripheral/")
        if name := path.partition("/")[0]:
            found[name] = {key.replace("-", "_"): value for key, value in each["stats"].items()}
    return found


def _balloon(monitor: Monitor, max_bytes: int) -> dict[str, Any]:
    try:
        actual = int(monitor.execute("query-balloon")["actual"])
        told = monitor.execute("qom-get", path=BALLOON, property="guest-stats")
    except MonitorError:  # the VM has none
        return {}
    info: dict[str, Any] = {"actual": actual, "max_mem": max_bytes, "last_update": int(told.get("last-update", 0))}
    stats = told.get("stats", {})
    for key, name in {**_FIGURES, **_FAULTS, **_SWAPS}.items():
        if int(stats.get(key, -1)) not in (-1, (1 << 64) - 1):
            info[name] = int(stats[key])
    found: dict[str, Any] = {"balloon": actual, "ballooninfo": info}
    if "free_mem" in info and time.time() - info["last_update"] < 10 * POLL_SECONDS:
        found |= {"freemem": info["free_mem"], "mem": max(info.get("total_mem", actual) - info["free_mem"], 0)}
    return found
