"""Who may do what on this node: users and their rights, kept in `user.cfg`, and the answer to "is this allowed?".

The configuration in use is never changed in place: a change works on a copy, which is written to the disk and then
put into use, so that readers need no lock. The rules of evaluation are Proxmox's (PVE::AccessControl::roles and
PVE::RPCEnvironment::permissions).
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from autovibe.node.access.privileges import NO_ACCESS, PRIVILEGES
from autovibe.node.access.user_config import Pool, Token, User, UserConfig, parse, render
from autovibe.node.files import replace_durably
from autovibe.node.refusal import Refusal
from autovibe.node.schema.names import ROOT, is_token, normalize_path

if TYPE_CHECKING:
    from autovibe.node.access.auth import Actor

_KEPT_ANSWERS = 4096  # answers kept until the next change; callers choose the paths, so there is a bound

_SHARING = {"storage": "Datastore.Allocate", "vms": "VM.Allocate", "pool": "Pool.Allocate"}

Privileges = dict[str, bool]
"""Each privilege that is held, and whether it holds below the path too; to be read only."""
_EVERYTHING: Privileges = dict.fromkeys(sorted(PRIVILEGES), True)


def forbidden(what: str = "") -> Refusal:
    return Refusal(f"Permission check failed ({what})" if what else "Permission check failed", status=403)


def _sharing_privileges(path: str) -> tuple[str, ...]:
    """Any of these lets one change the permissions on a path."""
    kind, _, name = path.removeprefix("/").partition("/")
    return ("Permissions.Modify", _SHARING[kind]) if name and kind in _SHARING else ("Permissions.Modify",)


class Access:
    """The users of one node. `home_token` is the full name of root's token in the home's file, which may everything."""

    def __init__(self, home: Path, home_token: str | None = None) -> None:
        self._file = home / "user.cfg"
        self._lock = threading.RLock()
        self.home_token = home_token
        for leftover in home.glob("user.cfg.*.new"):
            leftover.unlink()
        text = self._file.read_text(encoding="utf-8", errors="replace") if self._file.exists() else ""
        self._use(parse(text))
        if home_token is not None and is_token(home_token) and self.config.token(home_token) is None:
            with self.change() as config:
                config.users[ROOT].tokens[home_token.rpartition("!")[2]] = Token(privsep=False)

    def _use(self, config: UserConfig) -> None:
        # One object, so that no reader pairs an old configuration with new answers.
        self._current = (config, dict[tuple[str, str], Privileges]())

    @property
    def config(self) -> UserConfig:
        """What is in force now; to be read only."""
        return self._current[0]

    @contextlib.contextmanager
    def change(self, failing: str = "") -> Iterator[UserConfig]:
        """Change a copy: it is written and put into use at the end, or dropped when the block raises.

        `failing` goes before the text of a refusal, as Proxmox does ("create user failed: ...").
        """
        with self._lock:
            config = self.config.copy()
            try:
                yield config
            except Refusal as refusal:
                if failing and refusal.status == 500:
                    raise Refusal(f"{failing}: {refusal.message}") from None
                raise
            replace_durably(self._file, render(config))
            self._use(config)

    def allows(self, actor: Actor, path: str, *privileges: str, any: bool = False) -> bool:
        """Whether the actor has all of the privileges on a path, or `any` of them."""
        held = self.privileges(actor.name, path)
        found = [privilege in held for privilege in privileges]
        return True in found if any else False not in found

    def is_everything(self, actor: Actor) -> bool:
        """Whether the actor is root, or a token of root's that nothing separates from it."""
        if actor.name in (ROOT, self.home_token):
            return True
        token = self.config.token(actor.name)
        return actor.user == ROOT and token is not None and not token.privsep

    def require(self, actor: Actor, path: str, *privileges: str, any: bool = False) -> None:
        """Raises Proxmox's 403 for what is not allowed."""
        if not self.allows(actor, path, *privileges, any=any):
            missing = "|".join(privileges) if any else self._first_missing(actor, path, privileges)
            raise forbidden(f"{path}, {missing}")

    def _first_missing(self, actor: Actor, path: str, privileges: tuple[str, ...]) -> str:
        held = self.privileges(actor.name, path)
        return next((privilege for privilege in privileges if privilege not in held), "")

    def may_modify(self, actor: Actor, path: str) -> bool:
        """Whether the actor may change permissions on a path: an owner may share his own part of the tree."""
        return self.allows(actor, path, *_sharing_privileges(path), any=True)

    def require_sharing(self, actor: Actor, path: str) -> None:
        self.require(actor, path, *_sharing_privileges(path), any=True)

    def privileges(self, name: str, path: str) -> Privileges:
        """What a user (`user@realm`) or a token (`user@realm!token`) may on a path."""
        if name in (ROOT, self.home_token):
            return _EVERYTHING
        known = normalize_path(path)
        if known is None:
            return {}
        config, answers = self._current
        found = answers.get((name, known))
        if found is None:
            found = _privileges(config, name, known)
            if len(answers) < _KEPT_ANSWERS:
                answers[name, known] = found
        return found

    def require_enabled(self, name: str) -> User:
        """Raises the refusal of a user that is unknown, disabled or expired."""
        user = self.require_user(name)
        if not user.enable:
            raise Refusal(f"user '{name}' is disabled")
        if 0 < user.expire < time.time():
            raise Refusal(f"user '{name}' access expired")
        return user

    def require_user(self, name: str) -> User:
        if name not in self.config.users:
            raise Refusal(f"no such user ('{name}')")
        return self.config.users[name]

    def require_token(self, user: str, name: str) -> Token:
        token = self.require_user(user).tokens.get(name)
        if token is None:
            raise Refusal(f"no such token '{name}' for user '{user}'")
        return token

    def pools(self) -> dict[str, Pool]:
        return dict(self.config.pools)

    def pool_of(self, vmid: int) -> str | None:
        return self.config.pool_of(vmid)

    def require_pool(self, pool: str) -> None:
        """Raises what Proxmox says to who would put a new VM into a pool that is not there: a 403."""
        if pool not in self.config.pools:
            raise forbidden(f"pool '{pool}' does not exist")

    def join_pool(self, pool: str, vmid: int) -> None:
        """Put a VM into a pool, out of the one it may be in."""
        with self.change() as config:
            if pool not in config.pools:
                raise Refusal(f"pool '{pool}' does not exist")
            _take_out(config, vmid)
            config.pools[pool].vms.add(vmid)

    def leave_pools(self, vmid: int) -> None:
        """Take a VM that was not made after all out of its pool."""
        if self.pool_of(vmid) is not None:
            with self.change() as config:
                _take_out(config, vmid)

    def forget_vm(self, vmid: int) -> None:
        """Drop a destroyed VM's pool and the permissions on it: the next of its number is another VM."""
        path = f"/vms/{vmid}"
        if self.pool_of(vmid) is not None or self.config.knows_path(path):
            with self.change() as config:
                _take_out(config, vmid)
                config.forget_path(path)

    def forget_storage(self, storage: str) -> None:
        """The same for a storage."""
        path = f"/storage/{storage}"
        if self.config.knows_path(path) or any(storage in pool.storage for pool in self.config.pools.values()):
            with self.change() as config:
                for pool in config.pools.values():
                    pool.storage.discard(storage)
                config.forget_path(path)


