"""Users: who there is, in which groups, enabled or not."""

from __future__ import annotations

from typing import Any

from autovibe.node.access.user_config import User, UserConfig
from autovibe.node.refusal import Refusal
from autovibe.node.schema.names import ROOT, split_list
from autovibe.node.state import Call, State
from autovibe.node.verbs import tokens

_TEXTS = ("firstname", "lastname", "email", "comment", "keys")
_SEEING = ("User.Modify", "Sys.Audit")


def list_all(state: State, call: Call) -> list[dict[str, Any]]:
    """The caller himself, and those in groups that he may see; `full` with their groups and tokens."""
    config = state.access.config
    sees_all = state.allows(call.actor, "/access/groups", *_SEEING, any=True)
    seen = {call.actor.name}
    for name, group in config.groups.items():
        if not sees_all and state.allows(call.actor, f"/access/groups/{name}", *_SEEING, any=True):
            seen |= group.users
    return [
        _entry(config, name, user, is_full=bool(call.get("full")))
        for name, user in sorted(config.users.items())
        if (sees_all or name in seen) and call.get("enabled", user.enable) == user.enable
    ]


def _entry(config: UserConfig, name: str, user: User, *, is_full: bool) -> dict[str, Any]:
    found = {"userid": name, **_facts(user)}
    realm = name.rpartition("@")[2]
    if realm in ("pam", "pve"):
        found["realm-type"] = realm
    if is_full:
        found["groups"] = ",".join(config.groups_of(name))
        if user.tokens:
            found["tokens"] = [{"tokenid": token, **tokens.facts(user.tokens[token])} for token in sorted(user.tokens)]
    return found


def _facts(user: User) -> dict[str, Any]:
    texts = {name: getattr(user, name) for name in _TEXTS}
    return {"enable": int(user.enable), "expire": user.expire, **{name: text for name, text in texts.items() if text}}


def get(state: State, call: Call) -> dict[str, Any]:
    user = state.access.require_user(call["userid"])
    found = {**_facts(user), "groups": state.access.config.groups_of(call["userid"])}
    if user.tokens:
        found["tokens"] = {name: tokens.facts(token) for name, token in sorted(user.tokens.items())}
    return found


def create(state: State, call: Call) -> None:
    userid = call["userid"]
    with state.access.change("create user failed") as config:
        if userid in config.users:
            raise Refusal(f"user '{userid}' already exists")
        user = config.users[userid] = User()
        _apply(config, user, call)
        state.auth.credentials.forget(userid)  # of one who had the name before
        if call.get("password") is not None:
            state.auth.set_password(userid, call["password"])


def update(state: State, call: Call) -> None:
    userid = call["userid"]
    with state.access.change("update user failed") as config:
        if userid not in config.users:
            raise Refusal(f"no such user ('{userid}')")
        if call.get("groups") is not None and not call.get("append"):
            for group in config.groups.values():
                group.users.discard(userid)
        _apply(config, config.users[userid], call)


def _apply(config: UserConfig, user: User, call: Call) -> None:
    user.enable = call.get("enable", user.enable)
    user.expire = call.get("expire", user.expire)
    for name in _TEXTS:
        setattr(user, name, call.get(name, getattr(user, name)))
    for group in split_list(call.get("groups", "")):
        if group not in config.groups:
            raise Refusal(f"no such group '{group}'")
        config.groups[group].users.add(call["userid"])


def delete(state: State, call: Call) -> None:
    userid = call["userid"]
    with state.access.change("delete user failed") as config:
        if userid == ROOT:
            raise Refusal(f"user '{ROOT}' cannot be deleted")
        if userid not in config.users:
            raise Refusal(f"no such user ('{userid}')")
        user = config.users.pop(userid)
        for group in config.groups.values():
            group.users.discard(userid)
        for member in (userid, *(f"{userid}!{token}" for token in user.tokens)):
            config.forget_member(member)
        state.auth.credentials.forget(userid)
