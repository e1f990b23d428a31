"""Access control of the node over its API: who gets in, who may do what, who manages whom."""

from __future__ import annotations

import copy
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
from proxmoxer import ProxmoxAPI
from proxmoxer.core import ResourceException

from autovibe.node.access import auth
from autovibe.node.access.auth import Actor
from tests.contract.node_parts import Answer, Client, FlagQemu, make_node
from tests.contract.pve_reference import exchanges

N = "/nodes/pvetest"
PASSWORD = "correct horse"
ALICE = "alice@pve"


@pytest.fixture(autouse=True)
def _quick_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "FAILED_LOGIN_DELAY_SECONDS", 0.01)
    monkeypatch.setattr("autovibe.node.verbs.access.FAILED_LOGIN_DELAY_SECONDS", 0.01)


def make_user(client: Client, name: str = ALICE, **facts: Any) -> None:
    assert client.ask("POST", "/access/users", {"userid": name, "password": PASSWORD, **facts}).data is None


def grant(client: Client, path: str, role: str, *, propagate: int = 1, **members: str) -> None:
    fields = {"path": path, "roles": role, "propagate": propagate, **members}
    assert client.ask("PUT", "/access/acl", fields).data is None


def make_vms(client: Client, *vmids: int) -> None:
    for vmid in vmids:
        client.node.state.configs.create(vmid, {"name": f"vm{vmid}", "memory": "64"})


def by_token(client: Client, user: str = ALICE, name: str = "ci", **facts: Any) -> Client:
    made = client.ask("POST", f"/access/users/{user}/token/{name}", facts).data
    other = copy.copy(client)
    other.authorization = f"PVEAPIToken={made['full-tokenid']}={made['value']}"
    return other


class Ticket(Client):
    """The same API with a ticket of a user's."""

    def __init__(self, client: Client, user: str = ALICE, password: str = PASSWORD) -> None:
        super().__init__(client.node)
        fields = {"username": user, "password": password}
        self.login = client.ask("POST", "/access/ticket", fields, headers={}).data
        self.headers = {
            "Cookie": f"PVEAuthCookie={self.login['ticket']}",
            "CSRFPreventionToken": self.login["CSRFPreventionToken"],
        }

    def ask(self, method: str, path: str, fields: Any = None, **more: Any) -> Answer:
        return super().ask(method, path, fields, **{"headers": self.headers, **more})


def root(client: Client) -> Ticket:
    return Ticket(client, "root@pam", (client.node.home / "password").read_text().strip())


