"""kill -9 of the node at random moments, with a real guest: nothing is lost, nothing is left, and it serves again."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autovibe.node.access.auth import Auth
from autovibe.node.disks.orphans import unnamed_files
from autovibe.node.serve import run_directory
from autovibe.node.vm.qemu import Qemu
from tests.contract.node_parts import Client
from tests.e2e.conftest import free_ports
from tests.e2e.guest_node import COUNTING, DEBIAN, Guest, Home, N, check_disks, give_image, wait_for

KILLS = 20
GUEST, STOPPED, TEMPLATE = 100, 200, 300

PROGRAM = """
import sys
from pathlib import Path
from autovibe.node import run
run(Path(sys.argv[1]), "127.0.0.1", int(sys.argv[2]), name="pvetest", accel="tcg")
"""

START: tuple[str, str, dict[str, Any]] = ("POST", "/qemu/100/status/start", {})  # when it is suspended to disk
ON_THE_GUEST: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("POST", "/qemu/100/snapshot", {"snapname": "disk"}),
    ("POST", "/qemu/100/snapshot", {"snapname": "ram", "vmstate": 1}),
    ("DELETE", "/qemu/100/snapshot/disk", {}),
    ("POST", "/qemu/100/snapshot/ram/rollback", {}),
    ("DELETE", "/qemu/100/snapshot/ram", {}),
    ("POST", "/qemu/100/move_disk", {"disk": "scsi1", "storage": "local-lvm", "delete": 1}),
    ("POST", "/qemu/100/move_disk", {"disk": "scsi1", "storage": "local", "delete": 1}),
    ("POST", "/qemu/100/status/suspend", {"todisk": 1}),
    START,
)
ON_OTHERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("POST", "/qemu/300/clone", {"newid": 400}),
    ("POST", "/qemu/300/clone", {"newid": 401, "full": 1}),
    ("POST", "/qemu", {"vmid": 402, "scsi0": "local:0,import-from=local:import/small.qcow2", "scsi1": "local-lvm:1"}),
    ("POST", "/qemu/200/snapshot", {"snapname": "s1"}),
    ("POST", "/qemu/200/snapshot", {"snapname": "s2"}),
    ("POST", "/qemu/200/snapshot/s1/rollback", {}),
    ("DELETE", "/qemu/200/snapshot/s1", {}),
    ("DELETE", "/qemu/200/snapshot/s2", {}),
    ("POST", "/qemu/400/move_disk", {"disk": "scsi0", "storage": "local", "delete": 1}),
    ("POST", "/qemu/401/move_disk", {"disk": "scsi1", "storage": "local-lvm"}),
    ("DELETE", "/qemu/400", {}),
    ("DELETE", "/qemu/401", {}),
    ("DELETE", "/qemu/402", {}),
)


class Killable:
    """The node as a process."""

    def __init__(self, home: Path, port: int) -> None:
        argv = [sys.executable, "-c", PROGRAM, str(home), str(port)]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        assert self.process.stdout.readline().startswith("Node ")
        address = SimpleNamespace(token=Auth(home).token, port=port, name="pvetest")
        self.client = Client(address)  # type: ignore[arg-type]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def end_of(self, upid: str) -> str:
        told = {"status": "running"}
        while told["status"] == "running":
            told = self.client.get(f"{N}/tasks/{upid}/status")
        return str(told["exitstatus"])

    def do(self, method: str, path: str, **fields: Any) -> None:
        status = self.end_of(self.client.ask(method, N + path, fields).data)
        assert status == "OK", (method, path, status)

    def work_through(self, calls: list[tuple[str, str, dict[str, Any]]]) -> None:
        """One call after the other until the node is dead; many are refused, as the mix is blind."""
        for method, path, fields in calls:
            try:
                answer = self.client.ask(method, N + path, fields)
                if answer.status == 200:
                    self.end_of(str(answer.data))
            except (OSError, AssertionError, ValueError):
                if self.process.poll() is not None:
                    return


@pytest.mark.guest
def test_kills_at_random_moments(tmp_path: Path, guest_image: Path) -> None:
    seed = int(os.environ.get("AUTOVIBE_TEST_SEED", random.randrange(1 << 30)))
    print(f"AUTOVIBE_TEST_SEED={seed}")
    chance, (_, port), home = random.Random(seed), free_ports(), tmp_path / "node"
    qemu = Qemu(home, run_directory(home), accel="tcg", forward_port=port + 1)
    node = Killable(home, port)
    try:
        boot = _prepare(node, home, guest_image)
        for _ in range(KILLS):
            mixes = [[START, *chance.choices(ON_THE_GUEST, k=12)], chance.choices(ON_OTHERS, k=12)]
            threads = [threading.Thread(target=node.work_through, args=(mix,)) for mix in mixes]
            for thread in threads:
                thread.start()
            time.sleep(chance.uniform(0.05, 3))
            node.kill()
            for thread in threads:
                thread.join()
            node = Killable(home, port)
            _check_whole(node, home)
        guest = Guest(node.client, GUEST)
        if node.client.get(f"{guest.path}/config").get("lock") == "suspended":
            node.do("POST", "/qemu/100/status/start")
        assert guest.boot == boot  # one boot, whatever was killed
        counted = guest.count
        wait_for(lambda: guest.count > counted, 30, "counting")
        guest.run("dd if=/dev/urandom of=/root/last bs=1M count=4 conv=fsync; sync")
        node.do("POST", "/qemu/100/status/stop")
        check_disks(home)
    finally:
        node.kill()
        for vmid in qemu.running():
            qemu.stop(vmid)
        for left in run_directory(home).glob("*"):
            left.unlink()
        run_directory(home).rmdir()


def _prepare(node: Killable, home: Path, cache: Path) -> str:
    """A running guest with a disk on each storage, a stopped VM and a template: the guest's boot id."""
    image = give_image(home, cache)
    small = home / "storage" / "local" / "import" / "small.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", small, "64M"], check=True)
    disks = {"scsi0": f"local-lvm:0,import-from={image}", "scsi1": "local:1"}
    node.do("POST", "/qemu", vmid=GUEST, **DEBIAN, **disks, start=1)
    for vmid in (STOPPED, TEMPLATE):
        node.do("POST", "/qemu", vmid=vmid, scsi0="local-lvm:1", scsi1="local:1")
    node.do("POST", f"/qemu/{TEMPLATE}/template")
    guest = Guest(node.client, GUEST)
    guest.await_agent()
    guest.begin(COUNTING)
    return guest.boot


def _check_whole(node: Killable, home: Path) -> None:
    """What must be true of a home whenever no task runs."""
    assert list((home / "tasks" / "active").iterdir()) == []
    for task in node.client.get(f"{N}/tasks", limit=0):
        assert task["status"], task
    for log in (home / "tasks" / "logs").rglob("UPID:*"):
        assert "recovery failed" not in (said := log.read_text()), said
    is_running = Guest(node.client, GUEST).status == "running"
    lock = node.client.get(f"{N}/qemu/{GUEST}/config").get("lock")
    assert (is_running, lock) in ((True, None), (False, "suspended"))
    if is_running:  # a pause makes QEMU write out what it holds back of the images' tables
        node.do("POST", f"/qemu/{GUEST}/status/suspend")
    try:
        seen = Home(home)
        for vmid in seen.configs.vmids():
            assert vmid == GUEST or "lock" not in seen.configs.load(vmid).values
        assert unnamed_files(seen) == []  # type: ignore[arg-type]
        check_disks(home)
    finally:
        if is_running:
            node.do("POST", f"/qemu/{GUEST}/status/resume")
