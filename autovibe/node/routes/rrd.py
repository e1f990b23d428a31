"""Routes about figures over time."""

from __future__ import annotations

from autovibe.node.routes.route import N, Route, S, V, on_node, on_storage, on_vm, route
from autovibe.node.schema.parameters import Param, Table
from autovibe.node.verbs import rrd

_TIMEFRAMES = ("hour", "day", "week", "month", "year")


def _asking(*timeframes: str) -> Table:
    return {"timeframe": Param(optional=False, enum=timeframes), "cf": Param(enum=("AVERAGE", "MAX"))}


ROUTES: tuple[Route, ...] = (
    route("GET", f"{V}/rrddata", rrd.of_vm, on_vm("VM.Audit"), _asking(*_TIMEFRAMES)),
    route("GET", f"{N}/rrddata", rrd.of_node, on_node("Sys.Audit"), _asking(*_TIMEFRAMES, "decade")),
    route(
        "GET",
        f"{S}/rrddata",
        rrd.of_storage,
        on_storage("Datastore.Audit", "Datastore.AllocateSpace", any=True),
        _asking(*_TIMEFRAMES),
    ),
)