def refusal(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.reason


def denied(what: str) -> tuple[int, str]:
    return 403, f"Permission check failed ({what})" if what else "Permission check failed"


# Who gets in


def test_proxmoxer_logs_in_with_a_users_password_and_may_what_its_role_says(client: Client) -> None:
    make_user(client)
    make_vms(client, 100, 101)
    grant(client, "/vms/100", "PVEVMUser", users=ALICE)
    api = ProxmoxAPI(
        "127.0.0.1", port=client.node.port, user=ALICE, password=PASSWORD, timeout=30,
        verify_ssl=str(client.node.home / "cert.pem"),
    )  # fmt: skip
    vm = api.nodes("pvetest").qemu(100)
    assert vm.config.get()["name"] == "vm100"
    assert client.end_of(vm.status.start.post()) == "OK"
    for forbidden, what in (
        (lambda: api.nodes("pvetest").qemu(101).config.get(), "/vms/101, VM.Audit"),
        (lambda: vm.snapshot.post(snapname="s1"), "/vms/100, VM.Snapshot"),
        (lambda: vm.delete(), "/vms/100, VM.Allocate"),
        (lambda: api.nodes("pvetest").status.get(), "/nodes/pvetest, Sys.Audit"),
    ):
        with pytest.raises(ResourceException) as refused:
            forbidden()
        assert (refused.value.status_code, refused.value.content) == denied(what)


def test_an_upload_that_is_not_allowed_is_refused_and_not_kept(client: Client, tmp_path: Path) -> None:
    make_user(client)
    image = tmp_path / "x.iso"
    image.write_bytes(b"x" * (8 << 20))
    api = ProxmoxAPI(
        "127.0.0.1", port=client.node.port, user=ALICE, password=PASSWORD, timeout=30,
        verify_ssl=str(client.node.home / "cert.pem"),
    )  # fmt: skip
    for _ in range(3):
        with image.open("rb") as file, pytest.raises(ResourceException) as refused:
            api.nodes("pvetest").storage("local").upload.post(content="iso", filename=file)
        assert refused.value.status_code == 403
    assert list((client.node.home / "uploads").iterdir()) == []


def test_proxmoxer_with_a_separated_token_may_what_token_and_user_may(client: Client) -> None:
    make_user(client)
    make_vms(client, 100, 101)
    made = client.ask("POST", f"/access/users/{ALICE}/token/ci", {"comment": "for ci"}).data
    assert made == {
        "full-tokenid": f"{ALICE}!ci",
        "info": {"privsep": 1, "comment": "for ci"},
        "value": made["value"],
    }
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", made["value"])
    grant(client, "/vms", "PVEVMAdmin", users=ALICE)
    grant(client, "/vms/100", "PVEVMUser", tokens=f"{ALICE}!ci")
    grant(client, "/storage", "PVEDatastoreAdmin", tokens=f"{ALICE}!ci")
    api = ProxmoxAPI(
        "127.0.0.1", port=client.node.port, user=ALICE, token_name="ci", token_value=made["value"], timeout=30,
        verify_ssl=str(client.node.home / "cert.pem"),
    )  # fmt: skip
    node = api.nodes("pvetest")
    assert client.end_of(node.qemu(100).status.start.post()) == "OK"
    for forbidden, what in (
        (lambda: node.qemu(101).config.get(), "/vms/101, VM.Audit"),  # the user may, the token has nothing there
        (lambda: node.qemu(100).snapshot.post(snapname="s1"), "/vms/100, VM.Snapshot"),
        (  # the token has the privilege, its user has not
            lambda: node.storage("local").status.get(),
            "/storage/local, Datastore.Audit|Datastore.AllocateSpace",
        ),
    ):
        with pytest.raises(ResourceException) as refused:
            forbidden()
        assert (refused.value.status_code, refused.value.content) == denied(what)
    client.ask("PUT", f"/access/users/{ALICE}/token/ci", {"privsep": 0}).data  # noqa: B018 - it must succeed
    assert node.qemu(101).config.get()["name"] == "vm101"


def test_a_ticket_is_of_one_user_and_so_is_its_csrf_token(client: Client) -> None:
    make_user(client)
    make_user(client, "bob@pve")
    alice, bob = Ticket(client), Ticket(client, "bob@pve")
    assert alice.login["username"] == ALICE
    mixed = {**alice.headers, "CSRFPreventionToken": bob.login["CSRFPreventionToken"]}
    fields = {"userid": ALICE, "password": "new password", "confirmation-password": PASSWORD}
    refused = alice.ask("PUT", "/access/password", fields, headers=mixed)
    assert refusal(refused) == (401, "Permission denied - invalid csrf token")
    forged = alice.login["ticket"].replace("PVE:alice@pve:", "PVE:bob@pve:")
    for ticket in (forged, forged.replace("bob@pve", "root@pam"), alice.login["ticket"][:-1]):
        answer = client.ask("GET", "/version", headers={"Cookie": f"PVEAuthCookie={ticket}"})
        assert refusal(answer) == (401, "permission denied - invalid PVE ticket")


def test_a_ticket_renews_itself_and_roots_is_good_for_anybody(client: Client) -> None:
    make_user(client)
    make_user(client, "bob@pve")
    ticket = Ticket(client).login["ticket"]
    assert Ticket(client, ALICE, ticket).login["username"] == ALICE
    assert Ticket(client, "bob@pve", root(client).login["ticket"]).login["username"] == "bob@pve"
    stolen = client.ask("POST", "/access/ticket", {"username": "bob@pve", "password": ticket}, headers={})
    assert refusal(stolen) == (401, "authentication failure")


def test_tickets_last_two_hours(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    make_user(client)
    alice, now = Ticket(client), time.time()
    for age, status in ((7100, 200), (7300, 401), (-400, 401)):
        monkeypatch.setattr(auth.time, "time", lambda age=age: now + age)
        assert alice.ask("GET", "/version").status == status


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"enable": 0}, "user 'alice@pve' is disabled"),
        ({"expire": 1000}, "user 'alice@pve' access expired"),
    ],
)
def test_disabled_and_expired_users_are_out_at_once(client: Client, facts: dict[str, int], reason: str) -> None:
    make_user(client)
    ticket, token = Ticket(client), by_token(client)
    assert client.ask("PUT", f"/access/users/{ALICE}", facts).data is None
    assert refusal(ticket.ask("GET", "/version")) == (401, reason)
    assert refusal(token.ask("GET", "/version")) == (401, "Authentication failed!")
    login = client.ask("POST", "/access/ticket", {"username": ALICE, "password": PASSWORD}, headers={})
    assert refusal(login) == (401, "authentication failure")
    client.ask("PUT", f"/access/users/{ALICE}", {"enable": 1, "expire": int(time.time()) + 60})
    assert ticket.ask("GET", "/version").status == token.ask("GET", "/version").status == 200


