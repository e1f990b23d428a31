"""Every route of the node: method, path, verb, permissions, parameters. What is not among them answers 501."""

from __future__ import annotations

from typing import Any

from autovibe.node.routes import access, agent, cluster, console, firewall, host, pools, rrd, storage, vms
from autovibe.node.routes.route import Route

__all__ = ["ROUTES", "Route", "find"]

ROUTES: tuple[Route, ...] = (
    *cluster.ROUTES,
    *access.ROUTES,
    *pools.ROUTES,
    *host.ROUTES,
    *rrd.ROUTES,
    *vms.ROUTES,
    *agent.ROUTES,
    *storage.ROUTES,
    *console.ROUTES,
    *firewall.ROUTES,
)

_BRANCH = dict[str, Any]


def _plant() -> _BRANCH:
    """The table as a tree of path segments, `*` for a parameter; the routes of a path by method under ``."""
    root: _BRANCH = {}
    for route in ROUTES:
        branch = root
        for part in filter(None, route.path.split("/")):
            branch = branch.setdefault("*" if part.startswith("{") else part, {})
        branch.setdefault("", {})[route.method] = route
    return root


_TREE = _plant()


def find(method: str, path: str) -> tuple[Route, dict[str, str]] | None:
    """The route of a decoded path, and the path's parameters; volumes and networks may hold slashes."""
    branch, values = _TREE, []
    parts = [part for part in path.split("/") if part]
    for position, part in enumerate(parts):
        if part in branch and part != "*":
            branch = branch[part]
        elif "*" in branch:
            branch = branch["*"]
            if (position and parts[position - 1] == "content") or (position > 1 and parts[position - 2] == "ipset"):
                values.append("/".join(parts[position:]))
                break
            values.append(part)
        else:
            return None
    route: Route | None = branch.get("", {}).get(method)
    if route is None:
        return None
    names = [part[1:-1] for part in route.path.split("/") if part.startswith("{")]
    return route, dict(zip(names, values, strict=True))
