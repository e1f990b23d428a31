"""A whole autovibe (node, hub, guests under real QEMU) in a home of its own, driven through the CLI and the SDK."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autovibe.node import serve
from autovibe.node.disks import Disks
from autovibe.node.vm.qemu import Qemu
from tests.contract.node_parts import Client


def image_cache() -> Path:
    """Built images are kept between runs of the suite, by the hash of their recipe."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "autovibe-tests" / "images"


def free_ports() -> tuple[int, int]:
    """A port for the hub, and one for the node whose successor is free too (guests' forwards use it)."""
    with socket.socket() as hub:
        hub.bind(("127.0.0.1", 0))
        while True:
            with socket.socket() as node, socket.socket() as forward:
                node.bind(("127.0.0.1", 0))
                port = node.getsockname()[1]
                try:
                    forward.bind(("127.0.0.1", port + 1))
                except (OSError, OverflowError):
                    continue
                return hub.getsockname()[1], port


@dataclass
class Autovibe:
    """The CLI on one home. `run` gives the process's result, `json` what it printed."""

    home: Path
    hub_port: int
    node_port: int
    database_url: str = ""

    @property
    def environment(self) -> dict[str, str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("AUTOVIBE_")}
        clean |= {
            "AUTOVIBE_HOME": str(self.home),
            "AUTOVIBE_HUB_PORT": str(self.hub_port),
            "AUTOVIBE_NODE_PORT": str(self.node_port),
            "NO_COLOR": "1",
        }
        return clean | ({"AUTOVIBE_DATABASE_URL": self.database_url} if self.database_url else {})

    def run(self, *words: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [str(Path(sys.executable).with_name("autovibe")), *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and result.returncode != 0:
            raise AssertionError(
                f"autovibe {' '.join(words)} ended with {result.returncode}:\n{result.stdout}{result.stderr}"
            )
        return result

    def json(self, *words: str, timeout: float = 300) -> Any:
        at = words.index("--") if "--" in words else len(words)  # what follows is the guest's
        return json.loads(self.run(*words[:at], "--json", *words[at:], timeout=timeout).stdout)

    def up(self) -> None:
        self.run("up", "--detach", "--port", str(self.hub_port), "--node-port", str(self.node_port), timeout=900)

    def logs(self) -> str:
        found = []
        for name in ("up.log", "hub/hub.log", "node/node.log"):
            if (self.home / name).exists():
                found.append(
                    f"--- {name}\n" + "\n".join((self.home / name).read_text(errors="replace").splitlines()[-60:])
                )
        return "\n".join(found)


@pytest.fixture(scope="session")
def guest_image() -> Path:
    """The image cache, filled: a run that finds it filled is quick."""
    cache = image_cache()
    cache.mkdir(parents=True, exist_ok=True)
    from autovibe import images

    recipe = images.recipe("debian-12")
    if images.built(recipe, cache) is None:
        images.build(recipe, cache, progress=lambda progress: None)
    return cache


@pytest.fixture(scope="session")
def autovibe(tmp_path_factory: pytest.TempPathFactory, guest_image: Path) -> Iterator[Autovibe]:
    home = tmp_path_factory.mktemp("home", numbered=True)
    (home / "images").mkdir()
    for file in guest_image.glob("*.qcow2"):
        os.link(file, home / "images" / file.name) if file.stat().st_dev == home.stat().st_dev else shutil.copy(
            file, home / "images" / file.name
        )
    hub_port, node_port = free_ports()
    installation = Autovibe(home, hub_port, node_port)
    try:
        installation.up()
        yield installation
    finally:
        print(installation.logs())
        installation.run("down", "--machines", check=False, timeout=120)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """A node of this process with real QEMU; its sockets lie under a short path."""
    _, port = free_ports()
    home, run = tmp_path / "node", Path(f"/tmp/av-test-{os.getpid()}-{port}")
    qemu = Qemu(home, run, accel="tcg", forward_port=port + 1)
    node = serve(home, "127.0.0.1", port, name="pvetest", qemu=qemu, disks=Disks(home / "storage")).start()
    yield Client(node)
    node.stop()
    for vmid in qemu.running():
        qemu.stop(vmid)
    shutil.rmtree(run, ignore_errors=True)