def test_expired_regenerated_and_deleted_tokens_are_out_at_once(client: Client) -> None:
    make_user(client)
    token, path = by_token(client), f"/access/users/{ALICE}/token/ci"
    assert token.get("/version")["release"] == "9.2"
    assert client.ask("PUT", path, {"expire": 1000}).data == {"expire": 1000, "privsep": 1}
    assert token.ask("GET", "/version").status == 401
    assert client.ask("PUT", path, {"delete": "expire"}).data == {"expire": 0, "privsep": 1}
    assert token.ask("GET", "/version").status == 200
    made = client.ask("PUT", path, {"regenerate": 1}).data
    assert token.ask("GET", "/version").status == 401
    token.authorization = f"PVEAPIToken={made['full-tokenid']}={made['value']}"
    assert token.ask("GET", "/version").status == 200
    assert client.ask("DELETE", path).data is None
    assert refusal(token.ask("GET", "/version")) == (401, "Authentication failed!")
    assert refusal(client.ask("DELETE", path)) == (500, "no such token 'ci' for user 'alice@pve'")


def test_who_gets_a_deleted_users_name_gets_nothing_else_of_him(client: Client) -> None:
    make_user(client)
    token = by_token(client, privsep=0)
    client.ask("POST", "/access/groups", {"groupid": "g"})
    client.ask("PUT", f"/access/users/{ALICE}", {"groups": "g"})
    grant(client, "/", "Administrator", users=ALICE, tokens=f"{ALICE}!ci")
    assert client.ask("DELETE", f"/access/users/{ALICE}").data is None
    assert client.ask("POST", "/access/users", {"userid": ALICE}).data is None
    assert token.ask("GET", "/version").status == 401
    login = client.ask("POST", "/access/ticket", {"username": ALICE, "password": PASSWORD}, headers={})
    assert refusal(login) == (401, "authentication failure")
    assert client.get(f"/access/users/{ALICE}") == {"enable": 1, "expire": 0, "groups": []}
    assert client.get("/access/acl") == []


def test_users_change_their_own_password_with_the_one_they_have(client: Client) -> None:
    make_user(client)
    make_user(client, "bob@pve")
    alice, token = Ticket(client), by_token(client, privsep=0)
    fields = {"userid": ALICE, "password": "another one"}
    unconfirmed = alice.ask("PUT", "/access/password", fields)
    assert unconfirmed.json["errors"] == {"confirmation-password": "password is required to modify user"}
    wrong = alice.ask("PUT", "/access/password", {**fields, "confirmation-password": "not mine"})
    assert refusal(wrong) == (500, "invalid credentials")
    others = {"userid": "bob@pve", "password": "another one", "confirmation-password": PASSWORD}
    assert refusal(alice.ask("PUT", "/access/password", others)) == denied("/access/realm/pve, Realm.AllocateUser")
    assert refusal(token.ask("PUT", "/access/password", fields))[0] == 403
    by_root = client.ask("PUT", "/access/password", fields)
    assert by_root.reason.startswith("Permission check failed (URI '/access/password' not available with API token")
    assert alice.ask("PUT", "/access/password", {**fields, "confirmation-password": PASSWORD}).data is None
    assert Ticket(client, ALICE, "another one").ask("GET", "/version").status == 200
    assert client.ask("POST", "/access/ticket", {"username": ALICE, "password": PASSWORD}, headers={}).status == 401


