"""The options of the cluster and of the node: read and changed, kept in the home."""

from __future__ import annotations

import re
from typing import Any

from autovibe.node import option_file
from autovibe.node.host import datacenter
from autovibe.node.schema.parameters import Table, render
from autovibe.node.state import Call, State

_FOR_EVERYBODY = ("console", "tag-style")


def get_cluster(state: State, call: Call) -> dict[str, Any]:
    """All to auditors; others learn what a web page needs to be drawn. With the tags that the caller may use."""
    found = datacenter.cluster_options(state.home)
    tags = _allowed_tags(state, call, found)
    if not state.allows(call.actor, "/", "Sys.Audit"):
        found = {key: found[key] for key in _FOR_EVERYBODY if key in found}
    return {**found, "allowed-tags": tags}


def _allowed_tags(state: State, call: Call, options: dict[str, Any]) -> list[str]:
    access = options.get("user-tag-access", {})
    mode = access.get("user-allow", "free")
    tags = set(options.get("registered-tags", ())) if state.allows(call.actor, "/", "Sys.Modify") else set()
    if mode != "none":
        tags |= set(access.get("user-allow-list", ()))
    if mode in ("free", "existing"):
        for vmid in state.configs.vmids():
            config = state.configs.find(vmid)
            if config is not None and state.allows(call.actor, f"/vms/{vmid}", "VM.Audit"):
                tags |= set(filter(None, re.split(r"[,;\s]+", config.get("tags"))))
    return sorted(tags)


def put_cluster(state: State, call: Call) -> None:
    option_file.change(
        datacenter.cluster_file(state.home),
        _texts(call, datacenter.CLUSTER),
        _deleted(call),
        check=datacenter.check_vmid_range,
    )


def get_node(state: State, call: Call) -> dict[str, Any]:
    found = datacenter.node_options(state.home)
    wanted = call.get("property")
    return found if wanted is None else {key: found[key] for key in (wanted,) if key in found}


def put_node(state: State, call: Call) -> None:
    path = datacenter.node_file(state.home)
    option_file.change(path, _texts(call, datacenter.NODE_OPTIONS), _deleted(call), digest=call.get("digest"))


def _texts(call: Call, table: Table) -> dict[str, str]:
    return {key: render(value) for key, value in call.parameters.items() if key in table}


def _deleted(call: Call) -> list[str]:
    return [key for key in re.split(r"[,;\s]+", call.get("delete", "")) if key]
