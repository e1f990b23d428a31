"""What a call needs to be allowed, as rules that stand in the table of routes.

The rules are Proxmox's own (the `permissions` of its API schema): a privilege on a path of the access control tree,
rules joined by `both` and `either`, and those about the user a call is about. `access` answers whether they hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