def test_roots_password_is_the_homes_file(client: Client) -> None:
    boss = root(client)
    fields = {"userid": "root@pam", "password": "a new password"}
    assert boss.ask("PUT", "/access/password", fields).data is None
    assert (client.node.home / "password").read_text() == "a new password\n"
    assert (client.node.home / "password").stat().st_mode & 0o077 == 0
    assert root(client).ask("GET", "/version").status == 200
    blank = boss.ask("PUT", "/access/password", {**fields, "password": " " * 8})
    assert blank.status == 500
    assert client.ask("POST", "/access/ticket", {"username": "root@pam", "password": ""}, headers={}).status == 401
    fields = {"userid": "joe@pam", "password": "a new password"}
    client.ask("POST", "/access/users", {"userid": "joe@pam"})
    assert boss.ask("PUT", "/access/password", fields).reason == "change password failed: user 'joe' does not exist"


def test_vnc_tickets_are_of_one_user_path_and_port_for_seconds(client: Client, monkeypatch: Any) -> None:
    make_user(client)
    grant(client, "/vms/100", "PVEVMUser", users=ALICE)
    auth_, now = client.node.state.auth, time.time()
    ticket = auth_.vnc_ticket(Actor(ALICE), "/vms/100", 5900)
    assert re.fullmatch(r"PVEVNC:[0-9A-F]{8}::\S+", ticket)
    good = {"authid": ALICE, "vncticket": ticket, "path": "/vms/100", "privs": "VM.Console", "port": 5900}
    assert client.ask("POST", "/access/vncticket", good, headers={}).data is None
    for change in (
        {"authid": "root@pam"}, {"path": "/vms/101"}, {"port": 5901}, {"privs": "VM.Allocate"},
        {"vncticket": ticket[:-1]}, {"vncticket": Ticket(client).login["ticket"]},
    ):  # fmt: skip
        refused = client.ask("POST", "/access/vncticket", {**good, **change}, headers={})
        assert refusal(refused) == (401, "authentication failure"), change
    monkeypatch.setattr(auth.time, "time", lambda: now + 60)
    assert not auth_.is_vnc_ticket_valid(ticket, ALICE, "/vms/100", 5900)


def test_a_login_may_ask_for_privileges_instead_of_a_ticket(client: Client) -> None:
    make_user(client)
    grant(client, "/vms/100", "PVEVMUser", users=ALICE)
    fields = {"username": "alice", "realm": "pve", "password": PASSWORD, "path": "/vms/100", "privs": "VM.Console"}
    assert client.ask("POST", "/access/ticket", fields, headers={}).data.keys() == {"username", "cap"}
    refused = client.ask("POST", "/access/ticket", {**fields, "path": "/vms/101"}, headers={})
    assert refusal(refused) == (401, "authentication failure")


# Who may do what


def test_capabilities_and_permissions_are_the_users_own(client: Client) -> None:
    make_user(client)
    make_user(client, "bob@pve")
    grant(client, "/vms/100", "PVETemplateUser", users=ALICE, propagate=0)
    alice = Ticket(client)
    empty: dict[str, Any] = {area: {} for area in ("access", "dc", "mapping", "nodes", "sdn", "storage")}
    assert alice.login["cap"] == {**empty, "vms": {"VM.Audit": 1, "VM.Clone": 1}}
    assert alice.get("/access/permissions") == {"/vms/100": {"VM.Audit": 0, "VM.Clone": 0}}
    assert alice.get("/access/permissions?path=/vms/101") == {"/vms/101": {}}
    by_token(client)
    assert alice.get("/access/permissions", userid=f"{ALICE}!ci") == {}
    others = alice.ask("GET", "/access/permissions", {"userid": "bob@pve"})
    assert refusal(others) == denied("/access, Sys.Audit")
    assert client.get("/access/permissions", userid="nobody@pve") == {}
    grant(client, "/pool/p", "PVEVMUser,PVEDatastoreUser", users="bob@pve")
    held = Ticket(client, "bob@pve").login["cap"]
    assert "VM.Console" in held["vms"]
    assert "Datastore.AllocateSpace" in held["storage"]


