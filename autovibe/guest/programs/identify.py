"""Makes a cloned guest somebody of its own. Runs in the guest as root; answers {"host_key": …, "changed": […]}.

The marker /var/lib/autovibe/identity tells for which instance that was done. Kernel and services are touched only where
this is a booted system of its own (PID 1 is systemd in our mount namespace): a container on somebody's host has files
of its own, but shares the clock and perhaps the host name.
"""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from typing import Any

CLOCK_SECONDS = 2.0


def read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def write(path: str, text: str, mode: int) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = os.path.dirname(path) + "/." + secrets.token_hex(8) + ".autovibe"
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    os.rename(temporary, path)


def is_booted() -> bool:
    try:
        is_ours = os.stat("/proc/1/ns/mnt").st_ino == os.stat("/proc/self/ns/mnt").st_ino
    except OSError:
        return False
    return is_ours and os.path.isdir("/run/systemd/system") and read("/proc/1/comm").strip() == "systemd"


def boot_time() -> float:
    match = re.search(r"^btime (\d+)", read("/proc/stat"), re.MULTILINE)
    return float(match.group(1)) if match else 0.0


def set_hostname(root: str, name: str, booted: bool) -> bool:
    changed = False
    if read(root + "etc/hostname").strip() != name:
        write(root + "etc/hostname", name + "\n", 0o644)
        changed = True
    hosts = read(root + "etc/hosts")
    line = "127.0.1.1 " + name
    if line not in hosts.splitlines():
        kept = [found for found in hosts.splitlines() if not found.startswith("127.0.1.1")]
        write(root + "etc/hosts", "\n".join([*kept, line]) + "\n", 0o644)
        changed = True
    if booted and socket.gethostname() != name:
        socket.sethostname(name)
        changed = True
    return changed


def forget_parents_agent(root: str) -> None:
    """What ran in the machine this one was cloned from is none of its own; its output is the Hub's already."""
    shutil.rmtree(root + "var/lib/autovibe/agent", ignore_errors=True)
    with suppress(FileNotFoundError):
        os.unlink(root + "var/log/autovibe/agent.log")


def set_clock(now: float) -> bool:
    if abs(time.time() - now) <= CLOCK_SECONDS:
        return False
    time.clock_settime(time.CLOCK_REALTIME, now)
    return True


def fresh_host_key(pinned: str, parents: str) -> tuple[str, bool]:
    """The host key after, and whether it changed here.

    A key younger than this boot was made by cloud-init for this instance. An older one, and one that the marker of the
    parent names, is the parent's.
    """
    path = "/etc/ssh/ssh_host_ed25519_key"
    found = " ".join(read(path + ".pub").split()[:2])
    if not found:
        return pinned, False
    is_fresh = found != parents and os.stat(path).st_mtime >= boot_time() - 1
    if is_fresh and found == pinned:
        return pinned, False
    if not is_fresh:
        for key in glob.glob("/etc/ssh/ssh_host_*_key"):
            kind = os.path.basename(key)[len("ssh_host_") : -len("_key")]
            temporary = "/etc/ssh/." + secrets.token_hex(8)
            argv = ["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "", "-f", temporary]
            subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
            os.rename(temporary + ".pub", key + ".pub")
            os.rename(temporary, key)
    # Connections that are open stay; the next one is shown the new key.
    subprocess.run(["systemctl", "reload", "ssh"], check=True, capture_output=True)
    return " ".join(read(path + ".pub").split()[:2]), True


def main() -> None:
    order: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    root = order.get("root", "/")
    booted = root == "/" and is_booted()
    firmware = read("/sys/class/dmi/id/product_uuid").strip() if booted else ""
    instance = order["instance"] or firmware + "/" + order["hostname"]
    marker = root + "var/lib/autovibe/identity"
    known = json.loads(read(marker) or "{}")
    changed = []
    host_key = order["host_key"]
    if known.get("instance") != instance:
        if set_hostname(root, order["hostname"], booted):
            changed.append("hostname")
        write(root + "etc/machine-id", uuid.uuid4().hex + "\n", 0o444)
        changed.append("machine-id")
        forget_parents_agent(root)
        if booted:  # before the clock, which the age of the keys is told by
            host_key, was_made = fresh_host_key(host_key, known.get("host_key", ""))
            changed += ["host keys"] if was_made else []
        write(marker, json.dumps({"instance": instance, "host_key": host_key}) + "\n", 0o600)
        os.chmod(os.path.dirname(marker), 0o755)  # noqa: S103
    if booted and set_clock(order["now"]):
        changed.append("clock")
    print(json.dumps({"host_key": host_key, "changed": changed}))


main()
