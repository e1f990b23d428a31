"""A node that is killed with SIGKILL: the next one on the home finishes or undoes what was under way."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autovibe.node.access.auth import Auth
from autovibe.node.disks.orphans import unnamed_files
from autovibe.node.vm import drives
from tests.contract.node_parts import Client, FlagQemu, make_node

N = "/nodes/pvetest"


class KilledNode:
    """A node in its own process: calls it as a client until it dies."""

    def __init__(self, home: Path) -> None:
        argv = [sys.executable, "-m", "tests.contract.node_parts", str(home)]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        port = int(self.process.stdout.readline())
        self.client = Client(SimpleNamespace(token=Auth(home).token, port=port, name="pvetest"))  # type: ignore[arg-type]

    def fire(self, method: str, path: str, **fields: Any) -> str | None:
        try:
            return str(self.client.ask(method, path, fields).data)
        except (OSError, AssertionError, ValueError, json.JSONDecodeError):
            return None

    def await_task(self, upid: str | None) -> None:
        while upid and self.client.get(f"{N}/tasks/{upid}/status")["status"] == "running":
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A home with a template 100 and a VM 200 that has a snapshot."""
    home = tmp_path / "node"
    client = Client(make_node(home, FlagQemu()))
    client.do("POST", f"{N}/qemu", vmid=100, scsi0="local-lvm:1", scsi1="local:1", ide2="local-lvm:cloudinit")
    client.do("POST", f"{N}/qemu/100/template")
    client.do("POST", f"{N}/qemu", vmid=200, scsi0="local-lvm:1", scsi1="local:1")
    client.do("POST", f"{N}/qemu/200/snapshot", snapname="s0")
    client.node.stop()
    return home


