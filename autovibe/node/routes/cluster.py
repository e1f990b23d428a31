"""Routes about the cluster, which is this one node."""

from __future__ import annotations

from autovibe.node.options import VMID
from autovibe.node.parameters import Param
from autovibe.node.permissions import ALL_USERS, perm
from autovibe.node.routes.route import Route, route
from autovibe.node.verbs import cluster, tasks

ROUTES: tuple[Route, ...] = (
    route("GET", "/", cluster.root_index, ALL_USERS),
    route("GET", "/version", cluster.version, ALL_USERS),
    route("GET", "/cluster/nextid", cluster.next_id, ALL_USERS, {"vmid": VMID}),
    route(
        "GET",
        "/cluster/resources",
        cluster.resources,
        ALL_USERS,
        {"type": Param(enum=("vm", "storage", "node", "sdn"))},
    ),
    route("GET", "/cluster/status", cluster.status, perm("/", "Sys.Audit")),
    route("GET", "/cluster/tasks", tasks.list_cluster, ALL_USERS),
    route("GET", "/nodes", cluster.nodes, ALL_USERS),
)
