"""A row of the table of routes, and the parameters many of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from autovibe.node.access.permissions import Need, perm
from autovibe.node.schema.options import DRIVE_KEYS, FLAG, NODE, SNAPSHOT, STORAGE, VMID
from autovibe.node.schema.parameters import Param, Table
from autovibe.node.state import Call, State

Verb = Callable[[State, Call], Any]

N, V = "/nodes/{node}", "/nodes/{node}/qemu/{vmid}"
S, A = "/nodes/{node}/storage/{storage}", "/nodes/{node}/qemu/{vmid}/agent"

on_vm = partial(perm, "/vms/{vmid}")
on_storage = partial(perm, "/storage/{storage}")
on_node = partial(perm, "/nodes/{node}")

START = Param("integer", minimum=0)
SECONDS = Param("integer", minimum=0)
DELAY = Param("integer", minimum=1, maximum=30)
DISK = Param(enum=(*DRIVE_KEYS, "efidisk0", "tpmstate0"))
SKIPLOCK = {"skiplock": FLAG}

_PATH: Table = {
    "node": NODE.required(),
    "vmid": VMID.required(),
    "upid": Param(optional=False),
    "snapname": SNAPSHOT.required(),
    "storage": STORAGE.required(),
    "volume": Param(optional=False, max_length=255),
}
"""Parameters that stand in paths; a route's own table may say more about one."""


@dataclass(frozen=True)
class Route:
    """`needs` is who may call it; `takes_file` routes take a multipart body of any size, and no CSRF token."""

    method: str
    path: str
    verb: Verb
    needs: Need
    table: Table = field(default_factory=dict)
    takes_file: bool = False


def route(
    method: str, path: str, verb: Verb, needs: Need, table: Mapping[str, Param] | None = None, **marks: bool
) -> Route:
    """A route whose table has its path's parameters too."""
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    given = dict(table or {})
    return Route(
        method, path, verb, needs, {**given, **{name: given.get(name) or _PATH[name] for name in names}}, **marks
    )
