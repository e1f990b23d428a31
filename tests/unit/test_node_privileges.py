"""Users, roles and permissions without a node: the file they are kept in, and the answers, held against an oracle."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autovibe.node.access import Access
from autovibe.node.access.auth import Actor
from autovibe.node.access.credentials import Credentials
from autovibe.node.access.permissions import (
    ALL_USERS,
    ROOT_ONLY,
    WORLD,
    Need,
    PermModify,
    UserGroup,
    UserParam,
    both,
    either,
    perm,
    require,
)  # fmt: skip
from autovibe.node.access.privileges import BUILT_IN_ROLES, PRIVILEGES
from autovibe.node.access.user_config import Group, Pool, Token, User, UserConfig, parse, render
from autovibe.node.refusal import Refusal
from autovibe.node.schema.names import is_acl_path, normalize_path

# The file

_TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@settings(max_examples=60, deadline=None)
@given(_TEXTS, _TEXTS, _TEXTS, st.integers(0, 10**12), st.booleans())
def test_any_text_comes_back_from_the_file(one: str, two: str, three: str, expire: int, flag: bool) -> None:
    config = parse("")
    config.users["a@pve"] = User(flag, expire, one, two, "a@b", three, "k", {"t1": Token(expire, flag, one)})
    config.groups["g"] = Group({"a@pve"}, two)
    config.pools["p"] = Pool(three, {100, 7}, {"local"})
    config.roles["R"] = frozenset({"VM.Audit"})
    config.acl["/vms/100"] = {"a@pve": {"R": flag, "NoAccess": not flag}, "@g": {"R": flag}, "a@pve!t1": {"R": True}}
    text = render(config)
    assert len(text.splitlines()) == len(text.split("\n")) - 1  # nothing but \n ends a line
    again = parse(text)
    assert again == config
    assert render(again) == text


def test_the_lines_are_proxmoxs() -> None:
    text = (
        "user:a@pve:1:0:A:B:a@b.c:it%3As:k:\ntoken:a@pve!ci:0:1::\nuser:root@pam:1:0::::::\n\n"
        "group:g:a@pve:we:\n\npool:p:c:100,101:local:\n\nrole:R:VM.Audit,VM.Clone:\n\n"
        "acl:1:/:@g,a@pve!ci:PVEAuditor,R:\nacl:0:/vms/100:a@pve:R:\n"
    )
    assert render(parse(text)) == text


def test_lines_that_make_no_sense_are_dropped() -> None:
    lines = (
        "", "nonsense", "user:bad:1:0::::::", "user:a@pve:1:x::::::", "token:a@pve!t1:0:1::", "token:root@pam:0:1::",
        "group:a/b::", "pool:a b::::", "role:PVEAdmin:VM.Audit:", "role:R:VM.Audit,VM.Nope:", "acl:1:/:no@pve!x:R:",
        "acl:1:/v ms:root@pam:R:", "acl:1:/:root@pam:Nope:", "acl", "user", "pool:p::100,x,100:lo/cal,local:",
    )  # fmt: skip
    config = parse("\n".join(lines))
    assert (config.users, config.groups) == ({"root@pam": User()}, {})
    assert config.roles == {**BUILT_IN_ROLES, "R": frozenset({"VM.Audit"})}
    assert config.pools == {"p": Pool("", {100}, {"local"})}
    assert config.acl == {}


def test_the_built_in_roles_are_those_of_pve_9() -> None:
    assert len(BUILT_IN_ROLES) == 18
    assert len(PRIVILEGES) == 47
    assert BUILT_IN_ROLES["Administrator"] == PRIVILEGES
    only_root = {"Permissions.Modify", "Realm.Allocate", "Sys.AccessNetwork", "Sys.Incoming", "Sys.Modify"}
    assert PRIVILEGES - BUILT_IN_ROLES["PVEAdmin"] == only_root | {"Sys.PowerMgmt", "Mapping.Modify"}
    assert BUILT_IN_ROLES["PVESysAdmin"] == {"Sys.Audit", "Sys.Console", "Sys.Syslog"}
    assert BUILT_IN_ROLES["PVEUserAdmin"] == {"Group.Allocate", "Realm.AllocateUser", "User.Modify"}
    assert all(name.endswith(".Audit") for name in BUILT_IN_ROLES["PVEAuditor"])


def test_paths_have_one_form() -> None:
    assert [normalize_path(path) for path in ("/", "//vms//100/", "vms", "", "/a b", "/é", "/vms/1\n")] == [
        "/", "/vms/100", "/vms", None, None, None, None,
    ]  # fmt: skip
    assert normalize_path("/a" * 300) is None
    good = ("/", "/access/groups/g", "/pool/a/b/c", "/sdn/zones/z/v/12", "/storage/local", "/vms/100", "/mapping/pci/x")
    assert all(map(is_acl_path, good))
    assert not any(map(is_acl_path, ("/vms/0100", "/vms/x", "/nope", "/pool/a/b/c/d", "/storage/a/b", "/access/x")))


def test_parallel_changes_all_count(tmp_path: Path) -> None:
    access = Access(tmp_path)

    def add(number: int) -> None:
        with access.change() as config:
            config.groups[f"g{number}"] = Group()

    threads = [threading.Thread(target=add, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Access(tmp_path).config.groups) == 20


def test_a_change_that_fails_changes_nothing(tmp_path: Path) -> None:
    access = Access(tmp_path, "root@pam!autovibe")
    before = (tmp_path / "user.cfg").read_text()

    def fail(error: Exception) -> None:
        with access.change("it failed") as config:
            config.users["a@pve"] = User()
            raise error

    for error, text in ((Refusal("no"), "it failed: no"), (KeyError("x"), "'x'")):
        with pytest.raises(type(error), match=text):
            fail(error)
    assert "a@pve" not in access.config.users
    assert (tmp_path / "user.cfg").read_text() == before


def test_a_copy_shares_nothing_that_changes() -> None:
    config = parse("")
    config.users["a@pve"] = User(tokens={"t1": Token()})
    config.groups, config.pools = {"g": Group({"a@pve"})}, {"p": Pool("", {100}, {"local"})}
    config.acl = {"/": {"a@pve": {"PVEAdmin": True}}}
    before, other = render(config), config.copy()
    assert other == config
    other.users["a@pve"].tokens["t1"].expire = 9
    other.users["a@pve"].comment = "x"
    other.users["a@pve"].tokens["t2"] = Token()
    other.groups["g"].users.clear()
    other.pools["p"].vms.add(101)
    other.pools["p"].storage.add("other")
    other.acl["/"]["a@pve"]["PVEAdmin"] = False
    other.roles["R"] = frozenset()
    assert render(config) == before


def test_credentials_forget_users_with_their_tokens(tmp_path: Path) -> None:
    credentials = Credentials(tmp_path)
    credentials.set_password("a@pve", "one")
    values = {name: credentials.make_token(name) for name in ("a@pve!t1", "a@pve!t2", "ab@pve!t1")}
    again = Credentials(tmp_path)
    assert again.is_password("a@pve", "one")
    assert not again.is_password("a@pve", "two")
    assert not again.is_password("nobody@pve", "one")
    assert all(again.is_token(name, value) for name, value in values.items())
    assert not again.is_token("a@pve!t1", values["a@pve!t2"])
    again.forget("a@pve!t1")
    assert [again.is_token(name, value) for name, value in values.items()] == [False, True, True]
    again.forget("a@pve")
    assert [again.is_token(name, value) for name, value in values.items()] == [False, False, True]
    assert not Credentials(tmp_path).is_password("a@pve", "one")


# The answers

_USERS = ("a@pve", "b@pve")
_TOKENS = ("a@pve!sep", "a@pve!full", "root@pam!sep", "root@pam!full")
_MEMBERS = (*_USERS, *_TOKENS, "@g1", "@g2")
_PATHS = ("/", "/vms", "/vms/100", "/vms/101", "/storage", "/storage/local", "/pool", "/pool/p", "/pool/p/q", "/pool/r")
_ROLES = ("Audit", "Power", "Both", "NoAccess")
_GRANT = st.tuples(
    st.sampled_from(_PATHS), st.sampled_from(_MEMBERS), st.sampled_from(_ROLES), st.booleans()
)  # fmt: skip


@st.composite
def _configs(draw: Callable[[Any], Any]) -> UserConfig:
    config = parse("")
    tokens = {"sep": Token(privsep=True), "full": Token(privsep=False)}
    config.users = {"a@pve": User(tokens=dict(tokens)), "b@pve": User(), "root@pam": User(tokens=dict(tokens))}
    config.groups = {name: Group(draw(st.sets(st.sampled_from(_USERS)))) for name in ("g1", "g2")}
    config.roles |= {
        "Audit": frozenset({"VM.Audit"}), "Power": frozenset({"VM.PowerMgmt"}),
        "Both": frozenset({"VM.Audit", "VM.PowerMgmt"}),
    }  # fmt: skip
    in_pool = draw(st.sampled_from((None, "p", "p/q", "r")))
    config.pools = {
        name: Pool("", {100} if name == in_pool else set(), draw(st.sets(st.just("local"))))
        for name in ("p", "p/q", "r")
    }
    for path, member, role, propagate in draw(st.lists(_GRANT, max_size=12)):
        config.acl.setdefault(path, {}).setdefault(member, {})[role] = propagate
    return config


def _expected(config: UserConfig, name: str, path: str) -> set[str]:
    """The rules as the manual of Proxmox tells them, from the path up, without regard to how the node does it."""
    if name == "root@pam" or name == "root@pam!full":
        return set(PRIVILEGES)
    user, _, token = name.partition("!")
    if token == "full":
        return _expected(config, user, path)
    held = _held(config, name, path)
    return held if not token or user == "root@pam" else held & _expected(config, user, path)


def _held(config: UserConfig, member: str, path: str) -> set[str]:
    roles = _nearest(config, member, path)
    if "NoAccess" in roles:
        return set()
    for name, pool in config.pools.items():
        if path in {*(f"/vms/{vmid}" for vmid in pool.vms), *(f"/storage/{storage}" for storage in pool.storage)}:
            roles |= _nearest(config, member, f"/pool/{name}")
    return set() if "NoAccess" in roles else {privilege for role in roles for privilege in config.roles[role]}


def _nearest(config: UserConfig, member: str, path: str) -> set[str]:
    groups = [f"@{name}" for name, group in config.groups.items() if member in group.users]
    place = path
    while True:
        grants = config.acl.get(place, {})
        for members in ([member], groups):
            found = {
                role
                for one in members
                for role, propagates in grants.get(one, {}).items()
                if propagates or place == path
            }
            if found:
                return {"NoAccess"} if "NoAccess" in found else found
        if place == "/":
            return set()
        place = place.rpartition("/")[0] or "/"


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_configs())
def test_privileges_are_what_the_rules_say(tmp_path: Path, config: UserConfig) -> None:
    (tmp_path / "user.cfg").write_text(render(config))
    access = Access(tmp_path)
    for name in (*_USERS, *_TOKENS, "root@pam", "nobody@pve", "a@pve!none"):
        for path in (*_PATHS, "/vms/102", "/vms/100/x", "/nodes"):
            known = name in (*_USERS, *_TOKENS, "root@pam")
            assert set(access.privileges(name, path)) == (_expected(config, name, path) if known else set()), name


def test_nobody_has_nothing(tmp_path: Path) -> None:
    for access in (Access(tmp_path), Access(tmp_path, "root@pam!autovibe")):
        assert [access.privileges(name, "/") for name in ("", "!", "root@pam!", "root", "@pam")] == [{}] * 5
        assert not access.allows(Actor(""), "/", "VM.Audit")


# The rules of routes


@pytest.fixture
def access(tmp_path: Path) -> Access:
    """Of alice's own: VM.Audit on VM 100 and all about groups `g`; the pool `p` for its creator."""
    config = parse("")
    config.users |= {"alice@pve": User(tokens={"t1": Token(privsep=False)}), "bob@pve": User(), "carl@pve": User()}
    config.groups = {"g": Group({"bob@pve"}), "h": Group({"carl@pve"})}
    config.acl = {
        "/vms/100": {"alice@pve": {"PVETemplateUser": True}},
        "/pool/p": {"alice@pve": {"PVEPoolAdmin": True}},
        "/access/groups/g": {"alice@pve": {"PVEUserAdmin": True}},
        "/access/realm/pve": {"alice@pve": {"PVEUserAdmin": True}},
    }
    (tmp_path / "user.cfg").write_text(render(config))
    return Access(tmp_path)


