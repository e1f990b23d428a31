"""A node under test with real guests: its API, and a guest's commands through the agent."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autovibe.node.disks import Disks
from autovibe.node.vm.vmconfig import Configs
from tests.contract.node_parts import Client

N = "/nodes/pvetest"

COUNTING = "i=0; while :; do i=$((i+1)); echo $i > /dev/shm/count; sleep 0.05; done"
"""A process whose only trace is in RAM."""


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.1)


def give_image(home: Path, cache: Path) -> str:
    """Put the Debian image into the storage `local`: its volume id."""
    image = max(cache.glob("debian-12-*.qcow2"), key=lambda path: path.stat().st_mtime)
    target = home / "storage" / "local" / "import" / "debian.qcow2"
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(image, target) if image.stat().st_dev == target.parent.stat().st_dev else shutil.copy(image, target)
    return "local:import/debian.qcow2"


DEBIAN = {
    "memory": 384,
    "agent": 1,
    "scsihw": "virtio-scsi-pci",
    "net0": "virtio,bridge=vmbr0",
    "ide2": "local-lvm:cloudinit",
    "ciuser": "agent",
    "ipconfig0": "ip=dhcp",
    "ciupgrade": 0,
}
"""A VM for the image: without a cloud-init drive its boot would look for one on the network."""


class Guest:
    """One VM with an agent."""

    def __init__(self, client: Client, vmid: int) -> None:
        self.client, self.path = client, f"{N}/qemu/{vmid}"

    def do(self, method: str, path: str, **fields: Any) -> None:
        self.client.do(method, self.path + path, **fields)

    def answers(self) -> bool:
        return self.client.ask("POST", f"{self.path}/agent/ping").status == 200

    def await_agent(self, seconds: float = 240) -> None:
        """Until the guest's agent answers; the console tells why it did not."""
        deadline = time.monotonic() + seconds
        while not self.answers():
            if time.monotonic() > deadline:
                qemu, vmid = self.client.node.state.qemu, int(self.path.rpartition("/")[2])
                raise AssertionError(f"no agent for {seconds} s: {qemu.status(vmid)}\n{qemu.console(vmid)[-4000:]}")
            time.sleep(0.3)

    def run(self, script: str) -> str:
        """What a shell script printed; it must succeed."""
        pid = self.client.ask("POST", f"{self.path}/agent/exec", {"command": ["sh", "-c", script]}).data["pid"]
        while not (told := self.client.get(f"{self.path}/agent/exec-status", pid=pid))["exited"]:
            time.sleep(0.1)
        assert told["exitcode"] == 0, (script, told)
        return str(told.get("out-data", "")).strip()

    def begin(self, script: str) -> int:
        return int(self.client.ask("POST", f"{self.path}/agent/exec", {"command": ["sh", "-c", script]}).data["pid"])

    @property
    def boot(self) -> str:
        return self.run("cat /proc/sys/kernel/random/boot_id")

    @property
    def count(self) -> int:
        return int(self.run("cat /dev/shm/count") or 0)

    @property
    def status(self) -> str:
        return str(self.client.get(f"{self.path}/status/current")["qmpstatus"])


def check_disks(home: Path) -> None:
    """`qemu-img check` of every qcow2 file; those a VM has open must not be written to meanwhile."""
    for path in (home / "storage").rglob("*.qcow2"):
        told = subprocess.run(["qemu-img", "check", "-U", "-q", str(path)], capture_output=True, text=True, check=False)
        assert told.returncode == 0, (path, told.stdout, told.stderr)


class Home:
    """A home as its files tell, for `orphans.unnamed_files`; no task may be running."""

    def __init__(self, home: Path) -> None:
        self.home, self.configs, self.disks = home, Configs(home / "qemu-server", "pvetest"), Disks(home / "storage")
