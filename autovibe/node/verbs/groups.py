"""Groups of users, and roles: names for sets of users and sets of privileges."""

from __future__ import annotations

from typing import Any

from autovibe.node.access.privileges import BUILT_IN_ROLES
from autovibe.node.access.user_config import Group
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.schema.names import split_list
from autovibe.node.state import Call, State

_SEEING = ("User.Modify", "Sys.Audit", "Group.Allocate")


def list_all(state: State, call: Call) -> list[dict[str, Any]]:
    return [
        {"groupid": name, **_comment(group), "users": ",".join(sorted(group.users))}
        for name, group in sorted(state.access.config.groups.items())
        if state.allows(call.actor, f"/access/groups/{name}", *_SEEING, any=True)
    ]


def _comment(group: Group) -> dict[str, str]:
    return {"comment": group.comment} if group.comment else {}


def _require(groups: dict[str, Group], name: str) -> Group:
    if name not in groups:
        raise Refusal(f"group '{name}' does not exist")
    return groups[name]


def get(state: State, call: Call) -> dict[str, Any]:
    group = _require(state.access.config.groups, call["groupid"])
    return {**_comment(group), "members": sorted(group.users)}


def create(state: State, call: Call) -> None:
    with state.access.change("create group failed") as config:
        if call["groupid"] in config.groups:
            raise Refusal(f"group '{call['groupid']}' already exists")
        config.groups[call["groupid"]] = Group(comment=call.get("comment", ""))


def update(state: State, call: Call) -> None:
    with state.access.change("update group failed") as config:
        group = _require(config.groups, call["groupid"])
        group.comment = call.get("comment", group.comment)


def delete(state: State, call: Call) -> None:
    with state.access.change("delete group failed") as config:
        _require(config.groups, call["groupid"])
        del config.groups[call["groupid"]]
        config.forget_member(f"@{call['groupid']}")


def list_roles(state: State, _call: Call) -> list[dict[str, Any]]:
    return [
        {"roleid": name, "privs": ",".join(sorted(privileges)), "special": int(name in BUILT_IN_ROLES)}
        for name, privileges in sorted(state.access.config.roles.items())
    ]


def get_role(state: State, call: Call) -> dict[str, int]:
    return dict.fromkeys(sorted(_privileges(state.access.config.roles, call["roleid"])), 1)


def _privileges(roles: dict[str, frozenset[str]], name: str) -> frozenset[str]:
    if name not in roles:
        raise Refusal(f"role '{name}' does not exist")
    return roles[name]


def create_role(state: State, call: Call) -> None:
    name = call["roleid"]
    if name.lower().startswith("pve"):
        raise faulty({"roleid": "cannot use role ID starting with the (case-insensitive) 'PVE' namespace"})
    with state.access.change("create role failed") as config:
        if name in config.roles:
            raise Refusal(f"role '{name}' already exists")
        config.roles[name] = frozenset(split_list(call.get("privs", "")))


def update_role(state: State, call: Call) -> None:
    name = call["roleid"]
    if name in BUILT_IN_ROLES:
        raise Refusal(f"auto-generated role '{name}' cannot be modified")
    with state.access.change("update role failed") as config:
        present = _privileges(config.roles, name) if call.get("append") else frozenset[str]()
        _privileges(config.roles, name)
        config.roles[name] = present | set(split_list(call.get("privs", "")))


def delete_role(state: State, call: Call) -> None:
    name = call["roleid"]
    if name in BUILT_IN_ROLES:
        raise Refusal(f"auto-generated role '{name}' cannot be deleted")
    with state.access.change("delete role failed") as config:
        _privileges(config.roles, name)
        del config.roles[name]
        for grants in config.acl.values():
            for roles in grants.values():
                roles.pop(name, None)
