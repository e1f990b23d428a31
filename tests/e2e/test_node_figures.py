"""Figures and bulk actions under real QEMU: a sector of machine code that writes to its disk for ever is the guest."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autovibe.node.disks import Disks
from autovibe.node.host import sampler
from autovibe.node.serve import run_directory, serve
from autovibe.node.vm.qemu import Qemu
from tests.contract.node_parts import Client
from tests.e2e.test_node_qemu import build_counter, free_port, wait_for

N = "/nodes/pvetest"


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Qemu]:
    home = tmp_path / "node"
    home.mkdir()
    qemu = Qemu(home, run_directory(home), accel="tcg", forward_port=free_port())
    yield qemu
    for vmid in qemu.running():
        qemu.stop(vmid)


@pytest.fixture
def client(tmp_path: Path, qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(sampler, "PERIOD_SECONDS", 3600)  # samples are the test's own business
    home = tmp_path / "node"
    node = serve(home, "127.0.0.1", 0, name="pvetest", qemu=qemu, disks=Disks(home / "storage")).start()
    yield Client(node)
    node.stop()


def test_figures_are_those_of_the_running_process(client: Client, qemu: Qemu) -> None:
    state = client.node.state
    image = state.disks.path("local:import/counter.raw", must_exist=False)
    image.write_bytes(build_counter().ljust(1 << 20, b"\0"))
    disk = "local-lvm:0,import-from=local:import/counter.raw"
    client.do(
        "POST", f"{N}/qemu", vmid=100, memory=32, scsihw="virtio-scsi-pci", scsi0=disk, boot="order=scsi0", onboot=1
    )
    client.do("POST", f"{N}/startall")
    assert qemu.is_running(100)

    def entry() -> dict[str, Any]:
        state.sampler.sample(state, next(moments))
        (found,) = client.get("/cluster/resources", type="vm")
        return dict(found)

    def rows_with_writes() -> list[dict[str, Any]]:
        entry()
        return [row for row in client.get(f"{N}/qemu/100/rrddata", timeframe="hour") if row.get("diskwrite")]

    moments = itertools.count(time.time() // 60 * 60 - 3000, 10)
    wait_for(rows_with_writes, 60, "a minute with writes")
    assert entry()["diskwrite"] > 0
    rows = rows_with_writes()
    assert rows[-1]["cpu"] > 0
    assert rows[-1]["mem"] > 10 << 20
    assert rows[-1]["maxdisk"] == 1 << 20

    client.do("POST", f"{N}/suspendall")
    assert not qemu.is_running(100)
    assert client.get(f"{N}/qemu/100/config")["lock"] == "suspended"
    assert entry()["diskwrite"] == 0
    client.do("POST", f"{N}/startall")
    assert "lock" not in client.get(f"{N}/qemu/100/config")
    wait_for(lambda: entry()["diskwrite"] > 0, 60, "a write of the resumed guest")
    client.do("POST", f"{N}/stopall", timeout=1)
    assert not qemu.is_running(100)
