"""Pools of the node: their members, who sees and changes them, and what they give."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from autovibe.node.access.auth import Actor
from autovibe.node.refusal import Refusal
from tests.contract.node_parts import Client, FlagQemu, make_node
from tests.contract.test_node_access import ALICE, Ticket, denied, grant, make_user, make_vms, refusal, root

N = "/nodes/pvetest"


def make_pool(client: Client, name: str, **facts: Any) -> None:
    assert client.ask("POST", "/pools", {"poolid": name, **facts}).data is None


def fill(client: Client, name: str, **change: Any) -> None:
    assert client.ask("PUT", "/pools", {"poolid": name, **change}).data is None


def members(client: Client, name: str, **fields: Any) -> list[str]:
    found = client.get("/pools", poolid=name, **fields)
    assert [pool["poolid"] for pool in found] == [name]
    return [entry["id"] for entry in found[0]["members"]]


def test_a_pool_from_its_making_to_its_end(client: Client) -> None:
    make_pool(client, "lab", comment="c")
    make_pool(client, "empty")
    make_vms(client, 100, 101)
    assert client.get("/pools") == [{"poolid": "empty"}, {"poolid": "lab", "comment": "c"}]
    fill(client, "lab", vms="100,101", storage="local", comment="d")
    assert members(client, "lab") == ["qemu/100", "qemu/101", "storage/pvetest/local"]
    assert members(client, "lab", type="qemu") == ["qemu/100", "qemu/101"]
    assert members(client, "lab", type="storage") == ["storage/pvetest/local"]
    assert members(client, "lab", type="lxc") == []
    old = client.get("/pools/lab")
    assert (old["poolid"], old["comment"], len(old["members"])) == ("lab", "d", 3)
    vm = next(entry for entry in old["members"] if entry["id"] == "qemu/100")
    resource = next(entry for entry in client.get("/cluster/resources", type="vm") if entry["id"] == "qemu/100")
    assert vm == {key: value for key, value in resource.items() if key not in ("pool", "lock", "tags")}
    assert client.ask("PUT", "/pools/lab", {"vms": "100", "delete": 1}).data is None
    assert members(client, "lab") == ["qemu/101", "storage/pvetest/local"]
    full = client.ask("DELETE", "/pools", {"poolid": "lab"})
    assert refusal(full) == (500, "delete pool failed: pool 'lab' is not empty (contains VM 101)")
    fill(client, "lab", vms="101", delete=1)
    full = client.ask("DELETE", "/pools/lab")
    assert full.reason == "delete pool failed: pool 'lab' is not empty (contains storage 'local')"
    fill(client, "lab", storage="local", delete=1)
    assert client.ask("DELETE", "/pools/lab").data is None
    assert client.ask("DELETE", "/pools", {"poolid": "empty"}).data is None
    assert client.get("/pools") == []


def test_a_vm_is_in_one_pool_and_moves_only_when_told_to(client: Client) -> None:
    make_pool(client, "one")
    make_pool(client, "two")
    make_vms(client, 100, 101)
    fill(client, "one", vms="100")
    for fields, reason in (
        ({"poolid": "one", "vms": "100"}, "VM 100 is already a pool member"),
        ({"poolid": "two", "vms": "101,100"}, "VM 100 belongs already to pool 'one' and allow-move is not set"),
        ({"poolid": "two", "vms": "100", "delete": 1}, "VM 100 is not a pool member"),
        ({"poolid": "two", "storage": "local", "delete": 1}, "Storage 'local' is not a pool member"),
        ({"poolid": "no", "vms": "100"}, "pool 'no' does not exist"),
    ):
        assert refusal(client.ask("PUT", "/pools", fields)) == (500, f"update pools failed: {reason}")
    assert members(client, "two") == []  # all or nothing
    fill(client, "two", vms="100", **{"allow-move": 1})
    assert (members(client, "one"), members(client, "two")) == ([], ["qemu/100"])
    fill(client, "one", storage="local")
    fill(client, "two", storage="local")  # a storage may be in many
    again = client.ask("PUT", "/pools", {"poolid": "two", "storage": "local"})
    assert again.reason == "update pools failed: Storage 'local' is already a pool member"


def test_pools_in_pools(client: Client) -> None:
    orphan = client.ask("POST", "/pools", {"poolid": "a/b"})
    assert refusal(orphan) == (500, "create pool failed: parent 'a' of pool 'a/b' does not exist")
    for name in ("a", "a/b", "a/b/c"):
        make_pool(client, name)
    assert client.ask("POST", "/pools", {"poolid": "a/b/c/d"}).status == 400
    taken = client.ask("POST", "/pools", {"poolid": "a/b"})
    assert refusal(taken) == (500, "create pool failed: pool 'a/b' already exists")
    assert [pool["poolid"] for pool in client.get("/pools")] == ["a", "a/b", "a/b/c"]
    full = client.ask("DELETE", "/pools", {"poolid": "a"})
    assert full.reason == "delete pool failed: pool 'a' is not empty (contains pool 'a/b')"
    make_user(client)
    make_vms(client, 100)
    fill(client, "a/b/c", vms="100")
    grant(client, "/pool/a", "PVEVMUser", users=ALICE)
    alice = Ticket(client)
    assert alice.ask("GET", f"{N}/qemu/100/config").status == 200
    grant(client, "/pool/a/b", "NoAccess", users=ALICE)
    assert refusal(alice.ask("GET", f"{N}/qemu/100/config")) == denied("/vms/100, VM.Audit")


def test_a_pool_gives_its_members_its_rights(client: Client) -> None:
    make_user(client)
    make_pool(client, "lab")
    make_vms(client, 100, 101)
    grant(client, "/pool/lab", "PVEVMUser,PVEDatastoreUser,PVEPoolUser", users=ALICE)
    alice = Ticket(client)
    for path in (f"{N}/qemu/100/config", f"{N}/storage/local/status"):
        assert alice.ask("GET", path).status == 403
    fill(client, "lab", vms="100", storage="local")
    for path in (f"{N}/qemu/100/config", f"{N}/storage/local/status"):
        assert alice.ask("GET", path).status == 200
    assert refusal(alice.ask("GET", f"{N}/qemu/101/config")) == denied("/vms/101, VM.Audit")
    assert alice.get("/access/permissions")["/vms/100"]["VM.Console"] == 0
    grant(client, "/vms/100", "NoAccess", users=ALICE)
    assert alice.ask("GET", f"{N}/qemu/100/config").status == 403
    fill(client, "lab", storage="local", delete=1)
    assert alice.ask("GET", f"{N}/storage/local/status").status == 403


def test_who_sees_and_changes_pools(client: Client) -> None:
    make_user(client)
    for name in ("lab", "other"):
        make_pool(client, name)
    make_vms(client, 100, 101)
    grant(client, "/pool/lab", "PVEPoolAdmin", users=ALICE)
    alice = Ticket(client)
    assert alice.get("/pools") == [{"poolid": "lab"}]
    assert refusal(alice.ask("GET", "/pools", {"poolid": "other"})) == denied("/pool/other, Pool.Audit")
    assert refusal(alice.ask("GET", "/pools/other")) == denied("/pool/other, Pool.Audit")
    assert refusal(alice.ask("POST", "/pools", {"poolid": "new"})) == denied("/pool/new, Pool.Allocate")
    alien = alice.ask("PUT", "/pools", {"poolid": "lab", "vms": "100"})
    assert refusal(alien) == denied("/vms/100, Permissions.Modify|VM.Allocate")
    grant(client, "/vms", "PVEVMAdmin", users=ALICE)
    assert alice.ask("PUT", "/pools", {"poolid": "lab", "vms": "100"}).data is None
    store = alice.ask("PUT", "/pools", {"poolid": "lab", "storage": "local"})
    assert refusal(store) == denied("/storage/local, Permissions.Modify|Datastore.Allocate")
    fill(client, "other", vms="101")
    moved = alice.ask("PUT", "/pools", {"poolid": "lab", "vms": "101", "allow-move": 1})
    assert refusal(moved) == denied("/pool/other, Pool.Allocate")
    assert alice.ask("POST", "/pools", {"poolid": "lab/mine"}).data is None
    assert alice.ask("DELETE", "/pools", {"poolid": "lab/mine"}).data is None


def test_a_vm_that_is_gone_leaves_pool_and_rights(client: Client) -> None:
    make_user(client)
    make_pool(client, "lab")
    make_vms(client, 100)
    access = client.node.state.access
    access.require_pool("lab")
    access.join_pool("lab", 100)
    assert access.pool_of(100) == "lab"
    grant(client, "/vms/100", "PVEVMAdmin", users=ALICE)
    grant(client, "/vms/1000", "PVEVMAdmin", users=ALICE)
    access.leave_pools(100)
    assert access.pool_of(100) is None
    assert members(client, "lab") == []
    access.join_pool("lab", 100)
    assert client.do("DELETE", f"{N}/qemu/100") is None
    assert access.pool_of(100) is None
    assert [entry["path"] for entry in client.get("/access/acl")] == ["/vms/1000"]


def test_a_storage_that_is_gone_leaves_pools_and_rights(client: Client) -> None:
    make_user(client)
    make_pool(client, "lab")
    fill(client, "lab", storage="local,local-lvm")
    grant(client, "/storage/local", "PVEDatastoreUser", users=ALICE)
    client.node.state.access.forget_storage("local")
    assert members(client, "lab") == ["storage/pvetest/local-lvm"]
    assert client.get("/access/acl") == []


def test_new_vms_join_pools_that_are_there(client: Client) -> None:
    make_pool(client, "lab")
    client.do("POST", f"{N}/qemu", vmid=100, memory=64, pool="lab")
    client.do("POST", f"{N}/qemu/100/clone", newid=101, pool="lab")
    assert members(client, "lab") == ["qemu/100", "qemu/101"]
    for path, fields in ((f"{N}/qemu", {"vmid": 102}), (f"{N}/qemu/100/clone", {"newid": 102})):
        refused = client.ask("POST", path, {**fields, "pool": "no"})
        assert refusal(refused) == denied("pool 'no' does not exist")
    with pytest.raises(Refusal, match="pool 'no' does not exist"):
        client.node.state.access.join_pool("no", 100)


def test_users_make_vms_in_their_pool_and_nowhere_else(client: Client) -> None:
    make_user(client)
    make_pool(client, "lab")
    grant(client, "/pool/lab", "PVEVMAdmin", users=ALICE)
    grant(client, "/storage/local", "PVEDatastoreUser", users=ALICE)
    alice, vm = Ticket(client), {"vmid": 100, "memory": 64, "scsi0": "local:1", "pool": "lab"}
    assert refusal(alice.ask("POST", f"{N}/qemu", {"vmid": 100})) == denied("")
    elsewhere = alice.ask("POST", f"{N}/qemu", {**vm, "scsi0": "local-lvm:1"})
    assert refusal(elsewhere) == denied("/storage/local-lvm, Datastore.AllocateSpace")
    assert client.end_of(alice.ask("POST", f"{N}/qemu", vm).data) == "OK"
    assert [found["vmid"] for found in alice.get(f"{N}/qemu")] == [100]
    client.do("POST", f"{N}/qemu", vmid=101, memory=64)
    assert [found["vmid"] for found in alice.get(f"{N}/qemu")] == [100]
    assert [found["id"] for found in alice.get("/cluster/resources", type="vm")] == ["qemu/100"]
    assert [found["storage"] for found in alice.get(f"{N}/storage")] == ["local"]
    assert {task["id"] for task in alice.get(f"{N}/tasks")} == {"100"}
    assert alice.ask("PUT", f"{N}/qemu/100/config", {"description": "mine", "cores": 2}).data is None
    assert refusal(alice.ask("POST", f"{N}/qemu/100/clone", {"newid": 102})) == denied("")
    assert client.end_of(alice.ask("POST", f"{N}/qemu/100/clone", {"newid": 102, "pool": "lab"}).data) == "OK"
    away = alice.ask("POST", f"{N}/qemu/100/clone", {"newid": 103, "pool": "lab", "storage": "local-lvm"})
    assert refusal(away) == denied("/storage/local-lvm, Datastore.AllocateSpace")
    assert client.end_of(alice.ask("DELETE", f"{N}/qemu/100").data) == "OK"


@pytest.mark.parametrize(
    ("role", "fields", "privilege"),
    [
        ("VM.Config.CPU", {"cores": 2}, "VM.Config.CPU"),
        ("VM.Config.Memory", {"memory": 128}, "VM.Config.Memory"),
        ("VM.Config.Options", {"description": "x"}, "VM.Config.Options"),
        ("VM.Config.HWType", {"vga": "std"}, "VM.Config.HWType"),
        ("VM.Config.Disk", {"boot": "order=scsi0"}, "VM.Config.Disk"),
        ("VM.Config.CDROM", {"ide2": "none,media=cdrom"}, "VM.Config.CDROM"),
        ("VM.Config.Cloudinit", {"ciuser": "me"}, "VM.Config.Cloudinit|VM.Config.Network"),
        ("VM.PowerMgmt,VM.Config.CPU", {"freeze": 1}, "VM.PowerMgmt"),
    ],
)
def test_each_kind_of_option_needs_its_privilege(
    client: Client, role: str, fields: dict[str, Any], privilege: str
) -> None:
    make_user(client)
    client.do("POST", f"{N}/qemu", vmid=100, memory=64, scsi0="local:1")
    client.ask("POST", "/access/roles", {"roleid": "R", "privs": role})
    client.ask("POST", "/access/roles", {"roleid": "Other", "privs": "VM.Config.Network,VM.Config.CPU"})
    if fields in ({"cores": 2}, {"ciuser": "me"}):
        client.ask("PUT", "/access/roles/Other", {"privs": "VM.Config.Options"})
    grant(client, "/vms/100", "Other", users=ALICE)
    alice = Ticket(client)
    assert refusal(alice.ask("PUT", f"{N}/qemu/100/config", fields)) == denied(f"/vms/100, {privilege}")
    grant(client, "/vms/100", "R", users=ALICE)
    assert alice.ask("PUT", f"{N}/qemu/100/config", fields).data is None
    assert alice.ask("PUT", f"{N}/qemu/100/config", {"args": "-x"}).reason == "only root can set 'args' config"


def test_a_pool_of_the_same_name_starts_without_rights(client: Client) -> None:
    make_user(client)
    make_pool(client, "lab")
    grant(client, "/pool/lab", "PVEPoolAdmin", users=ALICE)
    assert client.ask("DELETE", "/pools/lab").data is None
    make_pool(client, "lab")
    assert Ticket(client).get("/pools") == []


def test_many_join_at_once_and_pools_survive_a_restart(client: Client) -> None:
    make_pool(client, "a")
    make_pool(client, "b")
    access = client.node.state.access
    joins = [threading.Thread(target=access.join_pool, args=("ab"[vmid % 2], vmid)) for vmid in range(100, 120)]
    for thread in joins:
        thread.start()
    for thread in joins:
        thread.join()
    home: Path = client.node.home
    client.node.stop()
    again = make_node(home, FlagQemu())
    try:
        pools = again.state.access.pools()
        assert pools["a"].vms == set(range(100, 120, 2))
        assert pools["b"].vms == set(range(101, 120, 2))
    finally:
        again.stop()


@pytest.mark.parametrize(
    "fields",
    [
        {"poolid": "a\nb"}, {"poolid": ""}, {"poolid": "a//b"}, {"poolid": "../a/.."}, {"poolid": "lab", "vms": "0100"},
        {"poolid": "lab", "vms": "x"}, {"poolid": "lab", "storage": "a/b"}, {"poolid": "lab", "vms": "100:101"},
        {"poolid": "lab", "what": "1"},
    ],
)  # fmt: skip
def test_odd_values_are_faults_of_parameters(client: Client, fields: dict[str, str]) -> None:
    make_pool(client, "lab")
    answer = root(client).ask("PUT", "/pools", fields)
    assert answer.status in (400, 500)
    assert answer.status == 400 or answer.reason == f"update pools failed: pool '{fields['poolid']}' does not exist"
    assert client.get("/pools") == [{"poolid": "lab"}]


def test_disks_of_others_are_copied_only_by_who_may_clone_them(client: Client) -> None:
    make_user(client)
    make_pool(client, "lab")
    grant(client, "/pool/lab", "PVEVMAdmin", users=ALICE)
    grant(client, "/storage/local", "PVEDatastoreUser", users=ALICE)
    client.do("POST", f"{N}/qemu", vmid=100, memory=64, scsi0="local:1")
    volume = client.get(f"{N}/qemu/100/config")["scsi0"].split(",")[0]
    alice, vm = Ticket(client), {"vmid": 101, "memory": 64, "pool": "lab"}
    copied = {**vm, "scsi0": f"local:0,import-from={volume}"}
    assert refusal(alice.ask("POST", f"{N}/qemu", copied)) == denied("/vms/100, VM.Clone")
    taken = alice.ask("POST", f"{N}/qemu", {**vm, "scsi0": volume})
    assert refusal(taken) == denied("/vms/100, VM.Config.Disk")
    for option, value, what in (
        ("vmstatestorage", "local-lvm", "/storage/local-lvm, Datastore.AllocateSpace"),
        ("cicustom", "user=local:snippets/u.yaml", "/storage/local, Datastore.Allocate"),
    ):
        assert refusal(alice.ask("POST", f"{N}/qemu", {**vm, option: value})) == denied(what)
    grant(client, "/vms/100", "PVETemplateUser", users=ALICE)
    assert client.end_of(alice.ask("POST", f"{N}/qemu", copied).data) == "OK"
    assert alice.ask("PUT", f"{N}/qemu/101/config", {"vmgenid": "1"}).reason == "only root can set 'vmgenid' config"


def test_a_state_without_rights_says_no(client: Client) -> None:
    assert not client.node.state.allows(Actor(""), "/vms/100", "VM.Audit")
    assert not client.node.state.allows(Actor("nobody@pve"), "/", "VM.Audit")
    assert client.node.state.allows(Actor("root@pam"), "/", "VM.Audit")