def test_a_number_written_in_another_way_is_the_same_vm(client: Client) -> None:
    make_user(client)
    make_vms(client, 100)
    grant(client, "/vms", "PVEVMAdmin", users=ALICE)
    grant(client, "/vms/100", "NoAccess", users=ALICE)
    alice = Ticket(client)
    for text in ("100", "0100", "+100", "%2B100", "00000100"):
        assert alice.ask("GET", f"{N}/qemu/{text}/config").status in (400, 403), text
    grant(client, "/nodes", "PVEAuditor", users=ALICE)
    grant(client, "/nodes/pvetest", "NoAccess", users=ALICE)
    assert refusal(alice.ask("GET", "/nodes/localhost/status")) == denied("/nodes/pvetest, Sys.Audit")


@pytest.mark.parametrize("vmid", ["..", "100%2F..%2F101", "100%0a", "%00", "x" * 4000, "%ff", "{vmid}", "-1"])
def test_odd_values_in_paths_are_refused_like_others(client: Client, vmid: str) -> None:
    make_user(client)
    grant(client, "/vms/100", "PVEVMAdmin", users=ALICE)
    assert Ticket(client).ask("GET", f"{N}/qemu/{vmid}/config").status in (400, 403, 501)


def test_what_is_roots_own_is_for_no_token(client: Client) -> None:
    make_user(client)
    grant(client, "/", "Administrator", users=ALICE)
    state = client.node.state
    assert state.allows(Actor("root@pam", "autovibe"), "/anything", "Sys.Modify")
    assert not Actor("root@pam", "autovibe").is_root
    boss = by_token(client, "root@pam", "whole", privsep=0)
    assert boss.get("/access/permissions").keys() >= {"/", "/vms"}
    assert refusal(boss.ask("DELETE", "/access/users/root@pam/token/autovibe"))[0] == 500
    part = by_token(client, "root@pam", "part")
    assert part.get("/access/permissions") == {}
    for nearly in (part, Ticket(client)):  # neither makes itself root
        assert nearly.ask("POST", "/access/users/root@pam/token/mine", {"privsep": 0}).status == 403
        assert nearly.ask("PUT", "/access/users/root@pam/token/whole", {"regenerate": 1}).status == 403


def test_owners_share_their_part_of_the_tree_and_no_more_than_they_have(client: Client) -> None:
    for name in (ALICE, "bob@pve"):
        make_user(client, name)
    client.ask("POST", "/access/roles", {"roleid": "Owner", "privs": "VM.Allocate,VM.Audit"})
    client.ask("POST", "/access/roles", {"roleid": "Seeing", "privs": "VM.Audit"})
    grant(client, "/vms/100", "Owner", users=ALICE)
    alice, fields = Ticket(client), {"path": "/vms/100", "users": "bob@pve"}
    assert alice.ask("PUT", "/access/acl", {**fields, "roles": "Seeing"}).data is None
    assert [entry["ugid"] for entry in alice.get("/access/acl")] == [ALICE, "bob@pve"]
    for role, fault in (
        ("PVEVMUser", "Cannot add role 'PVEVMUser' - requires 'Permissions.Modify' or superset of privileges."),
        ("NoAccess", "Cannot add role 'NoAccess' - requires 'Permissions.Modify'"),
    ):
        refused = alice.ask("PUT", "/access/acl", {**fields, "roles": role})
        assert refused.json["errors"] == {"role": fault}
    elsewhere = alice.ask("PUT", "/access/acl", {**fields, "path": "/vms/101", "roles": "Seeing"})
    assert refusal(elsewhere) == denied("/vms/101, Permissions.Modify|VM.Allocate")
    top = alice.ask("PUT", "/access/acl", {**fields, "path": "/", "roles": "Seeing"})
    assert refusal(top) == denied("/, Permissions.Modify")
    assert Ticket(client, "bob@pve").get("/access/acl") == []


# Who manages whom


