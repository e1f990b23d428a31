"""Changes of a running VM under real QEMU, over HTTP: what is plugged in and out, copied, moved and grown meanwhile.

Most of it is tried on a sector of machine code that counts on its disk; one boot of the guest image does the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from autovibe.node.disks import qemu_img
from autovibe.node.serve import Node
from tests.contract.node_parts import Client
from tests.e2e.test_node_qemu import MIB, build_counter, count, wait_for

N = "/nodes/pvetest"
V = f"{N}/qemu/100"


def add_image(node: Node, name: str, source: bytes | Path) -> str:
    """A file under `local:import/`, as an upload leaves it."""
    target = node.state.disks.path(f"local:import/{name}", must_exist=False)
    if isinstance(source, bytes):
        target.write_bytes(source)
    else:
        target.write_bytes(source.read_bytes())
    return f"local:import/{name}"


def put(client: Client, **fields: Any) -> None:
    answer = client.ask("PUT", f"{V}/config", fields)
    assert answer.status == 200, (fields, answer.reason, answer.body)


def config(client: Client, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"{V}/config", **fields)
    return found


def query(client: Client, command: str, **arguments: Any) -> Any:
    return client.node.state.qemu.monitor(100).execute(command, **arguments)


def devices(client: Client) -> set[str]:
    return {each["name"] for each in query(client, "qom-list", path="/machine/peripheral")}


@pytest.fixture
def counting(client: Client) -> Client:
    """A running VM whose disk, of each storage one, a guest without an operating system writes to."""
    image = add_image(client.node, "counter.raw", build_counter().ljust(2 * MIB, b"\0"))
    client.do(
        "POST", f"{N}/qemu", vmid=100, memory=64, scsihw="virtio-scsi-single", boot="order=scsi0",
        scsi0=f"local-lvm:0,import-from={image}", ide2="none,media=cdrom", net0="virtio,bridge=vmbr0",
    )  # fmt: skip
    client.do("POST", f"{V}/status/start")
    await_console(client, "A")
    return client


def await_console(client: Client, text: str) -> None:
    wait_for(lambda: client.node.state.qemu.console(100).count(text) > 2, 60, "the boot")


def counted(client: Client) -> int:
    """The number the guest wrote last; a pause makes QEMU write out what it holds back."""
    qemu = client.node.state.qemu
    qemu.suspend(100)
    try:
        volid = config(client, current=1)["scsi0"].partition(",")[0]
        return count(client.node.state.disks, volid)
    finally:
        qemu.resume(100)


def test_disks_and_discs_come_and_go(counting: Client) -> None:
    client = counting
    put(client, scsi1="local:1,mbps_rd=5,iops_wr=100")
    assert config(client, current=1)["scsi1"].startswith("local:100/vm-100-disk-0.qcow2,")
    assert "scsi1" in devices(client)
    limits = next(each["inserted"] for each in query(client, "query-block") if each.get("qdev") == "scsi1")
    assert (limits["bps_rd"], limits["iops_wr"]) == (5 << 20, 100)
    put(client, scsi1="local:100/vm-100-disk-0.qcow2,mbps_rd=7")
    limits = next(each["inserted"] for each in query(client, "query-block") if each.get("qdev") == "scsi1")
    assert (limits["bps_rd"], limits["iops_wr"]) == (7 << 20, 0)
    assert client.get(f"{V}/status/current")["blockstat"]["scsi1"]["rd_bytes"] >= 0
    client.do("PUT", f"{V}/resize", disk="scsi1", size="+64M")
    put(client, delete="scsi1")
    assert "scsi1" not in devices(client)
    present = config(client, current=1)
    assert present["unused0"] == "local:100/vm-100-disk-0.qcow2"
    assert client.node.state.disks.size(present["unused0"]) == 1088 * MIB
    put(client, scsi2=present["unused0"])
    assert "unused0" not in config(client, current=1)
    put(client, delete="scsi2", force=1)
    assert client.get(f"{N}/storage/local/content", content="images") == []

    iso = client.node.state.disks.path("local:iso/t.iso", must_exist=False)
    iso.write_bytes(b"CD001".ljust(64 << 10, b"\0"))
    put(client, ide2="local:iso/t.iso,media=cdrom")
    assert inserted(client, "ide2") == str(iso)
    put(client, ide2="none,media=cdrom")
    assert inserted(client, "ide2") == ""
    put(client, ide3="none,media=cdrom", memory=96)
    assert {entry["key"] for entry in client.get(f"{V}/pending") if "pending" in entry} == {"ide3", "memory", "boot"}
    put(client, revert="ide3,memory,boot")
    assert not [entry for entry in client.get(f"{V}/pending") if "pending" in entry]


def inserted(client: Client, key: str) -> str:
    block = next(each for each in query(client, "query-block") if key in str(each.get("qdev")).split("/"))
    return str(block.get("inserted", {}).get("file", ""))


def test_what_the_guest_does_not_let_go_stays(counting: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client = counting
    monkeypatch.setattr("autovibe.node.vm.plugs.UNPLUG_SECONDS", 0.5)
    put(client, net1="virtio,bridge=vmbr0")
    assert "net1" in devices(client)
    answer = client.ask("PUT", f"{V}/config", {"delete": "net1"})
    assert answer.json["errors"] == {"net1": "hotplug problem - error on hot-unplugging device 'net1'"}
    assert {"key": "net1", "value": config(client, current=1)["net1"], "delete": 1} in client.get(f"{V}/pending")
    put(client, hotplug="0")
    put(client, net2="virtio,bridge=vmbr0", virtio1="local:1")
    assert not {"net2", "virtio1"} & devices(client)
    put(client, net0=config(client)["net0"] + ",link_down=1")
    assert "link_down=1" in config(client, current=1)["net0"]
    client.do("POST", f"{V}/status/stop")
    present = config(client, current=1)
    assert "net1" not in present
    assert {"net2", "virtio1"} <= present.keys()
    client.do("POST", f"{V}/status/start")
    await_console(client, "A")
    assert {"net2", "virtio1"} <= devices(client)


@pytest.mark.parametrize("target", [{"storage": "local"}, {"storage": "local", "format": "raw", "delete": 1}])
def test_a_disk_is_moved_while_it_is_written(counting: Client, target: dict[str, Any]) -> None:
    client = counting
    upid = client.ask("POST", f"{V}/move_disk", {"disk": "scsi0", **target}).data
    assert client.end_of(upid) == "OK", client.log(upid)
    assert ":qmmove:100:" in upid
    assert "drive-scsi0: Completed successfully." in client.log(upid)
    present = config(client, current=1)
    volid = present["scsi0"].partition(",")[0]
    assert volid == f"local:100/vm-100-disk-0.{target.get('format', 'qcow2')}"
    assert present.get("unused0") == (None if target.get("delete") else "local-lvm:vm-100-disk-0")
    assert len(client.get(f"{N}/storage/local-lvm/content")) == (0 if target.get("delete") else 1)
    if "format" not in target:
        before = counted(client)
        wait_for(lambda: counted(client) > before, 30, "a write into the new file")
    client.do("PUT", f"{V}/resize", disk="scsi0", size="+1M")
    client.do("POST", f"{V}/status/stop")
    client.do("POST", f"{V}/status/start")
    await_console(client, "A")


def test_a_running_vm_is_cloned_as_of_one_moment(counting: Client) -> None:
    client = counting
    put(client, scsi1="local-lvm:1")
    before = counted(client)
    upid = client.ask("POST", f"{V}/clone", {"newid": 101, "full": 1, "storage": "local"}).data
    assert client.end_of(upid) == "OK", client.log(upid)
    clone = client.get(f"{N}/qemu/101/config")
    assert {clone[key].partition(",")[0] for key in ("scsi0", "scsi1")} == {
        "local:101/vm-101-disk-0.qcow2", "local:101/vm-101-disk-1.qcow2",
    }  # fmt: skip
    assert before <= count(client.node.state.disks, "local:101/vm-101-disk-0.qcow2") <= counted(client)
    assert any("transferred" in line for line in client.log(upid))
    client.do("POST", f"{N}/qemu/101/status/start")
    assert client.get(f"{N}/qemu/101/status/current")["running-machine"].startswith("pc-i440fx-")


def test_options_become_devices(client: Client) -> None:
    client.do(
        "POST", f"{N}/qemu", vmid=100, memory=256, cores=2, sockets=2, vcpus=2, numa=1, balloon=128, cpuunits=50,
        cpu="x86-64-v2-AES,flags=+aes", watchdog="i6300esb,action=pause", audio0="device=ich9-intel-hda",
        rng0="/dev/urandom,max_bytes=1024,period=1000", tablet=1, keyboard="de", localtime=1, vga="cirrus", acpi=1,
        startdate="2026-01-02T3:04:05", net7="e1000,bridge=vmbr0", virtio9="local:1,iothread=1,serial=abc",
        sata0="local:1,ssd=1", scsi7="local:1", scsi3="local:1,ro=1,wwn=0x5000c50015ea71ac", serial1="socket",
        smbios1="manufacturer=QUNNRSwgSW5j,base64=1", freeze=1, tdf=1, machine="pc",
    )  # fmt: skip
    of_root = client.node.state.configs.load(100)
    of_root.values |= {"affinity": "0", "args": "-name renamed"}
    client.node.state.configs.save(100, of_root)
    client.do("POST", f"{V}/status/start")
    status = client.get(f"{V}/status/current")
    assert (status["cpus"], status["qmpstatus"]) == (2, "prelaunch")
    assert status["ballooninfo"]["max_mem"] == 256 << 20
    wanted = {"net7", "virtio9", "sata0", "scsi7", "scsi3", "watchdog0", "audio0", "rng0", "tablet", "balloon0"}
    assert wanted <= devices(client)
    assert client.node.state.qemu.tell(100, "info name") == "renamed\r\n"
    process = psutil.Process(status["pid"])
    assert (process.cpu_affinity(), process.nice() >= 4) == ([0], True)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("hostpci0", "00:01.0", "hostpci0: this node hands no hardware of the host to guests"),
        ("tpmstate0", "local:1", "tpmstate0: this node has no TPM emulator"),
        ("machine", "virt", "this node runs guests of the architecture x86_64 only"),
        ("cpu", "custom-mine", "custom cputype 'mine' not found"),
        ("machine", "pc-i440fx-99.9+pve1", "unsupported machine type"),
    ],
)
def test_what_the_node_lacks_is_refused_at_the_start(client: Client, option: str, value: str, reason: str) -> None:
    client.do("POST", f"{N}/qemu", vmid=100, memory=64)
    by_root = client.node.state.configs.load(100)
    if option.startswith("hostpci"):
        by_root.values[option] = value
        client.node.state.configs.save(100, by_root)
    else:
        put(client, **{option: value})
    status = client.run("POST", f"{V}/status/start")
    assert status.startswith("start failed: ")
    assert reason in status


@pytest.mark.guest
def test_a_guest_sees_what_is_plugged(client: Client, guest_image: Path) -> None:
    """Cards, disks, processors, memory, keys and a new cloud-init disc, all on one boot."""
    image = max(guest_image.glob("debian-12-*.qcow2"), key=lambda path: path.stat().st_mtime)
    volid = add_image(client.node, "debian.qcow2", image)
    client.do(
        "POST", f"{N}/qemu", vmid=100, name="plugs", memory=512, cores=2, vcpus=1, agent=1, boot="order=scsi0",
        scsihw="virtio-scsi-single", scsi0=f"local-lvm:0,import-from={volid}", ide2="local-lvm:cloudinit",
        net0="virtio,bridge=vmbr0", ipconfig0="ip=dhcp", ciupgrade=0, ciuser="lab", hotplug="network,disk,cpu",
        serial0="socket",
    )  # fmt: skip
    client.do("POST", f"{V}/status/start")
    wait_for(lambda: client.ask("POST", f"{V}/agent/ping").status == 200, 240, "the guest agent")

    def run(script: str) -> str:
        pid = client.ask("POST", f"{V}/agent/exec", {"command": ["sh", "-c", script]}).data["pid"]
        while not (told := client.get(f"{V}/agent/exec-status", pid=pid))["exited"]:
            time.sleep(0.1)
        return str(told.get("out-data", ""))

    def seen(script: str, wanted: Callable[[str], bool], what: str) -> None:
        wait_for(lambda: wanted(run(script)), 60, what)

    put(client, net1="virtio=BC:24:11:00:00:01,bridge=vmbr0", scsi1="local:1,serial=plugged")
    seen("cat /sys/class/net/*/address", lambda text: "bc:24:11:00:00:01" in text, "the card")
    seen("ls /dev/disk/by-id", lambda text: "plugged" in text, "the disk")
    put(client, delete="net1,scsi1")
    seen("cat /sys/class/net/*/address", lambda text: "bc:24:11:00:00:01" not in text, "the card's end")
    seen("ls /dev/disk/by-id", lambda text: "plugged" not in text, "the disk's end")

    put(client, vcpus=2)
    seen("ls -d /sys/devices/system/cpu/cpu[0-9]*", lambda text: text.count("cpu/cpu") == 2, "the processor")
    put(client, balloon=384)
    wait_for(
        lambda: client.get(f"{V}/status/current")["balloon"] <= 384 << 20,
        60,
        "the balloon to be as large as it is to be",
    )
    assert client.get(f"{V}/status/current")["ballooninfo"]["total_mem"] > 0

    put(client, ciuser="other")
    assert client.get(f"{V}/cloudinit")[0] == {"key": "ciuser", "value": "lab", "pending": "other"}
    assert client.ask("PUT", f"{V}/cloudinit").status == 200
    script = "mount -o ro LABEL=cidata /mnt && cat /mnt/user-data; umount /mnt"
    seen(script, lambda text: "user: other" in text, "the new data")

    run("echo 1 > /proc/sys/kernel/sysrq; dmesg -C")
    assert client.ask("PUT", f"{V}/sendkey", {"key": "alt-sysrq-h"}).status == 200
    seen("dmesg", lambda text: "sysrq: HELP" in text, "the keys")
    assert client.ask("PUT", f"{V}/sendkey", {"key": "nokey"}).status == 500
    assert client.ask("POST", f"{V}/monitor", {"command": "info status"}).data == "VM status: running\r\n"

    run("dd if=/dev/urandom of=/root/kept bs=1M count=8; sync")
    sum_before = run("sha1sum /root/kept")
    client.do("POST", f"{V}/move_disk", disk="scsi0", storage="local", delete=1)
    client.do("PUT", f"{V}/resize", disk="scsi0", size="+256M")
    size = client.node.state.disks.size(config(client)["scsi0"].partition(",")[0])
    seen("cat /sys/block/sda/size", lambda text: int(text) * 512 == size, "the grown disk")
    upid = client.ask("POST", f"{V}/clone", {"newid": 101, "full": 1, "name": "copy"}).data
    assert client.end_of(upid) == "OK", client.log(upid)
    assert run("sha1sum /root/kept") == sum_before
    copied = client.node.state.disks.path(client.get(f"{N}/qemu/101/config")["scsi0"].partition(",")[0])
    qemu_img.run("check", "-q", "-f", "qcow2", str(copied))
