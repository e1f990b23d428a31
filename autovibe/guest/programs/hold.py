"""Holds everything still that may write to the disk, and lets it go. Runs in the guest as root; answers one JSON
object.

{"do": "hold"}: find the cgroups to freeze · move our own SSH connection out of them · start the watchdog · note all
of it · freeze · flush. {"do": "release"}: thaw, and tell whether nothing moved in between: everything is still
frozen, no group is new, and systemd has started nothing (which timers would show up as). Whoever logs in meanwhile
waits: their process is born into a frozen group.

A hold whose `watchdog_seconds` is null is for good: nothing thaws it but a release, also when the VM goes on from its
saved RAM. Only the door is open then: who logs in works, while everything that ran before is still. {"do": "check"}
tells whether nothing moved so far, and a login counts as a move.

Where there is no systemd and no cgroup tree of our own (a container on somebody's host) there is nothing to freeze.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

NOTE = "/var/lib/autovibe/hold"  # a snapshot holds it too: one of another boot counts for nothing
FREEZE_SECONDS = 15.0
# They write nothing a profile covers, and freezing them would stop us, the snapshot's own agent, or PID 1.
ESSENTIAL = re.compile(
    r"^(systemd-(journald|logind|udevd|networkd|resolved|timesyncd|oomd|userdbd)\.service|dbus(-broker)?\.service"
    r"|qemu-guest-agent\.service|system-modprobe\.slice|.*\.(mount|swap|socket|device))$"
)
OURS = "autovibe-hold-"
AGENT = "autovibe.slice"
DOOR = re.compile(r"^(user\.slice|sshd?(@.*)?\.service|system-sshd?\.slice)$")


def read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def put(path: str, text: str) -> bool:
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
    except OSError:
        return False
    return True


def is_own_system() -> bool:
    try:
        return os.stat("/proc/1/ns/mnt").st_ino == os.stat("/proc/self/ns/mnt").st_ino
    except OSError:
        return False


def tree(order: dict[str, Any]) -> str:
    """The cgroup tree that is ours to freeze, "" where there is none."""
    if "cgroups" in order:
        return str(order["cgroups"])
    is_booted = is_own_system() and os.path.isdir("/run/systemd/system") and read("/proc/1/comm").strip() == "systemd"
    is_guest = "QEMU" in read("/sys/class/dmi/id/sys_vendor") or os.path.exists("/var/lib/autovibe/identity")
    is_unified = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
    return "/sys/fs/cgroup" if is_booted and is_guest and is_unified else ""


def groups(cgroups: str) -> list[str]:
    """What may write: every group but PID 1's, our own, and the essential services."""
    if not cgroups:
        return []
    found = []
    for parent, kept_out in ((cgroups, ("init.scope", "system.slice")), (cgroups + "/system.slice", ())):
        for name in sorted(os.listdir(parent) if os.path.isdir(parent) else []):
            path = parent + "/" + name
            is_ours = name.startswith(OURS)
            if name in kept_out or is_ours or ESSENTIAL.match(name) or not os.path.exists(path + "/cgroup.freeze"):
                continue
            if "populated 1" in read(path + "/cgroup.events"):
                found.append(path)
    return found