def test_users_are_managed_by_realm_and_group(client: Client) -> None:
    make_user(client)
    client.ask("POST", "/access/groups", {"groupid": "staff", "comment": "we"})
    client.ask("POST", "/access/groups", {"groupid": "other"})
    grant(client, "/access/groups/staff", "PVEUserAdmin", users=ALICE)
    alice, bob = Ticket(client), {"userid": "bob@pve"}
    no_realm = alice.ask("POST", "/access/users", {**bob, "groups": "staff"})
    assert refusal(no_realm) == denied("/access/realm/pve, Realm.AllocateUser")
    grant(client, "/access/realm/pve", "PVEUserAdmin", users=ALICE)
    assert refusal(alice.ask("POST", "/access/users", bob)) == denied("/access/groups, User.Modify")
    wrong = alice.ask("POST", "/access/users", {**bob, "groups": "staff,other"})
    assert refusal(wrong) == denied("/access/groups/other, User.Modify")
    assert alice.ask("POST", "/access/users", {**bob, "groups": "staff", "firstname": "B"}).data is None
    assert alice.get("/access/users/bob@pve")["groups"] == ["staff"]
    assert refusal(alice.ask("GET", "/access/users/root@pam")) == denied("")
    assert refusal(alice.ask("GET", "/access/users/nobody@pve")) == (500, "no such user ('nobody@pve')")
    away = alice.ask("PUT", "/access/users/bob@pve", {"groups": "other"})
    assert refusal(away) == denied("/access/groups/other, User.Modify")
    assert alice.ask("PUT", "/access/users/bob@pve", {"groups": "staff", "comment": "b"}).data is None
    assert [user["userid"] for user in alice.get("/access/users")] == [ALICE, "bob@pve"]
    assert [user["userid"] for user in client.get("/access/users")] == [ALICE, "bob@pve", "root@pam"]
    assert alice.ask("POST", "/access/users/bob@pve/token/t1", {"privsep": 0}).data["info"] == {"privsep": "0"}
    full = next(user for user in client.get("/access/users", full=1) if user["userid"] == "bob@pve")
    assert full["tokens"] == [{"tokenid": "t1", "expire": 0, "privsep": 0}]
    assert (full["groups"], full["realm-type"], full["firstname"]) == ("staff", "pve", "B")
    assert alice.ask("DELETE", "/access/users/bob@pve").data is None
    assert client.get("/access/groups/staff") == {"comment": "we", "members": []}
    assert [group["groupid"] for group in alice.get("/access/groups")] == ["staff"]
    assert client.get("/access/users", enabled=0) == []


def test_users_see_to_their_own_tokens(client: Client) -> None:
    make_user(client)
    make_user(client, "bob@pve")
    alice = Ticket(client)
    assert alice.ask("POST", f"/access/users/{ALICE}/token/t1", {"expire": 4000000000}).status == 200
    assert alice.get(f"/access/users/{ALICE}/token") == [{"tokenid": "t1", "expire": 4000000000, "privsep": 1}]
    again = alice.ask("POST", f"/access/users/{ALICE}/token/t1")
    assert again.json["errors"] == {"tokenid": "Token already exists."}
    assert alice.get(f"/access/users/{ALICE}/token/t1") == {"expire": 4000000000, "privsep": 1}
    assert refusal(alice.ask("GET", "/access/users/bob@pve/token")) == denied("")
    assert refusal(alice.ask("POST", "/access/users/bob@pve/token/t1")) == denied("")
    assert [entry["subdir"] for entry in alice.get("/access")][:2] == ["users", "groups"]
    assert alice.get("/access/tfa") == alice.get(f"/access/tfa/{ALICE}") == []
    assert alice.get(f"/access/users/{ALICE}/tfa", multiple=1) == {"types": []}
    assert client.ask("PUT", f"/access/users/{ALICE}/unlock-tfa").data == 0


