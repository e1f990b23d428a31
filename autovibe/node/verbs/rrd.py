"""Figures over time of the node, a storage or a VM: what the sampler has recorded."""

from __future__ import annotations

import time
from typing import Any

from autovibe.node.refusal import Refusal
from autovibe.node.state import Call, State


def of_vm(state: State, call: Call) -> list[dict[str, Any]]:
    if not state.configs.exists(call.vmid):
        raise _nothing_recorded(f"pve-vm-9.0/{call.vmid}")
    return _read(state, call, f"vm-{call.vmid}")


def of_node(state: State, call: Call) -> list[dict[str, Any]]:
    return _read(state, call, "node")


def of_storage(state: State, call: Call) -> list[dict[str, Any]]:
    if not state.has_storage(call["storage"]):
        raise _nothing_recorded(f"pve-storage-9.0/{state.name}/{call['storage']}")
    return _read(state, call, f"storage-{call['storage']}")


def _read(state: State, call: Call, series: str) -> list[dict[str, Any]]:
    return state.sampler.recorder.read(series, call["timeframe"], call.get("cf", "AVERAGE"), time.time())


def _nothing_recorded(name: str) -> Refusal:
    """Proxmox finds no file, and says so."""
    return Refusal(f"RRD error: opening '/var/lib/rrdcached/db/{name}': No such file or directory")
