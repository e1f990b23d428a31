"""Permissions: which roles users, groups and tokens have on the paths of the access control tree."""

from __future__ import annotations

from typing import Any

from autovibe.node.access.privileges import NO_ACCESS
from autovibe.node.access.user_config import UserConfig
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.schema.names import ROOT, is_acl_path, is_group, is_token, normalize_path, split_list
from autovibe.node.state import Call, State


def list_all(state: State, call: Call) -> list[dict[str, Any]]:
    """Those on paths where the caller may change permissions, or all for an auditor."""
    sees_all = state.allows(call.actor, "/access", "Sys.Audit")
    return [
        {"path": path, "type": _kind(member), "ugid": member.removeprefix("@"), "roleid": role, "propagate": int(wide)}
        for path, grants in state.access.config.acl.items()
        if sees_all or state.access.may_modify(call.actor, path)
        for member, roles in grants.items()
        for role, wide in roles.items()
    ]


def _kind(member: str) -> str:
    return "group" if is_group(member) else "token" if is_token(member) else "user"


def update(state: State, call: Call) -> None:
    """Give roles to members, or with `delete` take them away."""
    if not (call.get("users") or call.get("groups") or call.get("tokens")):
        fault = "either 'users', 'groups' or 'tokens' is required."
        raise faulty(dict.fromkeys(("users", "groups", "tokens"), fault))
    path = normalize_path(call["path"])
    if path is None or not (call.get("delete") or is_acl_path(path)):
        raise faulty({"path": f"invalid ACL path '{call['path']}'"})
    propagate = call.get("propagate", True)
    with state.access.change("ACL update failed") as config:
        for role in split_list(call["roles"]):
            if role not in config.roles:
                raise Refusal(f"role '{role}' does not exist")
            _require_role(state, call, path, config.roles[role], role)
            for member in _members(config, call):
                if call.get("delete"):
                    _take(config, path, member, role)
                elif member != ROOT:
                    config.acl.setdefault(path, {}).setdefault(member, {})[role] = propagate


def _require_role(state: State, call: Call, path: str, privileges: frozenset[str], role: str) -> None:
    """An owner of a part of the tree hands out no more than he has himself."""
    own = state.access.privileges(call.actor.name, path)
    if "Permissions.Modify" in own:
        return
    verb = "remove" if call.get("delete") else "add"
    fault = f"Cannot {verb} role '{role}'"
    if role == NO_ACCESS:
        raise faulty({"role": f"{fault} - requires 'Permissions.Modify'"})
    if not privileges <= own.keys():
        raise faulty({"role": f"{fault} - requires 'Permissions.Modify' or superset of privileges."})
    is_wider = call.get("propagate", True) and not all(own[privilege] for privilege in privileges)
    if is_wider and not call.get("delete"):
        needs = "requires 'Permissions.Modify' or propagated superset of privileges."
        raise faulty({"role": f"{fault} with propagation - {needs}"})


def _members(config: UserConfig, call: Call) -> list[str]:
    """The named groups, users and tokens, which all have to exist."""
    groups, users, tokens = (split_list(call.get(kind, "")) for kind in ("groups", "users", "tokens"))
    for group in groups:
        if group not in config.groups:
            raise Refusal(f"group '{group}' does not exist")
    for user in users:
        if user not in config.users:
            raise Refusal(f"user '{user}' does not exist")
    for token in tokens:
        user, _, name = token.rpartition("!")
        if user not in config.users:
            raise Refusal(f"no such user ('{user}')")
        if name not in config.users[user].tokens:
            raise Refusal(f"no such token '{name}' for user '{user}'")
    return [*(f"@{group}" for group in groups), *users, *tokens]


def _take(config: UserConfig, path: str, member: str, role: str) -> None:
    grants = config.acl.get(path, {})
    roles = grants.get(member, {})
    roles.pop(role, None)
    if not roles:
        grants.pop(member, None)
    if not grants:
        config.acl.pop(path, None)
