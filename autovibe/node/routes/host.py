"""Routes about the node itself: its status, its tasks."""

from __future__ import annotations

from autovibe.node.options import FLAG, TEXT, VMID
from autovibe.node.parameters import Param, Table
from autovibe.node.permissions import ALL_USERS
from autovibe.node.routes.route import START, N, Route, on_node, route
from autovibe.node.verbs import cluster, tasks

_TASK_FILTERS: Table = {
    "errors": FLAG,
    "limit": START,
    "start": START,
    "since": Param("integer"),
    "until": Param("integer"),
    "source": Param(enum=("archive", "active", "all")),
    "statusfilter": TEXT,
    "typefilter": TEXT,
    "userfilter": TEXT,
    "vmid": VMID,
}

ROUTES: tuple[Route, ...] = (
    route("GET", N, cluster.node_index, ALL_USERS),
    route("GET", f"{N}/status", cluster.node_status, on_node("Sys.Audit")),
    route("GET", f"{N}/version", cluster.version, ALL_USERS),
    route("GET", f"{N}/tasks", tasks.list_node, ALL_USERS, _TASK_FILTERS),
    route("GET", f"{N}/tasks/{{upid}}", tasks.index, ALL_USERS),
    route("DELETE", f"{N}/tasks/{{upid}}", tasks.stop, ALL_USERS),
    route("GET", f"{N}/tasks/{{upid}}/log", tasks.log, ALL_USERS, {"start": START, "limit": START, "download": FLAG}),
    route("GET", f"{N}/tasks/{{upid}}/status", tasks.status, ALL_USERS),
)