def jobs(cgroups: str) -> str:
    """How many units systemd was asked to start or stop since it began."""
    if not cgroups:
        return ""
    try:
        asked = subprocess.run(
            ["systemctl", "show", "--property=NInstalledJobs"], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip()


def chain() -> list[int]:
    """Ourselves and our ancestors below PID 1."""
    found, pid = [], os.getpid()
    while pid > 1:
        found.append(pid)
        match = re.search(r"^PPid:\s+(\d+)", read(f"/proc/{pid}/status"), re.MULTILINE)
        pid = int(match.group(1)) if match else 0
    return found


def group_of(pid: int, cgroups: str) -> str:
    match = re.search(r"^0::(.*)$", read(f"/proc/{pid}/cgroup"), re.MULTILINE)
    return cgroups + match.group(1) if match else ""


def connection() -> int:
    """The process of the SSH connection we came by: the oldest ancestor that is not the listener's own."""
    return [pid for pid in chain() if not is_daemon(pid)][-1]


def step_out(cgroups: str, token: str, frozen: list[str]) -> dict[str, Any]:
    """Move our connection's processes out of what will be frozen.

    A process that sleeps stays behind: a session whose group is empty would be closed, with all that belongs to it.
    """
    ours = cgroups + "/" + OURS + re.sub(r"[^A-Za-z0-9]", "", token)[:40]
    moved: dict[str, Any] = {"group": ours, "from": "", "placeholder": 0}
    for pid in chain():
        group = group_of(pid, cgroups)
        if not any(group == path or group.startswith(path + "/") for path in frozen):
            continue
        if is_daemon(pid):
            continue
        if not moved["placeholder"]:
            os.makedirs(ours, exist_ok=True)
            moved["from"] = group
            moved["placeholder"] = spawn(lambda: os.execvp("sleep", ["sleep", "86400"]))  # noqa: S606
        if not put(ours + "/cgroup.procs", str(pid)):
            raise OSError(f"process {pid} cannot be moved out of {group}")
    return moved


def is_daemon(pid: int) -> bool:
    """Whether it is sshd's listener, not one of its connections: it is frozen, so that nobody else comes in."""
    parent = re.search(r"^PPid:\s+(\d+)", read(f"/proc/{pid}/status"), re.MULTILINE)
    return parent is not None and parent.group(1) == "1"


def spawn(act: Any) -> int:
    """A process of its own session that holds none of our files."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.closerange(3, 256)  # the note's lock above all, which would be held as long as the process lives
        act()
    finally:
        os._exit(0)


def watch(token: str, seconds: float, connection: int) -> None:
    """Thaw when the time is over, or when the connection of the Hub that holds the guest is gone for good."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and is_alive(connection):
        time.sleep(0.5)
    with noted() as note:
        if note.get("token") == token:
            note["watchdog"] = 0
            thaw(note)
            note.clear()


def is_alive(pid: int) -> bool:
    """A process that has ended and whose parent, the frozen listener, cannot take note of it is not alive."""
    state = re.search(r"^State:\s+(\S)", read(f"/proc/{pid}/status"), re.MULTILINE)
    return state is not None and state.group(1) not in "ZX"


def freeze(paths: list[str]) -> None:
    for path in paths:
        if not put(path + "/cgroup.freeze", "1") and os.path.isdir(path):
            raise OSError(f"{path} cannot be frozen")
    end = time.monotonic() + FREEZE_SECONDS
    for path in paths:
        while os.path.isdir(path) and not is_frozen(path):
            if time.monotonic() > end:
                raise OSError(f"{path} does not come to rest")
            time.sleep(0.005)


def is_frozen(path: str) -> bool:
    return "frozen 1" in read(path + "/cgroup.events")


def thaw(note: dict[str, Any]) -> None:
    """Undo everything the note tells; harmless when some of it is undone already."""
    for path in note.get("groups", []) + note.get("open", []):
        put(path + "/cgroup.freeze", "0")
    moved: dict[str, Any] = note.get("moved", {})
    if moved.get("from") and os.path.isdir(moved["from"]):
        for pid in read(moved["group"] + "/cgroup.procs").split():
            if int(pid) != note.get("watchdog"):
                put(moved["from"] + "/cgroup.procs", pid)
    for helper in (moved.get("placeholder"), note.get("watchdog")):
        if helper:
            with suppress(ProcessLookupError):
                os.kill(helper, signal.SIGKILL)
    for _ in range(20):  # a group is empty a moment after its last process was killed
        try:
            os.rmdir(moved.get("group") or "/nonexistent")
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.005)


def boot() -> str:
    return read("/proc/sys/kernel/random/boot_id").strip()