def check_whole(home: Path) -> Client:
    """Start the next node and hold it to what a home must be when nothing is running."""
    client = Client(make_node(home, FlagQemu()))
    state = client.node.state
    assert list((home / "tasks" / "active").iterdir()) == []
    for task in client.get(f"{N}/tasks", limit=0):
        assert task["status"], task
    named: set[str] = set()
    for vmid in state.configs.vmids():
        config = state.configs.load(vmid)
        assert "lock" not in config.values, (vmid, config)
        for values in (config.values, *config.snapshots.values()):
            assert "snapstate" not in values
            named |= set(drives.owned_volumes(values))
        for name, values in config.snapshots.items():
            for _, drive in drives.disks(values):
                assert name in state.disks.snapshots(drive["file"])
    listed = {v["volid"] for name in ("local", "local-lvm") for v in client.get(f"{N}/storage/{name}/content")}
    assert listed == named
    for path in (home / "storage").rglob("*.qcow2"):
        checked = subprocess.run(["qemu-img", "check", "-q", str(path)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, (path, checked.stderr)
    assert not [path for path in home.rglob("*") if "partial" in path.name or path.suffix == ".new"]
    return client


MIX: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("POST", "/qemu/100/clone", {"newid": 300}),
    ("POST", "/qemu/100/clone", {"newid": 301, "full": 1}),
    ("POST", "/qemu", {"vmid": 302, "scsi0": "local-lvm:1", "scsi1": "local:1"}),
    ("POST", "/qemu/200/snapshot", {"snapname": "s1"}),
    ("DELETE", "/qemu/200/snapshot/s0", {}),
    ("POST", "/qemu/200/snapshot/s1/rollback", {}),
    ("PUT", "/qemu/200/resize", {"disk": "scsi0", "size": "+8M"}),
    ("POST", "/qemu/300/config", {"scsi5": "local-lvm:1"}),
    ("DELETE", "/qemu/302", {}),
    ("POST", "/qemu/300/template", {}),
)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_killed_the_home_is_whole_again(prepared: Path, seed: int) -> None:
    chance = random.Random(seed)
    node = KilledNode(prepared)
    threads = [threading.Thread(target=_work_through, args=(node, chance.sample(MIX, len(MIX)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(chance.uniform(0.02, 1.2))
    node.kill()
    for thread in threads:
        thread.join()
    check_whole(prepared).node.stop()


def _work_through(node: KilledNode, calls: list[tuple[str, str, dict[str, Any]]]) -> None:
    for method, path, fields in calls:
        if node.fire(method, N + path, **fields) is None and node.process.poll() is not None:
            return


def test_the_same_upid_is_polled_after_a_kill(prepared: Path) -> None:
    """A task killed in its middle ends as `unexpected status`, and its log says what recovery did."""
    home = prepared
    client = Client(make_node(home, FlagQemu()))
    started, go_on = threading.Event(), threading.Event()
    upid = _hold_clone(client, started, go_on)
    intent = home / "tasks" / "active" / upid
    left = intent.read_text()
    config = (home / "qemu-server" / "300.conf").read_text()
    go_on.set()
    client.end_of(upid)
    client.node.stop()
    # The home as the kill would have left it: target locked, its intent active, no end in index or log.
    intent.write_text(left)
    (home / "qemu-server" / "300.conf").write_text(config)
    index = home / "tasks" / "index"
    index.write_text("".join(line for line in index.read_text().splitlines(True) if upid not in line))
    again = check_whole(home)
    assert again.end_of(upid) == "unexpected status"
    assert again.log(upid)[-1].endswith("recovery: removed the half-made VM 300")
    assert again.ask("GET", f"{N}/qemu/300/config").status == 500
    again.node.stop()


def _hold_clone(client: Client, started: threading.Event, go_on: threading.Event) -> str:
    disks = client.node.state.disks
    real: Callable[..., str] = disks.clone

    def waiting(*arguments: Any, **options: Any) -> str:
        started.set()
        go_on.wait(30)
        return real(*arguments, **options)

    disks.clone = waiting  # type: ignore[method-assign]
    upid = str(client.ask("POST", f"{N}/qemu/100/clone", {"newid": 300}).data)
    assert started.wait(30)
    assert client.get(f"{N}/tasks/{upid}/status")["status"] == "running"
    assert client.get(f"{N}/tasks", source="active")[0]["upid"] == upid
    return upid


def test_a_half_made_snapshot_is_finished_when_every_disk_has_it(prepared: Path) -> None:
    client = Client(make_node(prepared, FlagQemu()))
    state = client.node.state
    for name, volids in (("a1", ("scsi0", "scsi1")), ("a2", ("scsi0",))):
        config = state.configs.load(200)
        config.snapshots[name] = {**config.values, "snapstate": "prepare", "snaptime": "1"}
        config.values["lock"] = "snapshot"
        state.configs.save(200, config)
        for key in volids:
            state.disks.snapshot(drives.parse(config.values[key])["file"], name, monitor=None)
        client.node.stop()
        upid = f"UPID:pvetest:00000001:00000001:6B000000:qmsnapshot:200:root@pam!{name}:"
        (prepared / "tasks" / "active" / upid).write_text(json.dumps({"vmid": 200, "snapname": name}))
        client = check_whole(prepared)
        state = client.node.state
        assert client.end_of(upid) == "unexpected status"
    assert set(state.configs.load(200).snapshots) == {"s0", "a1"}
    assert state.configs.load(200).values["parent"] == "a1"
    client.node.stop()


# What a kill leaves of saved RAM: a home is put into the state of that moment, with the task's intent.


def leave(home: Path, kind: str, **intent: Any) -> str:
    """A task that a killed node left active."""
    upid = f"UPID:pvetest:00000001:00000001:6B000000:{kind}:200:root@pam:"
    (home / "tasks" / "active" / upid).write_text(json.dumps({"vmid": 200, **intent}))
    return upid


@pytest.fixture
def left(prepared: Path) -> tuple[Path, Client, FlagQemu]:
    """The home with VM 200 running and a snapshot of its RAM, `ram`; the node is stopped, the VM is not."""
    qemu = FlagQemu()
    client = Client(make_node(prepared, qemu))
    client.do("POST", f"{N}/qemu/200/status/start")
    client.do("POST", f"{N}/qemu/200/snapshot", snapname="ram", vmstate=1)
    client.node.stop()
    return prepared, client, qemu


def change(client: Client, **values: str) -> None:
    configs = client.node.state.configs
    config = configs.load(200)
    config.values |= values
    configs.save(200, config)


def reserve(client: Client, name: str) -> str:
    return client.node.state.disks.allocate_state("local", 200, name, size=1 << 30, needed=1 << 20)


def recovered(home: Path, upid: str, qemu: FlagQemu) -> tuple[Client, str]:
    """The next node, and what its recovery said."""
    client = Client(make_node(home, qemu))
    assert client.end_of(upid) == "unexpected status"
    client.node.stop()
    assert unnamed_files(client.node.state) == []
    return client, client.node.state.tasks.find(upid).log_file.read_text().splitlines()[-1].partition("recovery: ")[2]


def test_a_vm_paused_for_a_snapshot_of_its_ram_goes_on(left: tuple[Path, Client, FlagQemu]) -> None:
    home, client, qemu = left
    config = client.node.state.configs.load(200)
    config.snapshots["half"] = {**config.values, "snapstate": "prepare", "vmstate": reserve(client, "half")}
    config.values["lock"] = "snapshot"
    client.node.state.configs.save(200, config)
    client.node.state.disks.snapshot("local:200/vm-200-disk-0.qcow2", "half", monitor=None)
    qemu.suspend(200)
    upid = leave(home, "qmsnapshot", snapname="half", goes_on=True)
    after, said = recovered(home, upid, qemu)
    assert said == "removed the half-made snapshot 'half' with its RAM; VM 200 goes on"
    assert qemu.paused == set()
    assert set(after.node.state.configs.load(200).snapshots) == {"s0", "ram"}
    assert "lock" not in after.node.state.configs.load(200).values
    assert after.node.state.disks.snapshots("local:200/vm-200-disk-0.qcow2") == ["s0", "ram"]


def test_a_state_that_nothing_names_yet_is_removed(left: tuple[Path, Client, FlagQemu]) -> None:
    home, client, qemu = left
    reserve(client, "early")
    upid = leave(home, "qmsnapshot", snapname="early", goes_on=True)
    assert recovered(home, upid, qemu)[1] == "the snapshot was complete, or had not been begun"


@pytest.mark.parametrize("is_running", [True, False])
def test_a_half_written_suspension_is_undone(left: tuple[Path, Client, FlagQemu], is_running: bool) -> None:
    home, client, qemu = left
    change(client, lock="suspending", vmstate=reserve(client, "suspend"), runningcpu="max")
    qemu.suspend(200) if is_running else qemu.stop(200)
    after, said = recovered(home, leave(home, "qmsuspend"), qemu)
    assert said == f"removed the half-made state; VM 200 {'goes on' if is_running else 'had ended'}"
    assert qemu.paused == set()
    assert not {"lock", "vmstate", "runningcpu"} & after.node.state.configs.load(200).values.keys()


def test_a_whole_suspension_is_ended(left: tuple[Path, Client, FlagQemu]) -> None:
    home, client, qemu = left
    change(client, lock="suspended", vmstate=reserve(client, "suspend"))
    after, said = recovered(home, leave(home, "qmsuspend"), qemu)
    assert (said, qemu.running()) == ("VM 200 is suspended", [])
    assert after.node.state.configs.load(200).values["lock"] == "suspended"


def test_a_resumed_vm_goes_on(left: tuple[Path, Client, FlagQemu]) -> None:
    """The configuration has forgotten the state, so that it is never loaded again."""
    home, client, qemu = left
    volid = reserve(client, "suspend")
    qemu.suspend(200)
    assert recovered(home, leave(home, "qmstart"), qemu)[1] == f"VM 200 goes on; removed {volid}"
    assert (qemu.running(), qemu.paused) == ([200], set())


@pytest.mark.parametrize("lock", ["rollback", ""])
def test_a_rollback_to_ram_ends_with_the_vm_running(left: tuple[Path, Client, FlagQemu], lock: str) -> None:
    home, client, qemu = left
    if lock:
        change(client, lock=lock)
    qemu.suspend(200)  # loaded, perhaps; not let go on
    after, said = recovered(home, leave(home, "qmrollback", snapname="ram"), qemu)
    assert said == "finished the rollback to 'ram'; the VM runs"
    assert (qemu.running(), qemu.paused) == ([200], set())
    assert "lock" not in after.node.state.configs.load(200).values


def test_a_reboot_is_finished(left: tuple[Path, Client, FlagQemu]) -> None:
    home, _, qemu = left
    qemu.stop(200)
    assert recovered(home, leave(home, "qmreboot"), qemu)[1] == "started VM 200, which had shut down"
    assert qemu.running() == [200]


def test_what_a_killed_move_leaves(left: tuple[Path, Client, FlagQemu]) -> None:
    home, client, qemu = left
    qemu.stop(200)
    state = client.node.state
    before = state.owned_by(200)
    extra = state.disks.allocate("local", 200, size=1 << 20)
    intent = {"disk": "scsi1", "old": "local:200/vm-200-disk-0.qcow2", "delete": True, "volumes": before}
    upid = leave(home, "qmmove", **intent)
    assert recovered(home, upid, qemu)[1] == "scsi1 is 'local:200/vm-200-disk-0.qcow2'"
    assert extra not in state.owned_by(200)


def test_clusters_that_a_killed_change_left_are_given_back(left: tuple[Path, Client, FlagQemu]) -> None:
    home, client, qemu = left
    path = client.node.state.disks.path("local:200/vm-200-disk-0.qcow2")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 64k", str(path)], check=True, capture_output=True)
    with path.open("rb+") as file:  # forget the table that leads to them
        file.seek(40)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        file.write(b"\0" * 8)
    checked = subprocess.run(["qemu-img", "check", "-q", str(path)], check=False, capture_output=True)
    assert checked.returncode == 3
    recovered(home, leave(home, "resize", disk="scsi1"), qemu)
    subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)
