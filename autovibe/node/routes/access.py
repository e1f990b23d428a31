"""Routes about who may do what: tickets, users, tokens, roles, permissions."""

from __future__ import annotations

from autovibe.node.options import FLAG, TEXT
from autovibe.node.parameters import Param, Table
from autovibe.node.permissions import ALL_USERS, WORLD
from autovibe.node.routes.route import Route, route
from autovibe.node.verbs import access

_LOGIN: Table = {
    "username": Param(optional=False, max_length=64),
    "password": Param(optional=False),
    "realm": Param(max_length=32),
    "otp": TEXT,
    "path": Param(max_length=64, requires="privs"),
    "privs": Param(max_length=64, requires="path"),
    "new-format": FLAG,
}

ROUTES: tuple[Route, ...] = (
    route("GET", "/access/ticket", access.login_page, WORLD),
    route("POST", "/access/ticket", access.login, WORLD, _LOGIN),
    route("GET", "/access/domains", access.domains, WORLD),
    route("GET", "/access/permissions", access.permissions, ALL_USERS, {"path": TEXT, "userid": TEXT}),
)
