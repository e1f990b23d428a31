"""Files below the home's storages that nothing names: none may be there when no task runs."""

from __future__ import annotations

from pathlib import Path

from autovibe.node.state import State
from autovibe.node.vm import drives


def named_volumes(state: State) -> set[str]:
    """The volumes of every section of every VM's configuration."""
    found: set[str] = set()
    for vmid in state.configs.vmids():
        config = state.configs.load(vmid)
        for values in (config.values, config.pending, *config.snapshots.values()):
            found.update(drives.owned_volumes(values))
    return found


def unnamed_files(state: State) -> list[Path]:
    """Disks, layers, saved RAM and unfinished files that no configuration leads to, and uploads nobody waits for."""
    uploads = (state.home / "uploads").glob("*")
    return [*state.disks.unnamed_files(named_volumes(state)), *uploads]
