"""Third-party clients as their registries publish them, unmodified, and a node with real QEMU for them to drive.

A client is fetched once and kept under ~/.cache/autovibe-tests/clients by its version; without its registry a test that
needs it fails and says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autovibe.node import serve
from autovibe.node.disks import Disks
from autovibe.node.serve import Node, run_directory
from autovibe.node.vm.qemu import Qemu
from tests.contract.node_parts import Client
from tests.stub.node import free_port

HERE = Path(__file__).parent
NODE = "pvetest"

ANSIBLE = "12.3.0"
"""The release of the package `ansible` whose collection community.proxmox (1.4.0) is used; ansible-core is our own."""

ANSIBLE_HASH = "sha256:cd156f82fa87f7a899212b0efa9f7ca3a24d609212de9f78428a572eb01e5414"
_COLLECTION = "ansible_collections/community/proxmox/"


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """A directory of the cache, made by the first who needs it; one that fails to make it leaves nothing behind."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "autovibe-tests" / "clients"
    base.mkdir(parents=True, exist_ok=True)
    place = base / name
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=base) as half:
                make(Path(half) / "made")
                (Path(half) / "made").rename(place)
    return place


def fetch(*argv: str, what: str, folder: Path) -> None:
    """Run a registry's own client."""
    result = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False, timeout=500)
    if result.returncode != 0:
        pytest.fail(f"{what} is needed and could not be fetched: {result.stderr.strip()[-2000:]}", pytrace=False)


def collection() -> Path:
    """A directory for ANSIBLE_COLLECTIONS_PATH that has community.proxmox."""

    def make(place: Path) -> None:
        place.mkdir()
        wanted = place / "wanted.txt"
        wanted.write_text(f"ansible=={ANSIBLE} --hash={ANSIBLE_HASH}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        fetch(*pip, "--require-hashes", "-r", str(wanted), what=f"The package ansible {ANSIBLE}", folder=place)
        (wheel,) = place.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place, [name for name in archive.namelist() if name.startswith(_COLLECTION)])
        wheel.unlink()
        wanted.unlink()

    return cached(f"ansible-{ANSIBLE}", make)


def node_modules() -> Path:
    """The npm packages that npm/package-lock.json names, with their hashes."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.fail("npm is not installed, and the tests need it: apt-get install --no-install-recommends nodejs npm")
    lock = (HERE / "npm" / "package-lock.json").read_bytes()

    def make(place: Path) -> None:
        shutil.copytree(HERE / "npm", place)
        fetch(
            npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", what="The npm package proxmox-api", folder=place
        )

    return cached(f"npm-{hashlib.sha256(lock).hexdigest()[:12]}", make)


@dataclass
class Lab:
    """A node with real QEMU in this process. `client` is for looking at what a third party did."""

    node: Node
    qemu: Qemu
    client: Client

    @property
    def certificate(self) -> str:
        return str(self.node.home / "cert.pem")

    @property
    def password(self) -> str:
        return (self.node.home / "password").read_text().strip()

    @property
    def token(self) -> tuple[str, str, str]:
        """User, name and secret of the node's token."""
        user, _, rest = self.node.token.partition("!")
        name, _, secret = rest.partition("=")
        return user, name, secret

    @property
    def environment(self) -> dict[str, str]:
        """For a client's process: the node's certificate is what it trusts, and nothing of ours tells it more."""
        foreign = ("AUTOVIBE_", "ANSIBLE_", "PROXMOX_", "PVE_")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        clean |= dict.fromkeys(("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"), self.certificate)
        return clean | dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1") | {"LC_ALL": "C.UTF-8"}

    def run(self, *argv: str, folder: Path, more: dict[str, str] | None = None, timeout: float = 300) -> str:
        """Run a client to its end, which must be a good one: what it printed."""
        result = subprocess.run(
            argv,
            cwd=folder,
            env=self.environment | (more or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert result.returncode == 0, f"{argv[0]} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"
        return result.stdout

    def config(self, vmid: int) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"/nodes/{NODE}/qemu/{vmid}/config")
        return found


@contextlib.contextmanager
def open_lab(home: Path) -> Iterator[Lab]:
    port = free_port()
    run = run_directory(home)
    qemu = Qemu(home, run, accel="tcg", forward_port=port + 1)
    node = serve(home, "127.0.0.1", port, name=NODE, qemu=qemu, disks=Disks(home / "storage")).start()
    try:
        yield Lab(node, qemu, Client(node))
    finally:
        node.stop()
        for vmid in qemu.running():
            qemu.stop(vmid)
        shutil.rmtree(run)


def ansible(lab: Lab, program: str, *words: str, folder: Path) -> str:
    """Run one of Ansible's programs with the collection; modules run in this Python, which has proxmoxer."""
    user, name, secret = lab.token
    more = {
        "ANSIBLE_COLLECTIONS_PATH": str(collection()),
        "ANSIBLE_HOME": str(folder / "ansible"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_PIPELINING": "1",
        "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
        "PROXMOX_HOST": "127.0.0.1",
        "PROXMOX_PORT": str(lab.node.port),
        "PROXMOX_URL": lab.node.url,
        "PROXMOX_USER": user,
        "PROXMOX_TOKEN_ID": name,
        "PROXMOX_TOKEN_SECRET": secret,
        "PROXMOX_VALIDATE_CERTS": "true",
    }
    return lab.run(str(Path(sys.executable).with_name(program)), *words, folder=folder, more=more)
