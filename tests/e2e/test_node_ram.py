"""A real guest's RAM through the API: snapshots, rollbacks, suspended to disk; files and processes are as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autovibe.node.disks.orphans import unnamed_files
from autovibe.node.vm.qemu_state import Watch
from tests.contract.node_parts import Client
from tests.e2e.guest_node import COUNTING, DEBIAN, Guest, N, check_disks, give_image, wait_for

VMID = 100
SECOND = "second=/dev/$(grep -lx 2097152 /sys/block/sd*/size | cut -d/ -f4); "
"""A shell's words for the disk of 1 GiB: which of two disks the kernel calls sdb differs from boot to boot."""


@pytest.mark.guest
def test_files_and_processes_are_as_they_were(client: Client, guest_image: Path) -> None:
    """One disk on each storage, so that both kinds of snapshots meet the RAM."""
    state = client.node.state
    image = give_image(state.home, guest_image)
    disks = {"scsi0": f"local-lvm:0,import-from={image}", "scsi1": "local:1"}
    client.do("POST", f"{N}/qemu", vmid=VMID, **DEBIAN, **disks, start=1)
    guest = Guest(client, VMID)
    guest.await_agent()

    guest.run(SECOND + "echo one > /root/file; echo one | dd of=$second conv=fsync; sync")
    guest.do("POST", "/snapshot", snapname="disk")
    boot, pid = guest.boot, guest.begin(COUNTING)
    guest.run(SECOND + "echo two > /root/file; echo two > /dev/shm/file; echo two | dd of=$second conv=fsync")
    wait_for(lambda: guest.count > 2, 30, "counting")
    _stop_a_saving(guest, client)
    guest.do("POST", "/snapshot", snapname="ram", vmstate=1)
    counted = guest.count
    generation = client.get(f"{guest.path}/config")["vmgenid"]
    wait_for(lambda: guest.count > counted, 30, "counting after the snapshot")
    guest.run("dd if=/dev/urandom of=/root/after bs=1M count=8 conv=fsync; sync")  # the disks are the VM's again
    guest.run(
        SECOND + f"kill {pid}; rm /dev/shm/*; echo three > /root/file; echo three | dd of=$second conv=fsync; sync"
    )

    guest.do("POST", "/snapshot/ram/rollback")
    assert guest.status == "running"
    assert guest.boot == boot
    assert guest.run(SECOND + "cat /root/file /dev/shm/file; dd if=$second bs=4 count=1") == "two\ntwo\ntwo"
    assert guest.run(f"readlink /proc/{pid}/exe; ls /root").endswith("file")
    assert guest.count >= 2
    assert (renewed := client.get(f"{guest.path}/config")["vmgenid"]) != generation
    assert state.qemu.monitor(VMID).execute("query-vm-generation-id")["guid"] == renewed
    counted = guest.count
    wait_for(lambda: guest.count > counted, 30, "counting after the rollback")
    guest.run("dd if=/dev/urandom of=/root/after bs=1M count=8 conv=fsync; sync")

    _suspend_and_resume(guest, client, boot)

    guest.do("POST", "/snapshot/disk/rollback", start=1)
    guest.await_agent()
    assert guest.boot != boot
    assert guest.run(SECOND + "cat /root/file; dd if=$second bs=4 count=1") == "one\none"
    assert guest.run("ls /dev/shm /root/after 2>/dev/null || true") == "/dev/shm:"

    guest.do("POST", "/snapshot/ram/rollback")  # the newer one is kept
    assert (guest.boot, guest.run("cat /root/file")) == (boot, "two")
    for name in ("disk", "ram"):
        guest.do("DELETE", f"/snapshot/{name}")
    guest.run("sync")
    guest.do("POST", "/status/suspend")
    assert guest.status == "paused"
    check_disks(state.home)
    guest.do("POST", "/status/resume")
    guest.do("POST", "/status/shutdown", timeout=120)
    assert unnamed_files(state) == []
    check_disks(state.home)


def _stop_a_saving(guest: Guest, client: Client) -> None:
    """A snapshot whose task is stopped when RAM is being written leaves nothing, and the guest goes on."""
    qemu, tasks = client.node.state.qemu, client.node.state.tasks
    real = qemu.save_state

    def stopping(vmid: int, path: Path, *, watch: Watch) -> None:
        def stop_then_watch(written: int, seconds: float) -> None:
            if written:
                tasks.stop(str(tasks.running()[0].upid))
            watch(written, seconds)

        real(vmid, path, watch=stop_then_watch)

    qemu.save_state = stopping  # type: ignore[method-assign]
    assert client.run("POST", f"{guest.path}/snapshot", snapname="no", vmstate=1) == "received interrupt"
    qemu.save_state = real  # type: ignore[method-assign]
    assert [entry["name"] for entry in client.get(f"{guest.path}/snapshot")] == ["disk", "current"]
    assert guest.status == "running"
    assert _states(client) == []
    guest.run("echo x > /root/x; sync; rm /root/x")


def _suspend_and_resume(guest: Guest, client: Client, boot: str) -> None:
    counted = guest.count
    guest.do("POST", "/status/suspend", todisk=1, statestorage="local-lvm")
    assert guest.status == "stopped"
    assert client.node.state.qemu.pid(VMID) is None
    assert len(_states(client)) == 2
    guest.do("POST", "/status/start")
    assert guest.boot == boot
    wait_for(lambda: guest.count > counted, 30, "counting after the resume")
    guest.run("dd if=/dev/urandom of=/root/more bs=1M count=4 conv=fsync; sync")
    assert len(_states(client)) == 1


def _states(client: Client) -> list[dict[str, Any]]:
    listed = [entry for name in ("local", "local-lvm") for entry in client.get(f"{N}/storage/{name}/content")]
    return [entry for entry in listed if "-state-" in entry["volid"]]
