"""Users, groups, tokens, roles, pools and permissions in Proxmox's own form: the lines of `user.cfg`.

    user:<id>:<enable>:<expire>:<first name>:<last name>:<email>:<comment>:<keys>:
    token:<user>!<name>:<expire>:<privsep>:<comment>:
    group:<name>:<users>:<comment>:
    pool:<name>:<comment>:<vmids>:<storages>:
    role:<name>:<privileges>:
    acl:<propagate>:<path>:<members>:<roles>:

Free text is percent-encoded, so that no value can end a field or a line. Secrets are never in this file. Lines that
make no sense are dropped, as Proxmox does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from urllib.parse import unquote

from autovibe.node.access.privileges import BUILT_IN_ROLES, PRIVILEGES
from autovibe.node.schema.names import NAME, POOL_NAME, ROOT, is_group, is_token, is_user, normalize_path, split_list

_TEXTS = ("firstname", "lastname", "email", "comment", "keys")
_STORAGE = re.compile(r"[A-Za-z][A-Za-z0-9._-]*[A-Za-z0-9]")


@dataclass
class Token:
    """An API token; with `privsep` it may what both it and its user may. `expire` 0 is never."""

    expire: int = 0
    privsep: bool = True
    comment: str = ""


@dataclass
class User:
    enable: bool = True
    expire: int = 0
    firstname: str = ""
    lastname: str = ""
    email: str = ""
    comment: str = ""
    keys: str = ""
    tokens: dict[str, Token] = field(default_factory=dict)

    def copy(self) -> User:
        return replace(self, tokens={name: replace(token) for name, token in self.tokens.items()})


@dataclass
class Group:
    users: set[str] = field(default_factory=set)
    comment: str = ""


@dataclass
class Pool:
    """VMs (each in one pool at most) and storages that are given rights together."""

    comment: str = ""
    vms: set[int] = field(default_factory=set)
    storage: set[str] = field(default_factory=set)


Grants = dict[str, dict[str, bool]]
"""Of a path: member (`user@realm`, `user@realm!token` or `@group`) -> role -> whether it holds below the path too."""


@dataclass
class UserConfig:
    users: dict[str, User] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    roles: dict[str, frozenset[str]] = field(default_factory=dict)
    pools: dict[str, Pool] = field(default_factory=dict)
    acl: dict[str, Grants] = field(default_factory=dict)

    def copy(self) -> UserConfig:
        """One that can be changed in every part; by hand, as `deepcopy` takes ten times as long."""
        return UserConfig(
            users={name: user.copy() for name, user in self.users.items()},
            groups={name: Group(set(group.users), group.comment) for name, group in self.groups.items()},
            roles=dict(self.roles),
            pools={name: Pool(pool.comment, set(pool.vms), set(pool.storage)) for name, pool in self.pools.items()},
            acl={path: {member: dict(roles) for member, roles in grants.items()} for path, grants in self.acl.items()},
        )

    def pool_of(self, vmid: int) -> str | None:
        return next((name for name, pool in self.pools.items() if vmid in pool.vms), None)

    def token(self, member: str) -> Token | None:
        """The token of a full name, `user@realm!token`."""
        user, bang, name = member.rpartition("!")
        return self.users[user].tokens.get(name) if bang and user in self.users else None

    def groups_of(self, user: str) -> list[str]:
        return sorted(name for name, group in self.groups.items() if user in group.users)

    def forget_member(self, member: str) -> None:
        """Take a user, token or `@group` out of every permission."""
        for grants in self.acl.values():
            grants.pop(member, None)

    def knows_path(self, path: str) -> bool:
        """Whether there are permissions on a path or below it."""
        return any(known == path or known.startswith(f"{path}/") for known in self.acl)

    def forget_path(self, path: str) -> None:
        self.acl = {
            known: grants for known, grants in self.acl.items() if known != path and not known.startswith(f"{path}/")
        }


def parse(text: str) -> UserConfig:
    config = UserConfig(roles=dict(BUILT_IN_ROLES))
    for line in text.split("\n"):
        kind, *fields = line.strip().split(":")
        if kind in _READERS:
            _READERS[kind](config, [*fields, *[""] * 8])
    config.users.setdefault(ROOT, User())
    return config


def _read_user(config: UserConfig, fields: list[str]) -> None:
    name, enable, expire, first, last, email, comment, keys = fields[:8]
    if is_user(name) and _is_number(expire):
        user = config.users[name] = User(enable == "1", int(expire or 0))
        for text, value in zip(_TEXTS, (first, last, email, comment, keys), strict=True):
            setattr(user, text, unquote(value))


def _read_token(config: UserConfig, fields: list[str]) -> None:
    member, expire, privsep, comment = fields[:4]
    user, _, name = member.rpartition("!")
    if is_token(member) and user in config.users and _is_number(expire):
        config.users[user].tokens[name] = Token(int(expire or 0), privsep == "1", unquote(comment))


def _read_group(config: UserConfig, fields: list[str]) -> None:
    name, users, comment = fields[:3]
    if re.fullmatch(NAME, name):
        members = {user for user in split_list(users) if is_user(user)}
        config.groups[name] = Group(members, unquote(comment))


def _read_role(config: UserConfig, fields: list[str]) -> None:
    if re.fullmatch(NAME, fields[0]) and fields[0] not in BUILT_IN_ROLES:
        config.roles[fields[0]] = PRIVILEGES & set(split_list(fields[1]))


def _read_pool(config: UserConfig, fields: list[str]) -> None:
    name, comment, vms, storages = fields[:4]
    if re.fullmatch(POOL_NAME, name):
        members = {int(vmid) for vmid in split_list(vms) if vmid.isdecimal() and not config.pool_of(int(vmid))}
        storage = {found for found in split_list(storages) if _STORAGE.fullmatch(found)}
        config.pools[name] = Pool(unquote(comment), members, storage)


def _read_acl(config: UserConfig, fields: list[str]) -> None:
    propagate, path, members, roles = fields[:4]
    known = normalize_path(path)
    if known is None:
        return
    granted = {role: propagate == "1" for role in split_list(roles) if role in config.roles}
    for member in split_list(members):
        is_known = config.token(member) is not None if is_token(member) else is_group(member) or is_user(member)
        if granted and is_known:
            config.acl.setdefault(known, {}).setdefault(member, {}).update(granted)


def _is_number(text: str) -> bool:
    return not text or (text.isascii() and text.isdecimal() and len(text) <= 18)


_READERS = {
    "user": _read_user,
    "token": _read_token,
    "group": _read_group,
    "role": _read_role,
    "pool": _read_pool,
    "acl": _read_acl,
}


def render(config: UserConfig) -> str:
    sections = (_user_lines, _group_lines, _pool_lines, _role_lines, _acl_lines)
    return "\n".join("".join(f"{line}\n" for line in lines(config)) for lines in sections)


def _escape(text: str) -> str:
    return re.sub(r"[^ -9;-~]|%", lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), text)


def _line(kind: str, *fields: str | int) -> str:
    return ":".join((kind, *(str(field) for field in fields), ""))


def _user_lines(config: UserConfig) -> list[str]:
    lines = []
    for name, user in sorted(config.users.items()):
        texts = [_escape(getattr(user, text)) for text in _TEXTS]
        lines.append(_line("user", name, int(user.enable), user.expire, *texts))
        for token_name, token in sorted(user.tokens.items()):
            facts = (token.expire, int(token.privsep), _escape(token.comment))
            lines.append(_line("token", f"{name}!{token_name}", *facts))
    return lines


def _group_lines(config: UserConfig) -> list[str]:
    return [
        _line("group", name, ",".join(sorted(group.users)), _escape(group.comment))
        for name, group in sorted(config.groups.items())
    ]


def _pool_lines(config: UserConfig) -> list[str]:
    return [
        _line("pool", name, _escape(pool.comment), ",".join(map(str, sorted(pool.vms))), ",".join(sorted(pool.storage)))
        for name, pool in sorted(config.pools.items())
    ]


def _role_lines(config: UserConfig) -> list[str]:
    custom = {name: privileges for name, privileges in config.roles.items() if name not in BUILT_IN_ROLES}
    return [_line("role", name, ",".join(sorted(privileges))) for name, privileges in sorted(custom.items())]


def _acl_lines(config: UserConfig) -> list[str]:
    """Members with the same roles share a line; those of root@pam mean nothing and are not kept."""
    lines = []
    for path, grants in sorted(config.acl.items()):
        for propagate in (False, True):
            members: dict[str, list[str]] = {}
            for member, roles in sorted(grants.items()):
                listed = ",".join(sorted(role for role, is_wide in roles.items() if is_wide == propagate))
                if listed and member != ROOT:
                    members.setdefault(listed, []).append(member)
            lines += [_line("acl", int(propagate), path, ",".join(who), listed) for listed, who in members.items()]
    return lines