def test_refusals_of_users_groups_roles_and_realms(client: Client) -> None:
    make_user(client)
    client.ask("POST", "/access/groups", {"groupid": "g"})
    client.ask("POST", "/access/roles", {"roleid": "R", "privs": "VM.Audit"})
    for method, path, fields, reason in (
        ("POST", "/access/users", {"userid": ALICE}, "create user failed: user 'alice@pve' already exists"),
        ("POST", "/access/users", {"userid": "x@pve", "groups": "no"}, "create user failed: no such group 'no'"),
        ("POST", "/access/users", {"userid": "x@ldap", "password": PASSWORD},
         "create user failed: auth domain 'ldap' does not exist"),
        ("PUT", "/access/users/x@pve", {"enable": 0}, "no such user ('x@pve')"),
        ("DELETE", "/access/users/x@pve", {}, "no such user ('x@pve')"),
        ("DELETE", "/access/users/root@pam", {}, "delete user failed: user 'root@pam' cannot be deleted"),
        ("POST", "/access/groups", {"groupid": "g"}, "create group failed: group 'g' already exists"),
        ("PUT", "/access/groups/no", {"comment": "x"}, "update group failed: group 'no' does not exist"),
        ("DELETE", "/access/groups/no", {}, "delete group failed: group 'no' does not exist"),
        ("GET", "/access/groups/no", {}, "group 'no' does not exist"),
        ("POST", "/access/roles", {"roleid": "R"}, "create role failed: role 'R' already exists"),
        ("PUT", "/access/roles/PVEAdmin", {"privs": ""}, "auto-generated role 'PVEAdmin' cannot be modified"),
        ("DELETE", "/access/roles/NoAccess", {}, "auto-generated role 'NoAccess' cannot be deleted"),
        ("DELETE", "/access/roles/no", {}, "delete role failed: role 'no' does not exist"),
        ("GET", "/access/roles/no", {}, "role 'no' does not exist"),
        ("PUT", "/access/acl", {"path": "/", "users": ALICE, "roles": "no"},
         "ACL update failed: role 'no' does not exist"),
        ("PUT", "/access/acl", {"path": "/", "groups": "no", "roles": "R"},
         "ACL update failed: group 'no' does not exist"),
        ("PUT", "/access/acl", {"path": "/", "tokens": f"{ALICE}!no", "roles": "R"},
         "ACL update failed: no such token 'no' for user 'alice@pve'"),
        ("GET", "/access/domains/ldap", {}, "domain 'ldap' does not exist"),
    ):  # fmt: skip
        assert refusal(client.ask(method, path, fields)) == (500, reason)
    for fields, errors in (
        ({"path": "/", "roles": "R"}, dict.fromkeys(("users", "groups", "tokens"),
         "either 'users', 'groups' or 'tokens' is required.")),
        ({"path": "/nonsense", "roles": "R", "users": ALICE}, {"path": "invalid ACL path '/nonsense'"}),
        ({"path": "/vms/1:2", "roles": "R", "users": ALICE}, {"path": "invalid ACL path '/vms/1:2'"}),
    ):  # fmt: skip
        assert root(client).ask("PUT", "/access/acl", fields).json["errors"] == errors
    own = client.ask("POST", "/access/roles", {"roleid": "pveMine"})
    assert "namespace" in own.json["errors"]["roleid"]
    assert client.get("/access/domains/pve") == {"type": "pve", "comment": "Proxmox VE authentication server"}
    assert client.ask("POST", "/access/domains", {"realm": "x", "type": "ldap"}).status == 501


def test_roles_change_what_their_holders_may(client: Client) -> None:
    make_user(client)
    make_vms(client, 100)
    assert client.ask("POST", "/access/roles", {"roleid": "R", "privs": "VM.PowerMgmt"}).data is None
    grant(client, "/vms/100", "R", users=ALICE)
    alice = Ticket(client)
    assert refusal(alice.ask("GET", f"{N}/qemu/100/config")) == denied("/vms/100, VM.Audit")
    assert client.ask("PUT", "/access/roles/R", {"privs": "VM.Audit", "append": 1}).data is None
    assert client.get("/access/roles/R") == {"VM.Audit": 1, "VM.PowerMgmt": 1}
    assert alice.ask("GET", f"{N}/qemu/100/config").status == 200
    assert client.ask("PUT", "/access/roles/R", {"privs": "VM.PowerMgmt"}).data is None
    assert alice.ask("GET", f"{N}/qemu/100/config").status == 403
    assert client.ask("DELETE", "/access/roles/R").data is None
    client.ask("POST", "/access/roles", {"roleid": "R", "privs": "VM.Audit"})
    assert alice.ask("GET", f"{N}/qemu/100/config").status == 403  # the new role of that name is another one
    roles = {role["roleid"]: role for role in client.get("/access/roles")}
    assert (roles["PVEVMUser"]["special"], roles["R"]["special"]) == (1, 0)
    assert roles["NoAccess"]["privs"] == ""
    assert roles["PVETemplateUser"]["privs"] == "VM.Audit,VM.Clone"


