"""The node's VMs under real QEMU: processes, live disks, and a whole Debian guest with agent and cloud-init.

Most tests boot a sector of machine code that counts on its disk, so that they take a second; one boots the guest image.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autovibe.node.disks import DiskError, Disks, qemu_img
from autovibe.node.vm import accel, cloudinit
from autovibe.node.vm.agent import AgentError
from autovibe.node.vm.monitor import MonitorError
from autovibe.node.vm.qemu import Qemu, QemuError, forward_address

VMID = 9100
MIB = 1 << 20

# Sends an 'A' to the serial port, adds one to a number and writes it to sector 1, waits 20 ms, and so on for ever.
COUNTER = bytes.fromhex(
    "fa31c08ed88ec08ed0bc007cfb88164a7cbaf803b041ee66ff060080c7063c7c0100be3a7cb443b0008a164a7ccd13b48631c9ba204ecd15"
    "ebd7100001000080000001"
)


def build_counter() -> bytes:
    return COUNTER.ljust(510, b"\0") + b"\x55\xaa"


def silent(_line: str) -> None:
    pass


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    return Disks(tmp_path / "storage")


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Qemu]:
    run = Path(f"/tmp/av-test-{os.getpid()}-{free_port()}")
    machine = Qemu(tmp_path, run, accel="tcg", forward_port=free_port())
    yield machine
    for vmid in machine.running():
        machine.stop(vmid)
    for left in run.glob("*"):
        left.unlink()
    if run.exists():
        run.rmdir()


@pytest.fixture(params=["local-lvm", "local"])
def volid(request: pytest.FixtureRequest, disks: Disks, tmp_path: Path) -> str:
    image = tmp_path / "counter.raw"
    image.write_bytes(build_counter().ljust(2 * MIB, b"\0"))
    return disks.import_image(request.param, VMID, image, progress=silent)


def config(volid: str, **more: str) -> dict[str, str]:
    return {
        "scsi0": volid,
        "scsihw": "virtio-scsi-single",
        "memory": "64",
        "net0": "virtio=BC:24:11:5A:FD:7F,bridge=vmbr0",
        "boot": "order=scsi0",
        "smbios1": "uuid=8385ad02-ec97-47e1-a008-7563e6fa777a",
        "vmgenid": "60d822fd-22ed-4681-8a8d-621049cbd805",
        "agent": "1",
        **more,
    }


def start(qemu: Qemu, disks: Disks, volid: str, **more: str) -> None:
    qemu.start(VMID, config(volid, **more), {"scsi0": disks.path(volid)})
    wait_for(lambda: qemu.console(VMID).count("A") > 2, 30, "the boot")


def count(disks: Disks, volid: str) -> int:
    """The number the guest wrote last."""
    target = disks.path(volid).with_name("read.raw")
    try:
        qemu_img.run("convert", "-U", "-f", "qcow2", "-O", "raw", str(disks.path(volid)), str(target))
        return int(struct.unpack("<I", target.read_bytes()[512:516])[0])
    finally:
        target.unlink(missing_ok=True)


def live_count(qemu: Qemu, disks: Disks, volid: str) -> int:
    """The same of a running VM: a pause makes QEMU write out what it holds back of the image's tables."""
    qemu.suspend(VMID)
    try:
        return count(disks, volid)
    finally:
        qemu.resume(VMID)


