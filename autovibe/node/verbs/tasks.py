"""Tasks: how they go, what they logged, stopping one. A task is its owner's; others need a privilege on the node."""

from __future__ import annotations

import re
import time
from typing import Any

from autovibe.node.access.auth import Actor
from autovibe.node.http.messages import Response
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.state import Call, Page, State
from autovibe.node.tasks import Task

_CLUSTER_TASKS = 25  # as many as the cluster's list shows of the past


def status(state: State, call: Call) -> dict[str, Any]:
    task = _find(state, call, "Sys.Audit")
    facts = task.upid.facts()
    if task.status is None:
        return {**facts, "status": "running"}
    return {**facts, "status": "stopped", "exitstatus": task.status}


def log(state: State, call: Call) -> Page | Response:
    task = _find(state, call, "Sys.Audit")
    if call.get("download"):
        return _download(state, call, task)
    return Page(*state.tasks.read_log(task, call.get("start", 0), call.get("limit", 50)))


def _download(state: State, call: Call, task: Task) -> Response:
    """The whole log as a file."""
    if other := next((name for name in ("start", "limit") if call.get(name) is not None), None):
        raise faulty({"download": f"cannot be used together with '{other}'"})
    lines, _ = state.tasks.read_log(task, 0, 0)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(task.upid.starttime))
    name = f"task-{task.upid.node}-{started}-{task.upid.type}.log"
    body = "".join(f"{line['t']}\n" for line in lines).encode()
    return Response(200, "OK", body, "text/plain", headers={"Content-Disposition": f'attachment; filename="{name}"'})


def index(state: State, call: Call) -> list[dict[str, str]]:
    _find(state, call, "Sys.Audit")
    return [{"name": "log"}, {"name": "status"}]


def stop(state: State, call: Call) -> None:
    task = _find(state, call, "Sys.Modify")
    state.tasks.stop(str(task.upid))


def _find(state: State, call: Call, privilege: str) -> Task:
    task = state.tasks.find(call["upid"])
    path = f"/nodes/{state.name}"
    if not _is_owner(task, call.actor) and not state.allows(call.actor, path, privilege):
        raise Refusal(f"Permission check failed ({path}, {privilege})", status=403)
    return task


def _is_owner(task: Task, actor: Actor) -> bool:
    """A user has the tasks of its tokens as well; a token has only its own."""
    return task.upid.user == actor.name or (not actor.token and task.upid.user.startswith(f"{actor.user}!"))


def list_node(state: State, call: Call) -> Page:
    """Newest first; `total` counts what the filters let through."""
    source = call.get("source", "archive")
    is_auditor = state.allows(call.actor, f"/nodes/{state.name}", "Sys.Audit")
    tasks = [] if source == "archive" else state.tasks.running()
    tasks = tasks if source == "active" else tasks + state.tasks.finished()
    visible = [task for task in tasks if is_auditor or _is_owner(task, call.actor)]
    found = [task.facts for task in visible if _passes(task, call)]
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


def list_cluster(state: State, call: Call) -> list[dict[str, Any]]:
    entries = []
    is_auditor = state.allows(call.actor, "/", "Sys.Audit")
    for task in [*state.tasks.running(), *state.tasks.finished()[:_CLUSTER_TASKS]]:
        if is_auditor or _is_owner(task, call.actor):
            facts = {key: value for key, value in task.facts.items() if key not in ("pid", "pstart")}
            entries.append(facts if task.status is None else {**facts, "saved": "1"})
    return entries
