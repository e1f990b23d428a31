"""Starts a stub node in this process and puts an image template on it, through the API as the CLI would."""

from __future__ import annotations

import getpass
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autovibe import node
from autovibe.hypervisor import Proxmox
from autovibe.settings import Settings, load
from autovibe.workflows import image
from tests.stub.disks import StubDisks
from tests.stub.qemu import StubQemu, make_base_tree

VMID_FIRST, VMID_LAST = 9000, 9999


def free_port() -> int:
    """A port whose successor, which guests' forwards use, is free too."""
    while True:
        with socket.socket() as probe, socket.socket() as successor:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            try:
                successor.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


@dataclass
class StubNode:
    """`home` is the node's; a hub of any home talks to it with `settings(home)`."""

    home: Path
    port: int
    server: Any
    qemu: StubQemu
    disks: StubDisks
    template: int = 0

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        return (self.home / "token").read_text().strip()

    @property
    def fingerprint(self) -> str:
        return (self.home / "fingerprint").read_text().strip()

    @property
    def forward_port(self) -> int:
        return self.port + 1

    def proxmox(self) -> Proxmox:
        return Proxmox(self.url, self.token, node="autovibe", fingerprint=self.fingerprint)

    def settings(self, home: Path, **more: Any) -> Settings:
        """Settings of a hub in `home` that uses this node; its guests' user is the one the tests run as."""
        return load(
            home=home,
            proxmox_url=self.url,
            proxmox_token=self.token,
            proxmox_fingerprint=self.fingerprint,
            ssh_via="forward",
            node_port=self.port,
            guest_user=getpass.getuser(),
            min_free_gb=0,
            **{"hub_port": free_port(), "rate_limit_per_minute": 0, "rate_limit_heavy_per_minute": 0, **more},
        )

    def stop(self) -> None:
        self.server.stop()
        self.qemu.stop_all()
        shutil.rmtree(self.home, ignore_errors=True)


def start(delays: dict[str, float] | None = None, boot_seconds: float = 0.0, faults: Path | None = None) -> StubNode:
    """A running stub node with the image template `debian-12`; `delays` are the seconds of disk and start verbs.

    `faults` is a file of faults on demand (autovibe/node/http/faults.py).
    """
    home = Path(tempfile.mkdtemp(prefix="av-stub-"))
    port = free_port()
    base = make_base_tree(home / "base")
    qemu = StubQemu(home / "stub", forward_port=port + 1, boot_seconds=boot_seconds, delays=delays)
    disks = StubDisks(home / "storage", base, delays)
    server = node.serve(home, "127.0.0.1", port, name="autovibe", qemu=qemu, disks=disks, faults=faults)
    server.start()
    found = StubNode(home, port, server, qemu, disks)
    tiny = home / "debian-12-000000000000.qcow2"
    tiny.write_bytes(b"QFI\xfb\x00\x00\x00\x03" + bytes(504))
    found.template = image.upload(
        found.proxmox(),
        storage="local-lvm",
        import_storage="local",
        bridge="vmbr0",
        image="debian-12",
        path=tiny,
        vmid_first=VMID_FIRST,
        vmid_last=VMID_LAST,
        progress=lambda *_: None,
    )
    return found
