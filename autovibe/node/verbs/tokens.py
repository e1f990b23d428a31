"""API tokens of users. A token's value is shown once, when it is made."""

from __future__ import annotations

from typing import Any

from autovibe.node.access import forbidden
from autovibe.node.access.user_config import Token, UserConfig
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.schema.names import ROOT, split_list
from autovibe.node.state import Call, State


def facts(token: Token) -> dict[str, Any]:
    found: dict[str, Any] = {"expire": token.expire, "privsep": int(token.privsep)}
    return {**found, "comment": token.comment} if token.comment else found


def list_all(state: State, call: Call) -> list[dict[str, Any]]:
    user = state.access.require_user(call["userid"])
    return [{"tokenid": name, **facts(token)} for name, token in sorted(user.tokens.items())]


def get(state: State, call: Call) -> dict[str, Any]:
    return facts(state.access.require_token(call["userid"], call["tokenid"]))


def create(state: State, call: Call) -> dict[str, Any]:
    userid, name = call["userid"], call["tokenid"]
    full_name = _change_allowed(state, call)
    if name in state.access.require_user(userid).tokens:
        raise faulty({"tokenid": "Token already exists."})
    token = Token(call.get("expire", 0), call.get("privsep", True), call.get("comment", ""))
    with state.access.change("generating token failed") as config:
        if name in config.users[userid].tokens:
            raise Refusal("Token already exists.")
        value = state.auth.credentials.make_token(full_name)
        config.users[userid].tokens[name] = token
    # As Proxmox answers: what was given as it came, a flag as text.
    info: dict[str, Any] = {"privsep": str(int(token.privsep)) if "privsep" in call.parameters else 1}
    info |= {key: call[key] for key in ("expire", "comment") if key in call.parameters}
    return {"full-tokenid": full_name, "info": info, "value": value}


def update(state: State, call: Call) -> dict[str, Any]:
    full_name = _change_allowed(state, call)
    dropped = set(split_list(call.get("delete", "")))
    if unknown := dropped - {"comment", "expire", "privsep"}:
        raise faulty({"delete": f"unknown option '{min(unknown)}'"})
    found: dict[str, Any] = {}
    with state.access.change("updating token info failed") as config:
        token = _require(config, call)
        default = Token()
        for key in ("comment", "expire", "privsep"):
            present = getattr(default if key in dropped else token, key)
            setattr(token, key, call.get(key, present))
        if call.get("regenerate"):
            found = {"full-tokenid": full_name, "value": state.auth.credentials.make_token(full_name)}
    return {**facts(token), **found}


def delete(state: State, call: Call) -> None:
    full_name = _change_allowed(state, call)
    state.access.require_token(call["userid"], call["tokenid"])
    with state.access.change("deleting token failed") as config:
        _require(config, call)
        state.auth.credentials.forget(full_name)
        del config.users[call["userid"]].tokens[call["tokenid"]]
        config.forget_member(full_name)


def _require(config: UserConfig, call: Call) -> Token:
    user = config.users.get(call["userid"])
    if user is None:
        raise Refusal(f"no such user ('{call['userid']}')")
    if call["tokenid"] not in user.tokens:
        raise Refusal(f"no such token '{call['tokenid']}' for user '{call['userid']}'")
    return user.tokens[call["tokenid"]]


def _change_allowed(state: State, call: Call) -> str:
    """The token's full name. A token of root's is as good as root, so that only root makes and changes them."""
    full_name = f"{call['userid']}!{call['tokenid']}"
    if call["userid"] == ROOT and not state.access.is_everything(call.actor):
        raise forbidden()
    if full_name == state.access.home_token:
        raise Refusal(f"token '{call['tokenid']}' is the one in the node's home: change the file 'token' there")
    return full_name
