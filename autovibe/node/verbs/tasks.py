"""Tasks: how they go, what they logged, stopping one."""

from __future__ import annotations

import re
from typing import Any

from autovibe.node.state import Call, Page, State
from autovibe.node.tasks import Task

_CLUSTER_TASKS = 25  # as many as the cluster's list shows of the past


def status(state: State, call: Call) -> dict[str, Any]:
    task = state.tasks.find(call["upid"])
    facts = task.upid.facts()
    if task.status is None:
        return {**facts, "status": "running"}
    return {**facts, "status": "stopped", "exitstatus": task.status}


def log(state: State, call: Call) -> Page:
    task = state.tasks.find(call["upid"])
    return Page(*state.tasks.read_log(task, call.get("start", 0), call.get("limit", 50)))


def index(state: State, call: Call) -> list[dict[str, str]]:
    state.tasks.find(call["upid"])
    return [{"name": "log"}, {"name": "status"}]


def stop(state: State, call: Call) -> None:
    state.tasks.stop(call["upid"])


def list_node(state: State, call: Call) -> Page:
    """Newest first; `total` counts what the filters let through."""
    source = call.get("source", "archive")
    tasks = [] if source == "archive" else state.tasks.running()
    tasks = tasks if source == "active" else tasks + state.tasks.finished()
    found = [task.facts for task in tasks if _passes(task, call)]
    start, limit = call.get("start", 0), call.get("limit", 50)
    return Page(found[start : start + limit if limit else None], len(found))


def _passes(task: Task, call: Call) -> bool:
    upid, status = task.upid, task.status
    wanted = [item for item in re.split(r"[,;\s]+", call.get("statusfilter", "")) if item]
    return (
        not (call.get("errors") and status in (None, "OK"))
        and call.get("typefilter", upid.type) == upid.type
        and str(call.get("vmid", upid.id)) == upid.id
        and call.get("userfilter", "").lower() in upid.user.lower()
        and call.get("since", 0) <= upid.starttime <= call.get("until", upid.starttime)
        and (not wanted or _status_class(status) in wanted)
    )


def _status_class(status: str | None) -> str:
    if status is None or status == "unexpected status":
        return "unknown"
    if status == "OK":
        return "ok"
    return "warning" if status.startswith("WARNINGS") else "error"


def list_cluster(state: State, _call: Call) -> list[dict[str, Any]]:
    entries = []
    for task in [*state.tasks.running(), *state.tasks.finished()[:_CLUSTER_TASKS]]:
        facts = {key: value for key, value in task.facts.items() if key not in ("pid", "pstart")}
        entries.append(facts if task.status is None else {**facts, "saved": "1"})
    return entries
