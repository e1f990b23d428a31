"""Access: tickets, passwords, realms, and what somebody may do."""

from __future__ import annotations

import re
from typing import Any

from autovibe.node.access import Access, forbidden
from autovibe.node.access.auth import FAILED_LOGIN_DELAY_SECONDS, login_failed
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.schema.names import ROOT, is_token, normalize_path, split_list
from autovibe.node.state import Call, State

_DOMAINS = {
    "pam": "Linux PAM standard authentication",
    "pve": "Proxmox VE authentication server",
}
_AREAS = {
    "access": r"(User|Group)\.|Permissions\.Modify",
    "dc": r"Sys\.Audit|Sys\.Modify|SDN\.",
    "mapping": r"Mapping\.|Permissions\.Modify",
    "nodes": r"Sys\.|Permissions\.Modify",
    "sdn": r"SDN\.|Permissions\.Modify",
    "storage": r"Datastore\.|Permissions\.Modify",
    "vms": r"VM\.|Permissions\.Modify",
}
"""Of each area of the web interface, the privileges it asks for."""
_CAPABILITY_PATHS = ("/", "/nodes", "/access/groups", "/vms", "/storage", "/sdn", "/mapping")
_PATHS = ("/", "/access", "/access/groups", "/nodes", "/pool", "/sdn", "/storage", "/vms")


def index(_state: State, _call: Call) -> list[dict[str, str]]:
    names = ("users", "groups", "roles", "acl", "domains", "tfa", "ticket", "password")
    return [{"subdir": name} for name in names]


def login_page(_state: State, _call: Call) -> None:
    """What a web page's login form asks for first: nothing."""


def login(state: State, call: Call) -> dict[str, Any]:
    """A ticket; or, with `path` and `privs`, whether somebody has these privileges there."""
    username = call["username"]
    if realm := call.get("realm"):
        username = f"{username}@{realm}"
    if call.get("path") and call.get("privs"):
        path = normalize_path(call["path"]) or ""
        if not state.auth.is_vnc_ticket_valid(call["password"], username, path, None):
            state.auth.check_login(username, call["password"])
        state.auth.require_enabled(username)
        _require_privileges(state, username, path, call["privs"])
        return {"username": username, "cap": capabilities(state.access, username)}
    ticket, csrf_token = state.auth.login(username, call["password"])
    found = {"username": username, "ticket": ticket, "CSRFPreventionToken": csrf_token}
    return {**found, "cap": capabilities(state.access, username)}


def verify_vnc_ticket(state: State, call: Call) -> None:
    """Fails as a login does, whatever is wrong."""
    if not state.auth.is_vnc_ticket_valid(call["vncticket"], call["authid"], call["path"], call.get("port")):
        raise login_failed()
    authid = call["authid"]
    state.auth.require_enabled(authid.rpartition("!")[0] if is_token(authid) else authid)
    _require_privileges(state, authid, call["path"], call["privs"])


def _require_privileges(state: State, name: str, path: str, privileges: str) -> None:
    wanted = split_list(privileges)
    held = state.access.privileges(name, path)
    if not wanted or not all(privilege in held for privilege in wanted):
        raise login_failed()


def capabilities(access: Access, name: str) -> dict[str, dict[str, int]]:
    """What a web interface would show somebody: per area the privileges held anywhere in its part of the tree."""
    found: dict[str, dict[str, int]] = {area: {} for area in _AREAS}
    for path in (*_CAPABILITY_PATHS, *access.config.acl):
        top = path.split("/")[1] or "dc"
        areas = ("vms", "storage") if top == "pool" else (top,)
        held = access.privileges(name, path)
        for area in areas:
            if pattern := _AREAS.get(area):
                found[area] |= {privilege: 1 for privilege in held if re.match(pattern, privilege)}
    return found


def permissions(state: State, call: Call) -> dict[str, dict[str, int]]:
    """The caller's privileges, or those of a user or token that is the caller's own or that he may see."""
    userid = call.get("userid", call.actor.name)
    if userid != call.actor.name and userid.rpartition("!")[0] != call.actor.name:
        state.access.require(call.actor, "/access", "Sys.Audit")
    if path := call.get("path"):
        return {path: _flags(state.access, userid, path)}
    config = state.access.config
    of_pools = {f"/vms/{vmid}" for pool in config.pools.values() for vmid in pool.vms}
    of_pools |= {f"/storage/{storage}" for pool in config.pools.values() for storage in pool.storage}
    flags = {path: _flags(state.access, userid, path) for path in {*_PATHS, *config.acl, *of_pools}}
    return {path: held for path, held in flags.items() if held}


def _flags(access: Access, name: str, path: str) -> dict[str, int]:
    """1 for privileges that hold below the path too, 0 for others."""
    return {privilege: int(is_wide) for privilege, is_wide in access.privileges(name, path).items()}


def domains(_state: State, _call: Call) -> list[dict[str, str]]:
    return [{"realm": name, "type": name, "comment": comment} for name, comment in _DOMAINS.items()]


def domain(_state: State, call: Call) -> dict[str, str]:
    realm = call["realm"]
    if realm not in _DOMAINS:
        raise Refusal(f"domain '{realm}' does not exist")
    return {"type": realm, "comment": _DOMAINS[realm]}


def set_password(state: State, call: Call) -> None:
    """Root sets any; others their own, or of users that they may change, when they give their own once more."""
    actor, userid = call.actor, call["userid"]
    require_ticket(call, "/access/password")
    state.access.require_user(userid)
    if not actor.is_root:
        if userid == ROOT or (userid.endswith("@pam") and userid != actor.user):
            raise forbidden()
        own = call.get("confirmation-password")
        if own is None:
            raise faulty({"confirmation-password": "password is required to modify user"})
        if not state.auth.is_password(actor.user, own):
            raise Refusal("invalid credentials", delay_seconds=FAILED_LOGIN_DELAY_SECONDS)
    state.auth.set_password(userid, call["password"])


def require_ticket(call: Call, path: str) -> None:
    """Raises the 403 of calls that API tokens may not make."""
    if call.actor.token:
        raise forbidden(f"URI '{path}' not available with API token, need proper ticket.\n")


def no_factors(_state: State, _call: Call) -> list[Any]:
    """Nobody has a second factor on this node."""
    return []


def no_factor_types(_state: State, call: Call) -> dict[str, Any]:
    return {"types": []} if call.get("multiple") else {}


def unlock_factors(state: State, call: Call) -> int:
    """Whether there was something to unlock."""
    state.access.require_user(call["userid"])
    return 0