def _take_out(config: UserConfig, vmid: int) -> None:
    for pool in config.pools.values():
        pool.vms.discard(vmid)


def _privileges(config: UserConfig, name: str, path: str) -> Privileges:
    if not is_token(name):
        return _of_member(config, name, path) if name in config.users else {}
    token, user = config.token(name), name.rpartition("!")[0]
    if token is None:
        return {}
    of_user = _EVERYTHING if user == ROOT else _of_member(config, user, path)
    if not token.privsep:
        return of_user
    own = _of_member(config, name, path)
    return {privilege: is_wide and of_user[privilege] for privilege, is_wide in own.items() if privilege in of_user}


def _of_member(config: UserConfig, member: str, path: str) -> Privileges:
    roles = _with_pools(config, member, path, _roles(config, member, path))
    found: Privileges = {}
    for role, is_wide in roles.items():
        for privilege in config.roles.get(role, ()):
            found[privilege] = found.get(privilege, False) or is_wide
    return found


def _roles(config: UserConfig, member: str, path: str) -> dict[str, bool]:
    """The roles on a path: those of its nearest part that grants any, a member's own before those of its groups."""
    groups = [f"@{group}" for group in config.groups_of(member)]
    roles: dict[str, bool] = {}
    for part in _parts(path):
        grants = config.acl.get(part)
        if grants is None:
            continue
        own = _holding(grants.get(member, {}), is_final=part == path)
        of_groups: dict[str, bool] = {}
        for group in groups:
            of_groups |= _holding(grants.get(group, {}), is_final=part == path)
        roles = own or of_groups or roles
    return {NO_ACCESS: roles[NO_ACCESS]} if NO_ACCESS in roles else roles


def _holding(roles: dict[str, bool], *, is_final: bool) -> dict[str, bool]:
    return {role: is_wide for role, is_wide in roles.items() if is_final or is_wide}


def _parts(path: str) -> list[str]:
    """`/`, `/vms`, `/vms/100`: a path from the top down."""
    names = [name for name in path.split("/") if name]
    return ["/", *("/" + "/".join(names[: count + 1]) for count in range(len(names)))]


def _with_pools(config: UserConfig, member: str, path: str, roles: dict[str, bool]) -> dict[str, bool]:
    """Roles with those that a pool gives its members; NoAccess, here or there, outweighs all."""
    if NO_ACCESS in roles:
        return roles
    kind, _, name = path.removeprefix("/").partition("/")
    vmid = int(name) if kind == "vms" and re.fullmatch("[1-9][0-9]*", name) else None
    for pool_name, pool in config.pools.items():
        if vmid in pool.vms or (kind == "storage" and name in pool.storage):
            of_pool = _roles(config, member, f"/pool/{pool_name}")
            if NO_ACCESS in of_pool:
                return {NO_ACCESS: False}
            roles = {**dict.fromkeys(of_pool, False), **roles}
    return roles
