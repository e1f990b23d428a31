"""Routes about who may do what: tickets, users, tokens, groups, roles, permissions."""

from __future__ import annotations

from autovibe.node.access.permissions import ALL_USERS, WORLD, PermModify, UserGroup, UserParam, both, either, perm
from autovibe.node.routes.route import Route, route
from autovibe.node.schema import formats, names
from autovibe.node.schema.options import FLAG, TEXT
from autovibe.node.schema.parameters import Param, Table
from autovibe.node.verbs import access, acl, groups, tokens, users

USER = {"userid": Param(optional=False, max_length=64, form=names.user_id)}
_GROUP = {"groupid": Param(optional=False, form=names.group_id)}
_ROLE = {"roleid": Param(optional=False, form=names.role_id)}
_REALM = Param(max_length=32, form=names.realm_id)
_PRIVILEGES = Param(form=names.privileges)
_COMMENT = Param(is_multiline=True)
_TIME = Param("integer", minimum=0)
_TOKEN_NAME = Param(optional=False, pattern=names.TOKEN_NAME)
_USER_OR_TOKEN = rf"[^\s:/]+@{names.REALM}(?:!{names.TOKEN_NAME})?"

_LOGIN: Table = {
    "username": Param(optional=False, max_length=64),
    "password": Param(optional=False),
    "realm": _REALM,
    "otp": TEXT,
    "path": Param(max_length=64, requires="privs"),
    "privs": Param(max_length=64, form=names.privileges, requires="path"),
    "new-format": FLAG,
    "tfa-challenge": TEXT,
}
_VNC_TICKET: Table = {
    "authid": Param(optional=False, max_length=64),
    "vncticket": Param(optional=False),
    "path": Param(optional=False, max_length=64),
    "privs": Param(optional=False, max_length=64, form=names.privileges),
    "port": Param("integer"),
}
_PASSWORD: Table = {
    **USER,
    "password": Param(optional=False, min_length=8, max_length=64),
    "confirmation-password": Param(min_length=5, max_length=64),
}
_USER_FACTS: Table = {
    **USER,
    "comment": Param(max_length=2048, is_multiline=True),
    "email": Param(max_length=254, form=names.email),
    "enable": FLAG,
    "expire": _TIME,
    "firstname": Param(max_length=1024),
    "groups": Param(form=names.group_ids),
    "keys": Param(pattern="[0-9a-zA-Z!=]{0,4096}"),
    "lastname": Param(max_length=1024),
}
_TOKEN: Table = {**USER, "tokenid": _TOKEN_NAME}
_TOKEN_FACTS: Table = {**_TOKEN, "comment": _COMMENT, "expire": _TIME, "privsep": FLAG}
_ACL: Table = {
    "path": Param(optional=False),
    "roles": Param(optional=False, form=names.role_ids),
    "users": Param(form=names.user_ids),
    "groups": Param(form=names.group_ids),
    "tokens": Param(form=names.token_ids),
    "propagate": FLAG,
    "delete": FLAG,
}

_SELF, _ALLOCATING = UserParam("self"), UserParam("Realm.AllocateUser")
_MODIFYING = UserGroup(("User.Modify",))
_SEEING = UserGroup(("User.Modify", "Sys.Audit"))
_OWN_TOKENS = either(_SELF, _MODIFYING)
_OWN_FACTORS = either(_SELF, _SEEING)
_GROUPS = perm("/access/groups", "Group.Allocate")
_ROLES = perm("/access", "Sys.Modify")
U, T = "/access/users/{userid}", "/access/users/{userid}/token/{tokenid}"

ROUTES: tuple[Route, ...] = (
    route("GET", "/access", access.index, ALL_USERS),
    route("GET", "/access/ticket", access.login_page, WORLD),
    route("POST", "/access/ticket", access.login, WORLD, _LOGIN),
    route("POST", "/access/vncticket", access.verify_vnc_ticket, WORLD, _VNC_TICKET),
    route("PUT", "/access/password", access.set_password, either(_SELF, both(_ALLOCATING, _MODIFYING)), _PASSWORD),
    route(
        "GET",
        "/access/permissions",
        access.permissions,
        ALL_USERS,
        {"path": TEXT, "userid": Param(pattern=_USER_OR_TOKEN)},
    ),
    route("GET", "/access/domains", access.domains, WORLD),
    route(
        "GET",
        "/access/domains/{realm}",
        access.domain,
        perm("/access/realm", "Realm.Allocate", "Sys.Audit", any=True),
        {"realm": _REALM.required()},
    ),
    route("GET", "/access/tfa", access.no_factors, ALL_USERS),
    route("GET", "/access/tfa/{userid}", access.no_factors, _OWN_FACTORS, USER),
    route("GET", f"{U}/tfa", access.no_factor_types, _OWN_FACTORS, {**USER, "multiple": FLAG}),
    route("PUT", f"{U}/unlock-tfa", access.unlock_factors, _MODIFYING, USER),
    route("GET", "/access/acl", acl.list_all, ALL_USERS),
    route("PUT", "/access/acl", acl.update, PermModify("{path}"), _ACL),
    route("GET", "/access/users", users.list_all, ALL_USERS, {"enabled": FLAG, "full": FLAG}),
    route(
        "POST",
        "/access/users",
        users.create,
        both(_ALLOCATING, UserGroup(("User.Modify",), "create")),
        {**_USER_FACTS, "password": Param(min_length=8, max_length=64)},
    ),
    route("GET", U, users.get, _SEEING, USER),
    route(
        "PUT",
        U,
        users.update,
        UserGroup(("User.Modify",), "update"),
        {**_USER_FACTS, "append": Param("boolean", requires="groups")},
    ),
    route("DELETE", U, users.delete, both(_ALLOCATING, _MODIFYING), USER),
    route("GET", f"{U}/token", tokens.list_all, _OWN_TOKENS, USER),
    route("GET", T, tokens.get, _OWN_TOKENS, _TOKEN),
    route("POST", T, tokens.create, _OWN_TOKENS, _TOKEN_FACTS),
    route(
        "PUT",
        T,
        tokens.update,
        _OWN_TOKENS,
        {**_TOKEN_FACTS, "delete": Param(form=formats.config_ids), "regenerate": FLAG},
    ),
    route("DELETE", T, tokens.delete, _OWN_TOKENS, _TOKEN),
    route("GET", "/access/groups", groups.list_all, ALL_USERS),
    route("POST", "/access/groups", groups.create, _GROUPS, {**_GROUP, "comment": _COMMENT}),
    route(
        "GET",
        "/access/groups/{groupid}",
        groups.get,
        perm("/access/groups", "Sys.Audit", "Group.Allocate", any=True),
        _GROUP,
    ),
    route("PUT", "/access/groups/{groupid}", groups.update, _GROUPS, {**_GROUP, "comment": _COMMENT}),
    route("DELETE", "/access/groups/{groupid}", groups.delete, _GROUPS, _GROUP),
    route("GET", "/access/roles", groups.list_roles, ALL_USERS),
    route("POST", "/access/roles", groups.create_role, _ROLES, {**_ROLE, "privs": _PRIVILEGES}),
    route("GET", "/access/roles/{roleid}", groups.get_role, ALL_USERS, _ROLE),
    route(
        "PUT",
        "/access/roles/{roleid}",
        groups.update_role,
        _ROLES,
        {**_ROLE, "privs": _PRIVILEGES, "append": Param("boolean", requires="privs")},
    ),
    route("DELETE", "/access/roles/{roleid}", groups.delete_role, _ROLES, _ROLE),
)
