"""The forms of names in access control, as patterns and as checks of parameters, and of paths in its tree.

Each check raises ValueError in Proxmox's words.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from autovibe.node.access.privileges import PRIVILEGES

ROOT = "root@pam"
REALM = r"[A-Za-z][A-Za-z0-9._-]+"
USER_ID = rf"[^\s:/,;]+@{REALM}"
"""Narrower than Proxmox's: a comma or semicolon would let a name pass for two in a list of members."""
TOKEN_NAME = r"[A-Za-z][A-Za-z0-9._-]+"  # noqa: S105 - the form of names
NAME = r"[A-Za-z0-9._-]+"
POOL_NAME = rf"{NAME}(?:/{NAME}){{0,2}}"

_PATH_LENGTH = 512  # what callers send is looked up part by part
_SEPARATORS = re.compile(r"[,;\s\0]+")
_PATH = re.compile(
    rf"""/ | /access | /access/groups(/{NAME})? | /access/realm(/{NAME})? | /nodes(/{NAME})? | /pool(/{POOL_NAME})?
    | /sdn | /sdn/fabrics(/{NAME})? | /sdn/zones(/{NAME}){{0,2}} | /sdn/zones/{NAME}/{NAME}/[1-9][0-9]{{0,3}}
    | /storage(/{NAME})? | /vms(/[1-9][0-9]{{2,}})? | /mapping(/{NAME}){{0,2}}""",
    re.VERBOSE,
)


def split_list(text: str) -> list[str]:
    return [item for item in _SEPARATORS.split(text) if item]


def normalize_path(path: str) -> str | None:
    """A path of the access control tree in its one form; None for what cannot be one."""
    if len(path) > _PATH_LENGTH or not re.fullmatch(r"[A-Za-z0-9._/-]+", path):
        return None
    return "/" + "/".join(part for part in path.split("/") if part)


def is_acl_path(path: str) -> bool:
    """Whether permissions can be given on a normal path."""
    return _PATH.fullmatch(path) is not None


def is_group(member: str) -> bool:
    return bool(re.fullmatch(f"@{NAME}", member))


def is_user(member: str) -> bool:
    return bool(re.fullmatch(USER_ID, member))


def is_token(member: str) -> bool:
    return bool(re.fullmatch(rf"{USER_ID}!{TOKEN_NAME}", member))


def _matching(pattern: str, fault: str) -> Callable[[str], None]:
    compiled = re.compile(pattern)

    def check(text: str) -> None:
        if not compiled.fullmatch(text):
            raise ValueError(fault.format(text))

    return check


def _each(check: Callable[[str], None]) -> Callable[[str], None]:
    def check_list(text: str) -> None:
        for item in split_list(text):
            check(item)

    return check_list


def _privilege(text: str) -> None:
    if text not in PRIVILEGES:
        raise ValueError(f"invalid privilege '{text}'")


user_id = _matching(USER_ID, "value '{}' does not look like a valid user name")
user_ids = _each(user_id)
group_id = _matching(NAME, "group name '{}' contains invalid characters")
group_ids = _each(group_id)
role_id = _matching(NAME, "role name '{}' contains invalid characters")
role_ids = _each(role_id)
token_ids = _each(_matching(rf"{USER_ID}!{TOKEN_NAME}", "value '{}' does not look like a valid token ID"))
realm_id = _matching(REALM, "value does not look like a valid realm")
privileges = _each(_privilege)
email = _matching(
    r"([\w+~-]+(\.[\w+~-]+)*@[a-zA-Z0-9-]+(\.[a-zA-Z0-9-]+)*)?", "value does not look like a valid email address"
)
vm_ids = _each(_matching(r"[1-9][0-9]{2,8}", "value does not look like a valid VM ID"))
