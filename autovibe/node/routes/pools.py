"""Routes about pools: `/pools?poolid=`, and `/pools/{poolid}` from before there were pools in pools."""

from __future__ import annotations

from autovibe.node.access.permissions import ALL_USERS, perm
from autovibe.node.routes.route import Route, route
from autovibe.node.schema import formats, names
from autovibe.node.schema.options import FLAG
from autovibe.node.schema.parameters import Param, Table
from autovibe.node.verbs import pools

_POOL: Table = {"poolid": Param(optional=False, form=formats.pool_id)}
_TYPE = Param(enum=("qemu", "lxc", "storage"))
_COMMENT = Param(is_multiline=True)


def _storage_ids(text: str) -> None:
    for name in names.split_list(text):
        formats.storage_id(name)


_UPDATE: Table = {
    **_POOL,
    "comment": _COMMENT,
    "vms": Param(form=names.vm_ids),
    "storage": Param(form=_storage_ids),
    "delete": FLAG,
    "allow-move": FLAG,
}
_SEEING = perm("/pool/{poolid}", "Pool.Audit")
_CHANGING = perm("/pool/{poolid}", "Pool.Allocate")

ROUTES: tuple[Route, ...] = (
    route(
        "GET",
        "/pools",
        pools.list_all,
        ALL_USERS,
        {"poolid": Param(form=formats.pool_id), "type": Param(enum=_TYPE.enum, requires="poolid")},
    ),
    route("POST", "/pools", pools.create, _CHANGING, {**_POOL, "comment": _COMMENT}),
    route("PUT", "/pools", pools.update, _CHANGING, _UPDATE),
    route("DELETE", "/pools", pools.delete, _CHANGING, _POOL),
    route("GET", "/pools/{poolid}", pools.get, _SEEING, {**_POOL, "type": _TYPE}),
    route("PUT", "/pools/{poolid}", pools.update, _CHANGING, _UPDATE),
    route("DELETE", "/pools/{poolid}", pools.delete, _CHANGING, _POOL),
)
