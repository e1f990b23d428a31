"""What a call needs to be allowed, as rules that stand in the table of routes.

The rules are Proxmox's own (the `permissions` of its API schema): a privilege on a path of the access control tree,
rules joined by `both` and `either`, and those about the user a call is about. `require` checks one as
PVE::RPCEnvironment does (exec_api2_perm_check), before the parameters of the call are: they may be anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from autovibe.node.access import Access, forbidden
from autovibe.node.access.auth import Actor
from autovibe.node.refusal import Refusal
from autovibe.node.schema.names import is_user, normalize_path, split_list


@dataclass(frozen=True)
class Perm:
    """Privileges on a path whose `{names}` are parameters: all of them, or one when `any`.

    With `param` the rule holds only for calls that give that parameter.
    """

    path: str
    privileges: tuple[str, ...]
    any: bool = False
    param: str = ""


@dataclass(frozen=True)
class Both:
    rules: tuple[Need, ...]


@dataclass(frozen=True)
class Either:
    rules: tuple[Need, ...]


@dataclass(frozen=True)
class PermModify:
    """Permissions.Modify on the path, or what lets an owner share his own part of the tree (AccessControl.pm)."""

    path: str


@dataclass(frozen=True)
class UserParam:
    """About parameter `userid`: it is the caller (`self`), or the caller has the privilege on the user's realm."""

    what: Literal["self", "Realm.AllocateUser"]


@dataclass(frozen=True)
class UserGroup:
    """One of the privileges on a group of the user the call is about, or on `/access/groups`.

    `groups_param` makes the groups given in the call count as well: all of them (create), or those that change.
    """

    privileges: tuple[str, ...]
    groups_param: Literal["", "create", "update"] = ""


@dataclass(frozen=True)
class Anybody:
    """No privilege: any user, or with `is_world` also who is not logged in."""

    is_world: bool = False


@dataclass(frozen=True)
class RootOnly:
    """root@pam itself; no token of its."""


Need = Perm | Both | Either | PermModify | UserParam | UserGroup | Anybody | RootOnly

WORLD = Anybody(is_world=True)
ALL_USERS = Anybody()
ROOT_ONLY = RootOnly()


def perm(path: str, *privileges: str, any: bool = False, param: str = "") -> Perm:
    return Perm(path, privileges, any, param)


def both(*rules: Need) -> Both:
    return Both(rules)


def either(*rules: Need) -> Either:
    return Either(rules)


def require(need: Need, access: Access, actor: Actor, given: Mapping[str, Any]) -> None:
    """Raises the 403 of a call that the actor may not make with these parameters."""
    if actor.is_root or isinstance(need, Anybody):
        return
    _require(need, access, actor, given)


def _require(need: Need, access: Access, actor: Actor, given: Mapping[str, Any]) -> None:
    match need:
        case Both(rules):
            for rule in rules:
                _require(rule, access, actor, given)
        case Either(rules):
            _require_one(rules, access, actor, given)
        case Perm(path, privileges, any, param):
            if param and given.get(param) is None:
                raise forbidden()
            if actor.name == access.home_token:  # which calls most
                return
            access.require(actor, _fill(path, given), *privileges, any=any)
        case PermModify(path):
            access.require_sharing(actor, _fill(path, given))
        case UserParam(what):
            _require_user_param(what, access, actor, _text(given.get("userid")))
        case UserGroup():
            _require_user_group(need, access, actor, given)
        case RootOnly():
            raise forbidden("user != root@pam")


def _require_one(rules: tuple[Need, ...], access: Access, actor: Actor, given: Mapping[str, Any]) -> None:
    """As Proxmox does, a `both` that fails says itself what it lacks; of single rules nothing is said."""
    for rule in rules:
        try:
            _require(rule, access, actor, given)
        except Refusal:
            if isinstance(rule, Both):
                raise
        else:
            return
    raise forbidden()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value) if isinstance(value, int) else ""


def _fill(template: str, given: Mapping[str, Any]) -> str:
    """The path with its parameters; what cannot be a path becomes one that nobody has any right on."""
    path = re.sub(r"{([\w-]+)}", lambda match: _text(given.get(match[1])), template)
    return normalize_path(path) or ""


def _require_user_param(what: str, access: Access, actor: Actor, userid: str) -> None:
    if not is_user(userid):
        raise Refusal(f"value '{userid}' does not look like a valid user name")
    if what == "self":
        if userid not in access.config.users or actor.name != userid:
            raise forbidden()
    else:
        access.require(actor, f"/access/realm/{userid.rpartition('@')[2]}", "Realm.AllocateUser")


def _require_user_group(need: UserGroup, access: Access, actor: Actor, given: Mapping[str, Any]) -> None:
    """On `/access/groups` the privilege is for all users; on a group, for those in it."""
    userid, is_known = _text(given.get("userid")), need.groups_param != "create"
    if is_known:
        access.require_user(userid)
    if access.allows(actor, "/access/groups", *need.privileges, any=True):
        return
    if need.groups_param:
        named = split_list(_text(given.get("groups")))
        for path in [f"/access/groups/{group}" for group in named] or ["/access/groups"]:
            access.require(actor, path, *need.privileges, any=True)
            if path.rpartition("/")[2] not in access.config.groups:
                raise forbidden(f"{path}, {'|'.join(need.privileges)}")
    if is_known and not any(
        access.allows(actor, f"/access/groups/{group}", *need.privileges, any=True)
        for group in access.config.groups_of(userid)
    ):
        raise forbidden()
