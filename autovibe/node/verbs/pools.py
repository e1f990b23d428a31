"""Pools: VMs and storages that are given rights together. A pool `a/b` is part of pool `a`."""

from __future__ import annotations

from typing import Any

from autovibe.node.access.auth import Actor
from autovibe.node.access.user_config import Pool, UserConfig
from autovibe.node.refusal import Refusal
from autovibe.node.schema.names import ROOT, split_list
from autovibe.node.state import Call, State
from autovibe.node.verbs import cluster

_NOT_OF_MEMBERS = ("pool", "tags", "lock", "hastate", "cgroup-mode")


def list_all(state: State, call: Call) -> list[dict[str, Any]]:
    """The pools the caller may see, or with `poolid` that one and its members."""
    poolid = call.get("poolid")
    if poolid is not None:
        state.access.require(call.actor, f"/pool/{poolid}", "Pool.Audit")
        return [get(state, call)]
    return [
        {"poolid": name, **_comment(pool)}
        for name, pool in sorted(state.access.pools().items())
        if state.allows(call.actor, f"/pool/{name}", "Pool.Audit")
    ]


def _comment(pool: Pool) -> dict[str, str]:
    return {"comment": pool.comment} if pool.comment else {}


def get(state: State, call: Call) -> dict[str, Any]:
    """Its members as the cluster's resources show them; `type` is one kind only."""
    pool = _require(state.access.config, call["poolid"])
    members: list[dict[str, Any]] = []
    if call.get("type") in (None, "qemu"):
        members += [entry for entry in _resources(state, "vm") if entry["vmid"] in pool.vms]
    if call.get("type") in (None, "storage"):
        members += [entry for entry in _resources(state, "storage") if entry["storage"] in pool.storage]
    return {"poolid": call["poolid"], **_comment(pool), "members": members}


def _resources(state: State, kind: str) -> list[dict[str, Any]]:
    entries = cluster.resources(state, Call(Actor(ROOT), {"type": kind}))
    return [{key: value for key, value in entry.items() if key not in _NOT_OF_MEMBERS} for entry in entries]


def create(state: State, call: Call) -> None:
    name = call["poolid"]
    with state.access.change("create pool failed") as config:
        if name in config.pools:
            raise Refusal(f"pool '{name}' already exists")
        parent = name.rpartition("/")[0]
        if parent and parent not in config.pools:
            raise Refusal(f"parent '{parent}' of pool '{name}' does not exist")
        config.pools[name] = Pool(call.get("comment", ""))


def update(state: State, call: Call) -> None:
    """Add members, or with `delete` remove them; all or none."""
    with state.access.change("update pools failed") as config:
        pool = _require(config, call["poolid"])
        pool.comment = call.get("comment", pool.comment)
        for vmid in map(int, split_list(call.get("vms", ""))):
            state.access.require_sharing(call.actor, f"/vms/{vmid}")
            if call.get("delete"):
                _leave(pool.vms, vmid, f"VM {vmid} is not a pool member")
            else:
                _join(state, call, config, pool, vmid)
        for storage in split_list(call.get("storage", "")):
            state.access.require_sharing(call.actor, f"/storage/{storage}")
            if call.get("delete"):
                _leave(pool.storage, storage, f"Storage '{storage}' is not a pool member")
            elif storage in pool.storage:
                raise Refusal(f"Storage '{storage}' is already a pool member")
            else:
                pool.storage.add(storage)


def _require(config: UserConfig, name: str) -> Pool:
    if name not in config.pools:
        raise Refusal(f"pool '{name}' does not exist")
    return config.pools[name]


def _leave(members: set[Any], member: Any, fault: str) -> None:
    if member not in members:
        raise Refusal(fault)
    members.discard(member)


def _join(state: State, call: Call, config: UserConfig, pool: Pool, vmid: int) -> None:
    present = config.pool_of(vmid)
    if vmid in pool.vms:
        raise Refusal(f"VM {vmid} is already a pool member")
    if present is not None:
        if not call.get("allow-move"):
            raise Refusal(f"VM {vmid} belongs already to pool '{present}' and allow-move is not set")
        state.access.require(call.actor, f"/pool/{present}", "Pool.Allocate")
        config.pools[present].vms.discard(vmid)
    pool.vms.add(vmid)


def delete(state: State, call: Call) -> None:
    """Only an empty pool; VMs and storages that are gone do not count."""
    name = call["poolid"]
    with state.access.change("delete pool failed") as config:
        pool = _require(config, name)
        held = [f"VM {vmid}" for vmid in sorted(pool.vms) if state.configs.exists(vmid)]
        held += [f"storage '{storage}'" for storage in sorted(pool.storage) if state.has_storage(storage)]
        held += [f"pool '{other}'" for other in sorted(config.pools) if other.startswith(f"{name}/")]
        if held:
            raise Refusal(f"pool '{name}' is not empty (contains {held[0]})")
        del config.pools[name]
        config.forget_path(f"/pool/{name}")