class TestProcesses:
    def test_life(self, qemu: Qemu, disks: Disks, volid: str, tmp_path: Path) -> None:
        assert (qemu.status(VMID), qemu.pid(VMID), qemu.started_at(VMID)) == ({}, None, None)
        start(qemu, disks, volid)
        status = qemu.status(VMID)
        assert status["qmpstatus"] == "running"
        assert status["pid"] == qemu.pid(VMID)
        assert abs(time.time() - (qemu.started_at(VMID) or 0)) < 60
        assert qemu.running() == [VMID]
        with pytest.raises(QemuError, match=f"VM {VMID} already running"):
            qemu.start(VMID, config(volid), {"scsi0": disks.path(volid)})
        qemu.suspend(VMID)
        assert qemu.status(VMID)["qmpstatus"] == "paused"
        qemu.resume(VMID)
        qemu.reset(VMID)
        assert qemu.status(VMID)["qmpstatus"] == "running"
        began = time.monotonic()
        qemu.stop(VMID)
        assert time.monotonic() - began < 3
        assert not qemu.is_running(VMID)
        qemu.stop(VMID)
        assert "A" in qemu.console(VMID)
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [f"{VMID}.console"]

    def test_a_vm_outlives_its_node(self, qemu: Qemu, disks: Disks, volid: str, tmp_path: Path) -> None:
        program = (
            "import sys; from pathlib import Path; from autovibe.node.vm.qemu import Qemu;"
            f"q = Qemu(Path({str(tmp_path)!r}), Path({str(qemu._run)!r}), accel='tcg', forward_port=1024);"
            f"q.start({VMID}, {config(volid)!r}, {{'scsi0': Path({str(disks.path(volid))!r})}});"
            "import os, signal; os.killpg(0, signal.SIGKILL)"
        )
        subprocess.run([sys.executable, "-c", program], check=False, start_new_session=True)
        assert qemu.running() == [VMID]
        assert qemu.status(VMID)["qmpstatus"] == "running"
        qemu.stop(VMID)
        assert qemu.running() == []

    def test_a_killed_vm_is_not_running(self, qemu: Qemu, disks: Disks, volid: str) -> None:
        start(qemu, disks, volid)
        pid = qemu.pid(VMID)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not qemu.is_running(VMID), 5, "its end")
        with pytest.raises(MonitorError, match=r"unable to connect"):
            qemu.monitor(VMID).execute("query-status")
        start(qemu, disks, volid)

    def test_another_process_with_the_number_is_left_alone(self, qemu: Qemu, tmp_path: Path) -> None:
        other = subprocess.Popen(["sleep", "60"])
        try:
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / f"{VMID}.pid").write_text(f"{other.pid}\n")
            assert qemu.pid(VMID) is None
            qemu.stop(VMID)
            assert other.poll() is None
        finally:
            other.kill()
            other.wait()

    def test_a_frozen_process_is_ended(
        self, qemu: Qemu, disks: Disks, volid: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("autovibe.node.vm.monitor.TIMEOUT_SECONDS", 0.5)
        monkeypatch.setattr("autovibe.node.vm.qemu._QUIT_SECONDS", 0.5)
        start(qemu, disks, volid)
        pid = qemu.pid(VMID)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        qemu.stop(VMID)
        assert not qemu.is_running(VMID)

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"scsihw": "nonsense"}, "unknown scsihw 'nonsense'"),
            ({"net0": "nonsense=1"}, "unsupported network card"),
            ({"net0": 'virtio=BC:24:11:5A:FD:7F",x'}, "invalid MAC address"),
            ({"cores": "100000"}, "start failed"),
        ],
    )
    def test_a_failed_start_says_why(
        self, qemu: Qemu, disks: Disks, volid: str, changes: dict[str, str], text: str
    ) -> None:
        with pytest.raises(QemuError, match=text):
            qemu.start(VMID, config(volid, **changes), {"scsi0": disks.path(volid)})
        assert qemu.running() == []

    def test_an_image_in_use_is_refused(
        self, qemu: Qemu, disks: Disks, volid: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("autovibe.node.vm.qemu._LOCK_RETRY_SECONDS", 1)
        start(qemu, disks, volid)
        with pytest.raises(QemuError, match='Failed to get "write" lock'):
            qemu.start(VMID + 1, config(volid, net0="virtio"), {"scsi0": disks.path(volid)})

    @pytest.mark.parametrize(
        "changes",
        [
            {"machine": "q35"},
            {"scsihw": "virtio-scsi-pci", "sockets": "2", "cores": "2"},
            {"scsihw": "lsi", "vga": "serial0"},
            {"scsihw": "megasas", "net1": "e1000=BC:24:11:5A:FD:70,bridge=vmbr1,link_down=1"},
            {"scsihw": "pvscsi", "ipconfig0": "ip=10.99.0.50/24,gw=10.99.0.1"},
            {"ipconfig0": "ip=10.99.0.50/32,gw=10.0.0.1", "agent": "0"},
        ],
    )
    def test_configs_start(self, qemu: Qemu, disks: Disks, tmp_path: Path, changes: dict[str, str]) -> None:
        """Every bus and controller the config can name is one QEMU takes."""
        disk = disks.allocate("local-lvm", VMID, size=MIB)
        keys = ("scsi0", "scsi3", "virtio1", "sata2", "ide0", "ide2")
        drives = {key: disks.path(disks.allocate("local-lvm", VMID, size=MIB)) for key in keys}
        values = config(disk) | {key: f"local-lvm:{key}" for key in keys} | changes
        values |= {"ide2": "local-lvm:vm-9100-cloudinit,media=cdrom", "virtio1": "local-lvm:x,discard=on,serial=abc"}
        values.pop("boot")
        qemu.start(VMID, values, drives)
        assert qemu.status(VMID)["qmpstatus"] == "running"

    def test_forward_addresses(self) -> None:
        assert forward_address(9000) == "127.1.35.40"
        found = {forward_address(vmid) for vmid in range(100, 200_000)}
        assert len(found) == 200_000 - 100
        assert not any(address.startswith("127.0.") for address in found)


class TestLiveDisks:
    def test_snapshots_of_a_running_vm(self, qemu: Qemu, disks: Disks, volid: str, tmp_path: Path) -> None:
        start(qemu, disks, volid)
        monitor = qemu.monitor(VMID)
        disks.snapshot(volid, "one", monitor=monitor)
        time.sleep(0.3)
        disks.snapshot(volid, "two", monitor=monitor)
        time.sleep(0.3)
        with pytest.raises(DiskError, match="already exists"):
            disks.snapshot(volid, "two", monitor=monitor)
        now = live_count(qemu, disks, volid)
        disks.delete_snapshot(volid, "one", monitor=monitor)
        disks.resize(volid, 4 * MIB, monitor=monitor)
        assert disks.size(volid) == 4 * MIB
        copied = disks.copy(
            volid, VMID + 1, storage="local-lvm", snapshot=None, format=None, progress=silent, monitor=monitor
        )
        assert count(disks, copied) >= now
        old = disks.copy(
            volid, VMID + 1, storage="local-lvm", snapshot="two", format=None, progress=silent, monitor=monitor
        )
        assert 0 < count(disks, old) < now
        wait_for(lambda: live_count(qemu, disks, volid) > now, 10, "another write")
        qemu.stop(VMID)
        assert disks.snapshots(volid) == ["two"]
        disks.rollback(volid, "two")
        assert count(disks, volid) == count(disks, old)
        start(qemu, disks, volid)
        disks.delete_snapshot(volid, "two", monitor=monitor)
        qemu.stop(VMID)
        if volid.startswith("local-lvm"):
            assert len(list((tmp_path / "storage/local-lvm/layers").iterdir())) == 3  # this one and two copies
            assert qemu_img.read_header(disks.path(volid)).backing is None
        subprocess.run(["qemu-img", "check", "-q", str(disks.path(volid))], check=True)

    @pytest.mark.parametrize("volid", ["local-lvm"], indirect=True)
    def test_a_clone_of_a_snapshot_runs_beside_its_origin(self, qemu: Qemu, disks: Disks, volid: str) -> None:
        start(qemu, disks, volid)
        disks.snapshot(volid, "one", monitor=qemu.monitor(VMID))
        clone = disks.clone(volid, VMID + 1, snapshot="one")
        qemu.start(VMID + 1, config(clone), {"scsi0": disks.path(clone)})
        wait_for(lambda: "A" in qemu.console(VMID + 1), 30, "the clone's boot")
        disks.delete_snapshot(volid, "one", monitor=qemu.monitor(VMID))  # two need it: it stays
        assert qemu.status(VMID)["qmpstatus"] == qemu.status(VMID + 1)["qmpstatus"] == "running"
        qemu.stop(VMID + 1)
        disks.free(clone)  # the origin runs and holds it: merged later
        qemu.stop(VMID)
        assert any("merged" in line for line in disks.recover())
        assert qemu_img.read_header(disks.path(volid)).backing is None

    @pytest.mark.parametrize("volid", ["local-lvm"], indirect=True)
    def test_the_node_is_killed_while_qemu_switches(
        self, qemu: Qemu, disks: Disks, volid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start(qemu, disks, volid)
        from autovibe.node.disks import thin

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(thin.Thin, "_after", die)
        with pytest.raises(KeyboardInterrupt):
            disks.snapshot(volid, "one", monitor=qemu.monitor(VMID))
        monkeypatch.undo()
        again = Disks(tmp_path / "storage")
        assert any("finished snapshot 'one'" in line for line in again.recover())
        assert again.snapshots(volid) == ["one"]
        before = live_count(qemu, again, volid)
        wait_for(lambda: live_count(qemu, again, volid) > before, 10, "a write into the new top")


class TestProbe:
    def test_the_boot_sector_reaches_its_end(self) -> None:
        assert accel.boots("tcg", "max", seconds=30)

    def test_the_answer_is_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []
        monkeypatch.setattr(accel, "boots", lambda *words: bool(asked.append(words[0])))
        assert accel.probe(tmp_path, kvm=Path("/dev/null")) == "tcg"
        assert accel.probe(tmp_path, kvm=Path("/dev/null")) == "tcg"
        assert asked == ["kvm"]
        (tmp_path / "accel.json").write_text("{")
        accel.probe(tmp_path, kvm=Path("/dev/null"))
        assert asked == ["kvm", "kvm"]
        assert accel.probe(tmp_path, kvm=Path("/dev/absent")) == "tcg"

    def test_forced(self, tmp_path: Path) -> None:
        for accelerator in ("kvm", "tcg"):
            assert Qemu(tmp_path, tmp_path, accel=accelerator, forward_port=1).probe() == accelerator
        with pytest.raises(ValueError, match="accel"):
            Qemu(tmp_path, tmp_path, accel="hax", forward_port=1)


@pytest.mark.guest
def test_a_debian_guest(qemu: Qemu, disks: Disks, guest_image: Path, tmp_path: Path) -> None:
    """Import, template, linked clone, cloud-init, boot, agent, frozen snapshot, shutdown, rollback."""
    image = max(guest_image.glob("debian-12-*.qcow2"), key=lambda path: path.stat().st_mtime)
    base = disks.make_base(disks.import_image("local-lvm", 9000, image, progress=silent))
    disk = disks.clone(base, VMID, snapshot=None)
    seed = disks.allocate("local-lvm", VMID, size=cloudinit.SIZE_BYTES, name=f"vm-{VMID}-cloudinit")
    values = config(
        disk,
        memory="512",
        name="first-light",
        ide2=f"{seed},media=cdrom",
        ciuser="agent",
        sshkeys="ssh-ed25519%20AAAAC3NzaC1lZDI1NTE5AAAAIGtTg0LDnhVvmZ4kJ0jYy1uPPTyeWyFZOUFfNiFbZQUi%20test",
        ipconfig0="ip=dhcp",
        ciupgrade="0",
    )
    drives = {"scsi0": disks.path(disk), "ide2": disks.path(seed)}
    cloudinit.build(drives["ide2"], VMID, values)
    qemu.start(VMID, values, drives)
    agent = qemu.agent(VMID)
    with pytest.raises(AgentError, match="QEMU guest agent is not running"):
        agent.ping()
    wait_for(agent.is_running, 240, "the guest agent")
    wait_for(lambda: _banner(qemu).startswith(b"SSH-2.0"), 120, "an SSH banner")

    def run(*argv: str, data: bytes | None = None) -> tuple[int, bytes]:
        pid = agent.exec(list(argv), input_data=data)
        while not (told := agent.exec_status(pid))["exited"]:
            time.sleep(0.1)
        return told["exitcode"], told.get("out-data", "").encode("latin1")

    wait_for(lambda: run("hostname") == (0, b"first-light\n"), 120, "cloud-init's host name")
    assert run("cat", data="grüße".encode()) == (0, "grüße".encode())
    pid = agent.exec(["sh", "-c", "echo err >&2; kill -9 $$"])
    wait_for(lambda: (told := agent.exec_status(pid))["exited"] and _check_killed(told), 20, "its end")
    with pytest.raises(AgentError, match="Agent error: "):  # told once: qemu-ga has forgotten it
        agent.exec_status(pid)
    with pytest.raises(AgentError, match="Agent error: "):
        agent.exec(["/nope"])
    content = bytes(range(256)) * 300
    agent.write_file("/root/kept", content)
    told = agent.read_file("/root/kept")
    assert (told["content"].encode("latin1"), told["bytes-read"]) == (content, len(content))
    assert agent.read_file("/root/kept", limit=10)["truncated"] == 1
    with pytest.raises(AgentError, match="Agent error: failed to open file"):
        agent.read_file("/root/absent")
    interfaces = {each["name"]: each for each in agent.call("network-get-interfaces")}
    assert interfaces["eth0"]["hardware-address"] == "bc:24:11:5a:fd:7f"

    assert agent.freeze() > 0
    assert agent.call("fsfreeze-status") == "frozen"
    disks.snapshot(disk, "frozen", monitor=qemu.monitor(VMID))
    agent.thaw()
    assert agent.call("fsfreeze-status") == "thawed"
    agent.write_file("/root/later", b"x")
    run("sync")
    qemu.powerdown(VMID)
    wait_for(lambda: not qemu.is_running(VMID), 90, "the shutdown")
    disks.rollback(disk, "frozen")
    qemu.start(VMID, values, {**drives, "scsi0": disks.path(disk)})
    wait_for(agent.is_running, 240, "the guest agent")
    assert agent.read_file("/root/kept")["bytes-read"] == len(content)
    with pytest.raises(AgentError, match="failed to open file"):
        agent.read_file("/root/later")


def _banner(qemu: Qemu) -> bytes:
    try:
        with socket.create_connection((forward_address(VMID), qemu.forward_port), timeout=5) as connection:
            connection.settimeout(5)
            return connection.recv(64)
    except OSError:
        return b""


def _check_killed(told: dict[str, object]) -> bool:
    assert told["signal"] == 9
    assert "exitcode" not in told
    assert told["err-data"] == "err\n"
    return True
