"""Saved RAM under real QEMU, with the boot sector that counts on its disk: pipes, errors, a node that dies."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autovibe.node.disks import Disks
from autovibe.node.vm.monitor import MonitorError
from autovibe.node.vm.qemu import Qemu, QemuError
from tests.e2e.test_node_qemu import (
    MIB,
    VMID,
    build_counter,
    config,
    count,
    free_port,
    live_count,
    silent,
    start,
    wait_for,
)


def quiet(_written: int, _seconds: float) -> None:
    pass


class Machine:
    """The counting VM, which runs, on one of the storages, and a file for its RAM."""

    def __init__(self, tmp_path: Path, storage: str) -> None:
        self.disks = Disks(tmp_path / "storage")
        self.run = Path(f"/tmp/av-state-{os.getpid()}-{free_port()}")
        self.qemu = Qemu(tmp_path, self.run, accel="tcg", forward_port=free_port())
        image = tmp_path / "counter.raw"
        image.write_bytes(build_counter().ljust(2 * MIB, b"\0"))
        self.volid = self.disks.import_image(storage, VMID, image, progress=silent)
        self.ram = tmp_path / "ram"
        with self.ram.open("wb") as file:
            file.truncate(600 * MIB)
        start(self.qemu, self.disks, self.volid)
        self.kept = self.qemu.running_as(VMID)

    def load(self, **more: str) -> None:
        values = config(self.volid, **self.kept) | more
        self.qemu.start(VMID, values, {"scsi0": self.disks.path(self.volid)}, state=self.ram)

    def status(self) -> str:
        return str(self.qemu.status(VMID)["qmpstatus"])

    def counts_on(self) -> None:
        now = live_count(self.qemu, self.disks, self.volid)
        wait_for(lambda: live_count(self.qemu, self.disks, self.volid) > now, 20, "another write")


@pytest.fixture(params=["local-lvm", "local"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    found = Machine(tmp_path, request.param)
    yield found
    found.qemu.stop(VMID)
    subprocess.run(["qemu-img", "check", "-q", str(found.disks.path(found.volid))], check=True)
    for left in found.run.glob("*"):
        left.unlink()
    found.run.rmdir()


def test_back_to_disk_and_ram_of_one_moment(machine: Machine) -> None:
    qemu, disks, volid = machine.qemu, machine.disks, machine.volid
    told: list[int] = []
    qemu.suspend(VMID)
    disks.snapshot(volid, "one", monitor=qemu.monitor(VMID))
    qemu.save_state(VMID, machine.ram, watch=lambda written, _seconds: told.append(written))
    assert machine.status() == "postmigrate"
    assert told[-1] < machine.ram.stat().st_blocks * 512 < 40 * MIB  # sparse: what it needs
    qemu.resume(VMID)
    machine.counts_on()
    qemu.stop(VMID)
    disks.rollback(volid, "one")
    before = count(disks, volid)
    machine.load(vmgenid="11111111-22ed-4681-8a8d-621049cbd805")
    assert machine.status() == "paused"
    assert count(disks, volid) == before
    assert qemu.monitor(VMID).execute("query-vm-generation-id")["guid"].startswith("11111111")
    qemu.resume(VMID)
    machine.counts_on()
    qemu.stop(VMID)
    assert count(disks, volid) < before + 1000  # it went on counting from there, and had not booted anew


def test_a_state_of_another_machine_is_refused_in_qemus_words(machine: Machine) -> None:
    machine.qemu.save_state(VMID, machine.ram, watch=quiet)
    machine.qemu.stop(VMID)
    with pytest.raises(QemuError, match=r"Machine type received is 'pc-i440fx-.*' and local is 'pc-q35-"):
        machine.load(runningmachine="q35")
    assert not machine.qemu.is_running(VMID)
    machine.load()
    machine.qemu.resume(VMID)
    machine.counts_on()


def test_a_state_that_is_none(machine: Machine) -> None:
    machine.qemu.stop(VMID)
    with pytest.raises(QemuError, match="start failed: "):
        machine.load()
    assert not machine.qemu.is_running(VMID)


def test_a_full_disk_is_an_error_and_the_vm_goes_on(machine: Machine) -> None:
    with pytest.raises(OSError, match="No space left"):
        machine.qemu.save_state(VMID, Path("/dev/full"), watch=quiet)
    machine.qemu.resume(VMID)
    machine.counts_on()
    machine.qemu.save_state(VMID, machine.ram, watch=quiet)  # nothing is left of the first
    machine.qemu.resume(VMID)


@pytest.mark.parametrize("moment", ["saving", "saved"])
def test_the_node_is_killed(machine: Machine, moment: str) -> None:
    """Its pipe breaks, so QEMU writes no more; the next node lets the VM go on, with its disks."""
    act = "os.killpg(0, signal.SIGKILL)"
    program = (
        "import os, signal, sys; from pathlib import Path; from autovibe.node.vm.qemu import Qemu\n"
        f"q = Qemu(Path({str(machine.ram.parent)!r}), Path({str(machine.run)!r}), accel='tcg', forward_port=1024)\n"
        f"watch = lambda written, seconds: {act if moment == 'saving' else 'None'}\n"
        f"q.save_state({VMID}, Path({str(machine.ram)!r}), watch=watch)\n{act}"
    )
    machine.qemu.monitor(VMID).close()  # QEMU serves one client a socket
    subprocess.run([sys.executable, "-c", program], check=False, start_new_session=True)
    done = machine.qemu.settle(VMID, goes_on=True)
    assert done[-1] in ("it goes on", "it has its disks again")
    assert machine.status() == "running"
    machine.counts_on()


def test_a_vm_that_waits_for_its_ram_is_ended(machine: Machine) -> None:
    machine.qemu.save_state(VMID, machine.ram, watch=quiet)
    machine.qemu.stop(VMID)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autovibe.node.vm.qemu_state.load", lambda *_: None)  # killed before it gave the state
        machine.load()
    assert machine.status() == "inmigrate"
    assert machine.qemu.settle(VMID, goes_on=False) == ["stopped it, for its RAM was not loaded"]
    assert not machine.qemu.is_running(VMID)
    with pytest.raises(MonitorError):
        machine.qemu.resume(VMID)