@contextmanager
def noted() -> Iterator[dict[str, Any]]:
    """What is held now, under a lock; what is in the dictionary afterwards is noted, an empty one means nothing."""
    os.makedirs(os.path.dirname(NOTE), 0o755, exist_ok=True)
    with open(NOTE + ".lock", "a", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        note: dict[str, Any] = json.loads(read(NOTE) or "{}")
        if note.get("boot") != boot():
            note = {}
        try:
            yield note
        finally:
            if note:
                write_note(note)
            elif os.path.exists(NOTE):
                os.unlink(NOTE)


def write_note(note: dict[str, Any]) -> None:
    with open(NOTE + ".new", "w", encoding="ascii") as file:
        json.dump(note, file)
    os.rename(NOTE + ".new", NOTE)


def hold(order: dict[str, Any], note: dict[str, Any]) -> dict[str, Any]:
    cgroups, token = tree(order), order["token"]
    if note.get("token") == token:
        return {"held": True, "groups": len(note["groups"])}
    thaw(note)  # of a Hub that did not come back
    note.clear()
    found = groups(cgroups)
    note.update(boot=boot(), token=token, cgroups=cgroups, groups=found, open=[], jobs="", watchdog=0, moved={})
    try:
        note["moved"] = step_out(cgroups, token, found)
        held_by = connection()
        if order["watchdog_seconds"] is not None:
            note["watchdog"] = spawn(lambda: watch(token, order["watchdog_seconds"], held_by))
        write_note(note)
        freeze(found)
        while new := [path for path in groups(cgroups) if path not in note["groups"]]:
            note["groups"] += new
            write_note(note)
            freeze(new)
        if order["watchdog_seconds"] is None:
            open_door(note)
        note["jobs"] = jobs(cgroups)
        if is_own_system():
            os.sync()
    except BaseException:
        thaw(note)
        note.clear()
        raise
    return {"held": True, "groups": len(note["groups"])}


def open_door(note: dict[str, Any]) -> None:
    """Freeze each session and user manager by itself instead of all of `user.slice`, where new ones are born."""
    note["open"] = [path for path in note["groups"] if DOOR.match(os.path.basename(path))]
    sessions = sessions_of(note["cgroups"])
    note["groups"] = [path for path in note["groups"] if path not in note["open"]] + sessions
    write_note(note)
    freeze(sessions)
    for path in note["open"]:
        put(path + "/cgroup.freeze", "0")


def sessions_of(cgroups: str) -> list[str]:
    """What `user.slice` holds: a group a session, and one a user manager."""
    users = subgroups(cgroups + "/user.slice") if cgroups else []
    found = [group for user in users for group in subgroups(user)]
    return [group for group in found if "populated 1" in read(group + "/cgroup.events")]


def subgroups(path: str) -> list[str]:
    try:
        return sorted(entry.path for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def check(order: dict[str, Any], note: dict[str, Any]) -> dict[str, Any]:
    if note.get("token") != order["token"]:
        return {"held": False, "why": "the watchdog has thawed the guest"}
    why = broken(note)
    return {"held": not why, "why": why}


def release(order: dict[str, Any], note: dict[str, Any]) -> dict[str, Any]:
    if note.get("token") != order["token"]:
        if not note:  # the agent may have been frozen by a single word, and its VM paused before it could be held
            put(f"{tree(order)}/{AGENT}/cgroup.freeze", "0")
        return {"held": False, "why": "the watchdog has thawed the guest"}
    why = broken(note)
    thaw(note)
    note.clear()
    return {"held": not why, "why": why}


def broken(note: dict[str, Any]) -> str:
    """What moved since the hold, "" for nothing."""
    cgroups = note["cgroups"]
    if moved := [path for path in note["groups"] if os.path.isdir(path) and not is_frozen(path)]:
        return f"{moved[0]} was thawed"
    known = note["groups"] + note["open"]
    sessions = sessions_of(cgroups) if note["open"] else []
    if new := [path for path in groups(cgroups) + sessions if path not in known]:
        return f"{new[0]} has come up"
    if jobs(cgroups) != note["jobs"]:
        return "systemd has started or stopped something"
    return ""


def main() -> None:
    order = json.loads(sys.stdin.buffer.readline())
    try:
        with noted() as note:
            answer = {"hold": hold, "check": check, "release": release}[order["do"]](order, note)
    except OSError as error:
        sys.exit(f"the guest cannot be held: {error}")
    print(json.dumps(answer))


main()
