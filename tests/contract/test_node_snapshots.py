"""Snapshots with RAM, rollbacks, VMs suspended to disk: what the API says, what the disks hold, what is locked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autovibe.node.disks.orphans import unnamed_files
from tests.contract.node_parts import Client, FlagQemu, make_node

N = "/nodes/pvetest"
V = f"{N}/qemu/100"
MIB = 1 << 20


@pytest.fixture
def client(tmp_path: Path, qemu: FlagQemu) -> Iterator[Client]:
    """A node with VM 100, which runs, has 64 MiB of RAM and a disk on each storage."""
    node = make_node(tmp_path / "node", qemu)
    found = Client(node)
    disks = {"scsi0": "local-lvm:1", "scsi1": "local:1"}
    found.do("POST", f"{N}/qemu", vmid=100, name="one", memory=64, net0="virtio,bridge=vmbr0", **disks, start=1)
    yield found
    assert unnamed_files(node.state) == []
    node.stop()


def volumes(client: Client, storage: str) -> dict[str, dict[str, Any]]:
    return {entry["volid"]: entry for entry in client.get(f"{N}/storage/{storage}/content")}


def snapshots(client: Client) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in client.get(f"{V}/snapshot")}


@pytest.mark.parametrize(
    ("given", "volid"),
    [
        ({}, "local:100/vm-100-state-s1.raw"),
        ({"vmstatestorage": "local-lvm"}, "local-lvm:vm-100-state-s1"),
        ({"delete": "scsi1"}, "local-lvm:vm-100-state-s1"),
    ],
)
def test_a_snapshot_with_ram(client: Client, qemu: FlagQemu, given: dict[str, Any], volid: str) -> None:
    """Its volume lies on the storage the VM names, else beside its disks, on one of files rather than not."""
    if given:
        client.do("POST", f"{V}/status/stop")
        client.ask("PUT", f"{V}/config", given)
        client.do("POST", f"{V}/status/start")
    upid = client.ask("POST", f"{V}/snapshot", {"snapname": "s1", "vmstate": 1}).data
    assert client.end_of(upid) == "OK"
    log = client.log(upid)
    assert f"saving VM state and RAM using storage '{volid.partition(':')[0]}'" in log
    assert "completed saving the VM state in 0s, saved 1.0 MiB" in log
    found = volumes(client, volid.partition(":")[0])[volid]
    assert (found["size"], found["format"], found["vmid"]) == ((2 * 64 + 500) * MIB, "raw", 100)
    assert found["used"] < MIB
    assert snapshots(client)["s1"]["vmstate"] == 1
    config = client.get(f"{V}/snapshot/s1/config")
    assert config["vmstate"] == volid
    assert (config["runningmachine"], config["runningcpu"]) == ("pc-i440fx-7.2", "max")
    assert "vmstate" not in client.get(f"{V}/config")
    assert client.get(f"{V}/status/current")["qmpstatus"] == "running"
    client.do("DELETE", f"{V}/snapshot/s1")
    assert volid not in volumes(client, volid.partition(":")[0])


def test_of_a_stopped_vm_there_is_no_ram_to_keep(client: Client) -> None:
    client.do("POST", f"{V}/status/stop")
    client.do("POST", f"{V}/snapshot", snapname="s1", vmstate=1)
    assert snapshots(client)["s1"]["vmstate"] == 0
    assert "vmstate" not in client.get(f"{V}/snapshot/s1/config")


def test_the_guest_is_not_frozen_when_its_ram_is_kept(client: Client, qemu: FlagQemu) -> None:
    client.ask("PUT", f"{V}/config", {"agent": 1})
    client.do("POST", f"{V}/status/reboot")
    qemu.answers = {}
    client.do("POST", f"{V}/snapshot", snapname="s1", vmstate=1)
    assert "fsfreeze-freeze" not in qemu.agent_calls


@pytest.mark.parametrize("storage", ["local", "local-lvm"])
def test_every_name_of_a_snapshot_makes_a_volume(client: Client, storage: str) -> None:
    client.ask("PUT", f"{V}/config", {"vmstatestorage": storage})
    for name in ("Ab", "a_b-", "a" * 40):
        client.do("POST", f"{V}/snapshot", snapname=name, vmstate=1)
        client.do("POST", f"{V}/snapshot/{name}/rollback")
    assert len([volid for volid in volumes(client, storage) if "-state-" in volid]) == 3


def test_a_paused_vm_stays_paused(client: Client) -> None:
    client.do("POST", f"{V}/status/suspend")
    client.do("POST", f"{V}/snapshot", snapname="s1", vmstate=1)
    assert client.get(f"{V}/status/current")["qmpstatus"] == "paused"


@pytest.mark.parametrize("storage", ["local", "local-lvm"])
def test_a_stopped_saving_leaves_nothing(client: Client, qemu: FlagQemu, storage: str) -> None:
    client.ask("PUT", f"{V}/config", {"vmstatestorage": storage})
    qemu.saves_for.clear()
    upid = client.ask("POST", f"{V}/snapshot", {"snapname": "s1", "vmstate": 1}).data
    while not any("MiB in" in line for line in client.log(upid)):
        assert client.node.state.tasks.find(upid).status is None
    assert client.ask("PUT", f"{V}/config", {"description": "x"}).reason == "VM is locked (snapshot)"
    client.ask("DELETE", f"{N}/tasks/{upid}")
    assert client.end_of(upid) == "received interrupt"
    assert list(snapshots(client)) == ["current"]
    assert "lock" not in client.get(f"{V}/config")
    assert client.get(f"{V}/status/current")["qmpstatus"] == "running"
    assert client.node.state.disks.snapshots("local:100/vm-100-disk-0.qcow2") == []


def test_rollback_to_ram_and_to_disks(client: Client, qemu: FlagQemu) -> None:
    client.do("POST", f"{V}/snapshot", snapname="cold")
    client.do("POST", f"{V}/snapshot", snapname="warm", vmstate=1)
    before = client.get(f"{V}/config")
    client.ask("PUT", f"{V}/config", {"description": "kept", "cores": 4, "scsi5": "local:1"})  # cores wait
    assert "cores" in [entry["key"] for entry in client.get(f"{V}/pending") if "pending" in entry]
    client.do("POST", f"{V}/snapshot/warm/rollback")
    assert client.get(f"{V}/status/current")["qmpstatus"] == "running"
    given = qemu.given[100][0]
    assert (given["runningmachine"], given["runningcpu"]) == ("pc-i440fx-7.2", "max")
    after = client.get(f"{V}/config")
    assert after["vmgenid"] != before["vmgenid"]
    assert given["vmgenid"] == after["vmgenid"]
    assert after["description"] == "kept"
    assert after["unused0"] == "local:100/vm-100-disk-1.qcow2"
    assert "cores" not in after
    assert not {"lock", "vmstate", "runningmachine", "scsi5"} & after.keys()
    assert snapshots(client)["current"]["parent"] == "warm"
    client.do("POST", f"{V}/snapshot/cold/rollback")
    assert client.get(f"{V}/status/current")["status"] == "stopped"
    assert set(snapshots(client)) == {"cold", "warm", "current"}
    client.do("POST", f"{V}/snapshot/cold/rollback", start=1)
    assert client.get(f"{V}/status/current")["status"] == "running"
    client.do("POST", f"{V}/snapshot/warm/rollback")
    assert client.get(f"{V}/status/current")["qmpstatus"] == "running"


def test_a_rollback_that_cannot_load_the_ram_ends_unlocked(client: Client, qemu: FlagQemu) -> None:
    client.do("POST", f"{V}/snapshot", snapname="warm", vmstate=1)
    qemu.fails_with = "start failed: load of migration failed"
    assert client.run("POST", f"{V}/snapshot/warm/rollback") == "start failed: load of migration failed"
    assert "lock" not in client.get(f"{V}/config")
    assert client.get(f"{V}/status/current")["status"] == "stopped"


def test_refusals_of_a_rollback(client: Client) -> None:
    client.do("POST", f"{V}/snapshot", snapname="s1")
    assert client.run("POST", f"{V}/snapshot/zz/rollback") == "snapshot 'zz' does not exist"
    state = client.node.state
    state.disks.delete_snapshot("local:100/vm-100-disk-0.qcow2", "s1", monitor=None)
    missing = "snapshot 's1' of volume 'local:100/vm-100-disk-0.qcow2' does not exist"
    assert client.run("POST", f"{V}/snapshot/s1/rollback") == missing
    assert client.get(f"{V}/status/current")["status"] == "running"
    config = state.configs.load(100)
    config.values["lock"] = "backup"
    state.configs.save(100, config)
    assert client.run("DELETE", f"{V}/snapshot/s1", force=1) == "VM is locked (backup)"
    config.values.pop("lock")
    config.snapshots["s1"]["snapstate"] = "delete"
    state.configs.save(100, config)
    state.disks.snapshot("local:100/vm-100-disk-0.qcow2", "s1", monitor=None)
    incomplete = "unable to rollback to incomplete snapshot (snapstate = delete)"
    assert client.run("POST", f"{V}/snapshot/s1/rollback") == incomplete
    client.do("DELETE", f"{V}/snapshot/s1")


def test_a_reused_name_is_nobodys_parent(client: Client) -> None:
    client.do("POST", f"{V}/snapshot", snapname="s1")
    client.do("POST", f"{V}/snapshot", snapname="s2")
    state = client.node.state
    config = state.configs.load(100)
    config.snapshots["s2"]["parent"] = "s3"
    state.configs.save(100, config)
    client.do("POST", f"{V}/snapshot", snapname="s3")
    assert "parent" not in snapshots(client)["s2"]
    assert snapshots(client)["s3"]["parent"] == "s2"
    assert client.ask("POST", f"{V}/snapshot", {"snapname": "pending"}).reason == (
        "unable to use snapshot name 'pending' (reserved name)"
    )


def test_a_snapshot_keeps_no_unused_disks(client: Client) -> None:
    client.do("POST", f"{V}/status/stop")
    client.do("POST", f"{V}/snapshot", snapname="s1")
    client.ask("PUT", f"{V}/config", {"delete": "scsi1"})
    client.do("POST", f"{V}/snapshot", snapname="s2")
    assert "unused0" not in client.get(f"{V}/snapshot/s2/config")
    client.do("POST", f"{V}/snapshot/s1/rollback")
    config = client.get(f"{V}/config")
    assert config["scsi1"].startswith("local:100/vm-100-disk-0.qcow2")
    assert "unused0" not in config


class TestSuspend:
    @pytest.mark.parametrize("statestorage", ["", "local-lvm"])
    @pytest.mark.parametrize("verb", ["start", "resume"])
    def test_to_disk_and_back(self, client: Client, qemu: FlagQemu, statestorage: str, verb: str) -> None:
        chosen = {"statestorage": statestorage} if statestorage else {}
        upid = client.ask("POST", f"{V}/status/suspend", {"todisk": 1, **chosen}).data
        assert client.end_of(upid) == "OK"
        assert upid.split(":")[5] == "qmsuspend"
        assert "State saved, quitting" in client.log(upid)
        config = client.get(f"{V}/config")
        assert config["lock"] == "suspended"
        assert re.fullmatch(rf"{statestorage or 'local'}:.*vm-100-state-suspend-\d+-\d+-\d+(\.raw)?", config["vmstate"])
        assert config["runningmachine"] == "pc-i440fx-7.2"
        status = client.get(f"{V}/status/current")
        assert (status["status"], status["qmpstatus"], status["lock"]) == ("stopped", "stopped", "suspended")
        upid = client.ask("POST", f"{V}/status/{verb}").data
        assert client.end_of(upid) == "OK"
        assert client.log(upid)[:2] == ["Resuming suspended VM", "Resumed VM, removing state"]
        assert client.get(f"{V}/status/current")["qmpstatus"] == "running"
        left = client.get(f"{V}/config")
        assert not {"lock", "vmstate", "runningmachine", "runningcpu"} & left.keys()
        assert left["vmgenid"] == config["vmgenid"]

    def test_what_the_lock_refuses(self, client: Client) -> None:
        client.do("POST", f"{V}/status/suspend", todisk=1)
        locked = "VM is locked (suspended)"
        for method, path, fields in (
            ("PUT", f"{V}/config", {"description": "x"}),
            ("POST", f"{V}/clone", {"newid": 101}),
            ("POST", f"{V}/template", {}),
        ):
            assert client.ask(method, path, fields).reason == locked
        assert client.run("POST", f"{V}/snapshot", snapname="s1") == locked
        assert client.run("PUT", f"{V}/resize", disk="scsi0", size="+1M") == locked
        for verb in ("suspend", "reset", "reboot"):
            answer = client.ask("POST", f"{V}/status/{verb}")
            assert (answer.status, answer.reason) == (500, "VM 100 not running")
        client.do("POST", f"{V}/status/stop")  # of a stopped VM: nothing to do
        assert client.get(f"{V}/config")["lock"] == "suspended"

    def test_a_suspended_vm_is_removed_with_its_state(self, client: Client) -> None:
        client.do("POST", f"{V}/status/suspend", todisk=1)
        client.do("DELETE", V)
        assert volumes(client, "local") == {}
        assert volumes(client, "local-lvm") == {}

    def test_a_failed_resume_keeps_the_state(self, client: Client, qemu: FlagQemu) -> None:
        client.do("POST", f"{V}/status/suspend", todisk=1)
        qemu.fails_with = "start failed: got timeout"
        assert client.run("POST", f"{V}/status/start") == "start failed: got timeout"
        assert client.get(f"{V}/config")["lock"] == "suspended"
        qemu.fails_with = ""
        client.do("POST", f"{V}/status/start")

    def test_a_stopped_saving_leaves_nothing(self, client: Client, qemu: FlagQemu) -> None:
        qemu.saves_for.clear()
        upid = client.ask("POST", f"{V}/status/suspend", {"todisk": 1}).data
        while not any("MiB in" in line for line in client.log(upid)):
            assert client.node.state.tasks.find(upid).status is None
        assert client.ask("PUT", f"{V}/config", {"description": "x"}).reason == "VM is locked (suspending)"
        client.ask("DELETE", f"{N}/tasks/{upid}")
        assert client.end_of(upid) == "received interrupt"
        assert not {"lock", "vmstate", "runningmachine"} & client.get(f"{V}/config").keys()
        assert client.get(f"{V}/status/current")["qmpstatus"] == "running"

    def test_storages_and_passed_through_devices(self, client: Client) -> None:
        answer = client.ask("POST", f"{V}/status/suspend", {"todisk": 1, "statestorage": "nowhere"})
        assert answer.reason == "storage 'nowhere' does not exist"
        answer = client.ask("POST", f"{V}/status/suspend", {"statestorage": "local"})
        assert answer.status == 400
        config = client.node.state.configs.load(100)
        config.values["hostpci0"] = "0000:00:1f.2"
        client.node.state.configs.save(100, config)
        answer = client.ask("POST", f"{V}/status/suspend", {"todisk": 1})
        assert answer.reason == "cannot suspend VM to disk due to passed-through PCI device(s)"