# What stays


def test_everything_survives_a_restart_and_no_secret_is_readable(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    make_user(client)
    make_vms(client, 100)
    token = by_token(client)
    client.ask("POST", "/access/groups", {"groupid": "g"})
    client.ask("PUT", f"/access/users/{ALICE}", {"groups": "g"})
    grant(client, "/vms/100", "PVEVMUser", groups="g", tokens=f"{ALICE}!ci")
    home = client.node.home
    before = {path: client.get(path) for path in ("/access/users", "/access/groups", "/access/acl", "/access/roles")}
    client.node.stop()
    again = make_node(home, FlagQemu())
    try:
        anew = Client(again)
        assert {path: anew.get(path) for path in before} == before
        token.node = again
        assert token.ask("GET", f"{N}/qemu/100/config").status == 200
        assert Ticket(anew).ask("GET", f"{N}/qemu/100/config").status == 200
    finally:
        again.stop()
    value = token.authorization.rpartition("=")[2]
    files = {path: path.read_text() for path in (home / "user.cfg", *(home / "priv").iterdir())}
    assert {path.name for path in files} == {"user.cfg", "shadow.cfg", "token.cfg"}
    for path, text in files.items():
        assert path.stat().st_mode & 0o077 == 0
        assert value not in text
        assert PASSWORD not in text
    assert value not in caplog.text
    assert PASSWORD not in caplog.text


HOSTILE = "a:1:0:x\nuser:evil@pve:1:0::::::\r\nacl:1:/:evil@pve:Administrator: % é \x7f"


def test_no_text_becomes_a_line_or_a_field(client: Client) -> None:
    text = HOSTILE.replace("\x7f", "")
    make_user(client, comment=text, firstname="a:b%0Auser:evil@pve:1:::::::", lastname="100%41:é")
    client.ask("POST", "/access/groups", {"groupid": "g", "comment": text})
    client.ask("POST", "/pools", {"poolid": "p", "comment": text})
    client.ask("POST", f"/access/users/{ALICE}/token/ci", {"comment": text})
    for path, fields in (
        ("/access/users", {"userid": "x,root@pam@pve"}), ("/access/users", {"userid": "x:1@pve"}),
        ("/access/users", {"userid": "x\ny@pve"}), ("/access/users", {"userid": "x@pve", "email": "a@b:c\n"}),
        ("/access/users", {"userid": "x@pve", "keys": "a:b"}), ("/access/groups", {"groupid": "a:b"}),
        ("/access/groups", {"groupid": "a\nb"}), ("/access/roles", {"roleid": "a:b"}),
        ("/access/roles", {"roleid": "a", "privs": "VM.Audit:"}), ("/pools", {"poolid": "a:b"}),
        (f"/access/users/{ALICE}/token/a:b", {}),
    ):  # fmt: skip
        assert client.ask("POST", path, fields).status in (400, 500), fields
        assert root(client).ask("POST", path, fields).status == 400, fields
    home = client.node.home
    lines = (home / "user.cfg").read_text().splitlines()
    kinds = [line.split(":")[0] for line in lines if line]
    assert kinds == ["user", "token", "user", "token", "group", "pool"]
    client.node.stop()
    again = make_node(home, FlagQemu())
    try:
        anew = Client(again)
        user = anew.get(f"/access/users/{ALICE}")
        assert (user["comment"], user["lastname"]) == (text, "100%41:é")
        assert user["firstname"] == "a:b%0Auser:evil@pve:1:::::::"
        assert anew.get("/access/groups/g")["comment"] == anew.get("/pools/p")["comment"] == text
        assert user["tokens"]["ci"]["comment"] == text
        assert [entry["userid"] for entry in anew.get("/access/users")] == [ALICE, "root@pam"]
    finally:
        again.stop()


def test_root_has_the_recorded_privileges_and_capabilities(client: Client) -> None:
    rows = exchanges()
    assert client.get("/access/permissions") == {
        path: held for path, held in rows[114]["response"]["data"].items() if path != "/vms/400"
    }
    assert root(client).login["cap"] == rows[67]["response"]["data"]["cap"]
