"""An exec on a pooled connection against OpenSSH's ControlMaster: `true` on an sshd of our own, in blocks by turns.

Ours is `Guests.exec`, with the process that watches the time-out; the peer is one `ssh` that uses the master's socket.
"""

from __future__ import annotations

import getpass
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from autovibe.errors import NotYet
from autovibe.guest import Address, Guests
from tests.bench.figure import Figure

BLOCKS, BLOCK = 10, 20
TARGET = 0.5


def figures() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="av-bench-") as home:
        guests = Guests(Path(home) / "key")
        try:
            with own_sshd(Path(home), guests) as address, control_master(Path(home), address) as ssh:
                mine, theirs = _measure(guests, address, ssh)
        finally:
            guests.close()
    yield Figure("exec of `true`, p50, pooled against ControlMaster", mine, theirs, "ms", TARGET)


def _measure(guests: Guests, address: Address, ssh: list[str]) -> tuple[float, float]:
    def ours() -> int:
        return guests.exec(address, ["true"]).exit_status

    def peer() -> int:
        quiet = subprocess.DEVNULL
        return subprocess.run([*ssh, "true"], check=False, stdin=quiet, stderr=quiet).returncode

    times: dict[Callable[[], int], list[float]] = {ours: [], peer: []}
    for number in range(BLOCKS + 1):
        for call, found in times.items():
            for _ in range(BLOCK):
                began = time.perf_counter()
                status = call()
                if number:  # the first block warms up
                    found.append((time.perf_counter() - began) * 1000)
                if status != 0:
                    raise AssertionError(f"The command ended with {status}.")
    return statistics.median(times[ours]), statistics.median(times[peer])


@contextmanager
def own_sshd(home: Path, guests: Guests) -> Iterator[Address]:
    """An sshd on loopback for the user who runs this, which knows the pool's key."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    (home / "authorized_keys").write_text(guests.public_key + "\n")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / "host_key")], check=True)
    # SHLVL keeps bash from reading .bashrc, whose cost would be measured on both sides.
    (home / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {home}/host_key\nPidFile {home}/sshd.pid\nUsePAM no\n"
        f"AuthorizedKeysFile {home}/authorized_keys\nStrictModes no\nPasswordAuthentication no\nSetEnv SHLVL=5\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    sshd = subprocess.Popen(
        ["/usr/sbin/sshd", "-D", "-e", "-f", str(home / "sshd_config")], stderr=(home / "sshd.log").open("wb")
    )
    try:
        user = getpass.getuser()
        yield Address("127.0.0.1", port, user, _reach(guests, port, user))
    finally:
        sshd.terminate()
        sshd.wait()


def _reach(guests: Guests, port: int, user: str) -> str:
    deadline = time.monotonic() + 30
    while True:
        try:
            return guests.reach("127.0.0.1", port, user)
        except NotYet:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextmanager
def control_master(home: Path, address: Address) -> Iterator[list[str]]:
    """An argv prefix that runs a command over a master connection that is open."""
    (home / "known_hosts").write_text(f"[{address.host}]:{address.port} {address.host_key}\n")
    options = [f"ControlPath={home}/control", "StrictHostKeyChecking=yes", f"UserKnownHostsFile={home}/known_hosts"]
    argv = ["ssh", "-F", "/dev/null", "-i", str(home / "key"), *(word for text in options for word in ("-o", text))]
    argv += ["-p", str(address.port), "-l", address.user]
    master = subprocess.Popen([*argv, "-o", "ControlMaster=yes", "-N", address.host], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while subprocess.run([*argv, "-O", "check", address.host], capture_output=True, check=False).returncode:
            if time.monotonic() > deadline:
                raise AssertionError("The master connection does not come up.")
            time.sleep(0.05)
        yield [*argv, address.host]
    finally:
        master.kill()  # a SIGTERM that comes at the wrong moment is lost
        master.wait()