_AUDIT, _ALLOCATE = perm("/vms/{vmid}", "VM.Audit"), perm("/vms/{vmid}", "VM.Allocate")
_MODIFY, _CREATE = UserGroup(("User.Modify",)), UserGroup(("User.Modify",), "create")


@pytest.mark.parametrize(
    ("need", "parameters", "refused"),
    [
        (WORLD, {}, None),
        (ALL_USERS, {}, None),
        (ROOT_ONLY, {}, " (user != root@pam)"),
        (_AUDIT, {"vmid": "100"}, None),
        (_AUDIT, {"vmid": 100}, None),
        (_AUDIT, {"vmid": "101"}, " (/vms/101, VM.Audit)"),
        (_AUDIT, {}, " (/vms, VM.Audit)"),
        (_AUDIT, {"vmid": ["100"]}, " (/vms, VM.Audit)"),
        (_AUDIT, {"vmid": "1 00\n"}, " (, VM.Audit)"),
        (perm("/vms/{vmid}", "VM.Audit", "VM.Clone", "VM.Backup"), {"vmid": 100}, " (/vms/100, VM.Backup)"),
        (perm("/vms/{vmid}", "VM.Backup", "VM.Clone", any=True), {"vmid": 100}, None),
        (perm("/vms/{vmid}", "VM.Backup", "VM.Console", any=True), {"vmid": 100}, " (/vms/100, VM.Backup|VM.Console)"),
        (perm("/pool/{pool}", "Pool.Audit", param="pool"), {"pool": "p"}, None),
        (perm("/pool/{pool}", "Pool.Audit", param="pool"), {}, ""),
        (both(_AUDIT, _ALLOCATE), {"vmid": 100}, " (/vms/100, VM.Allocate)"),
        (either(_ALLOCATE, _AUDIT), {"vmid": 100}, None),
        (either(_ALLOCATE, _AUDIT), {"vmid": 101}, ""),
        (either(_ALLOCATE, both(_AUDIT, _ALLOCATE)), {"vmid": 100}, " (/vms/100, VM.Allocate)"),
        (PermModify("{path}"), {"path": "/pool/p"}, None),
        (PermModify("{path}"), {"path": "pool//p/"}, None),
        (PermModify("{path}"), {"path": "/pool"}, " (/pool, Permissions.Modify)"),
        (PermModify("{path}"), {"path": "/vms/100"}, " (/vms/100, Permissions.Modify|VM.Allocate)"),
        (PermModify("{path}"), {"path": "a b"}, " (, Permissions.Modify)"),
        (UserParam("self"), {"userid": "alice@pve"}, None),
        (UserParam("self"), {"userid": "bob@pve"}, ""),
        (UserParam("Realm.AllocateUser"), {"userid": "new@pve"}, None),
        (UserParam("Realm.AllocateUser"), {"userid": "new@pam"}, " (/access/realm/pam, Realm.AllocateUser)"),
        (_MODIFY, {"userid": "bob@pve"}, None),
        (_MODIFY, {"userid": "carl@pve"}, ""),
        (UserGroup(("User.Modify",), "create"), {"userid": "new@pve", "groups": "g"}, None),
        (UserGroup(("User.Modify",), "create"), {"userid": "new@pve"}, " (/access/groups, User.Modify)"),
        (
            UserGroup(("User.Modify",), "create"),
            {"userid": "n@pve", "groups": "g,h"},
            " (/access/groups/h, User.Modify)",
        ),
        (UserGroup(("User.Modify",), "update"), {"userid": "bob@pve", "groups": "g"}, None),
        (UserGroup(("User.Modify",), "update"), {"userid": "carl@pve", "groups": "g"}, ""),
    ],
)
def test_every_kind_of_rule(access: Access, need: Need, parameters: dict[str, Any], refused: str | None) -> None:
    actors = [Actor("alice@pve")]
    if need != UserParam("self"):  # a token is not its user
        actors.append(Actor("alice@pve", "t1"))
    for actor in actors:
        if refused is None:
            require(need, access, actor, parameters)
            continue
        with pytest.raises(Refusal) as raised:
            require(need, access, actor, parameters)
        assert (raised.value.status, raised.value.message) == (403, f"Permission check failed{refused}")
    require(need, access, Actor("root@pam"), parameters)


def test_rules_about_users_that_are_not_there_are_plain_refusals(access: Access) -> None:
    for need, userid, message in (
        (_MODIFY, "x@pve", "no such user ('x@pve')"),
        (UserParam("Realm.AllocateUser"), "x", "value 'x' does not look like a valid user name"),
    ):
        with pytest.raises(Refusal) as raised:
            require(need, access, Actor("alice@pve"), {"userid": userid})
        assert (raised.value.status, raised.value.message) == (500, message)
    with pytest.raises(Refusal, match="Permission check failed"):
        require(either(UserParam("self"), _MODIFY), access, Actor("alice@pve"), {"userid": "x@pve"})
