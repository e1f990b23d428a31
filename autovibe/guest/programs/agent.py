"""Starts the prompt's command as a transient unit, once a machine. Runs in the guest as root; answers one JSON object.

Files: machine (whose command it is; written first), prompt, wrapper, started (written last), and run/ (the user's):
process ("<pid> <boot id>"), status (the exit status, written by the wrapper when the command ended). They survive a
reboot.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
from typing import Any

WRAPPER = """#!/bin/sh
# $1 is a directory; the rest is the command. A polite signal is the command's; its end is recorded all the same.
run=$1; shift
read -r boot < /proc/sys/kernel/random/boot_id
printf '%s %s\\n' "$$" "$boot" > "$run/process.new" && mv -f "$run/process.new" "$run/process"
trap : TERM INT HUP
"$@"
status=$?
printf '%s\\n' "$status" > "$run/status.new" && mv -f "$run/status.new" "$run/status"
exit "$status"
"""


def write(path: str, text: str, mode: int, uid: int = -1, gid: int = -1) -> None:
    temporary = path + ".new"
    if os.path.lexists(temporary):
        os.unlink(temporary)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if os.geteuid() == 0 and uid >= 0:
            os.fchown(file.fileno(), uid, gid)
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    os.rename(temporary, path)


def read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def is_active(unit: str) -> bool:
    asked = subprocess.run(["systemctl", "is-active", unit], capture_output=True, text=True, check=False)
    return asked.stdout.strip() in ("active", "activating", "reloading", "deactivating")


def prepare(order: dict[str, Any]) -> None:
    state, run = order["state"], order["state"] + "/run"
    owner = pwd.getpwnam(order["user"])
    os.makedirs(os.path.dirname(state), 0o755, exist_ok=True)
    os.makedirs(os.path.dirname(order["log"]), 0o755, exist_ok=True)
    if os.path.isdir(state) and not os.path.islink(state):
        shutil.rmtree(state)
    os.mkdir(state, 0o755)
    os.chmod(state, 0o755)  # noqa: S103
    os.mkdir(run, 0o755)
    if os.geteuid() == 0:
        os.chown(run, owner.pw_uid, owner.pw_gid)
    write(state + "/prompt", order["prompt"], 0o400, owner.pw_uid, owner.pw_gid)
    write(state + "/wrapper", WRAPPER, 0o755)
    if os.path.lexists(order["log"]):
        os.unlink(order["log"])  # the parent's, in a machine that was spawned from a checkpoint
    with open(order["log"], "wb") as log:
        os.fchmod(log.fileno(), 0o644)
    write(state + "/machine", order["machine"] + "\n", 0o644)


def start(order: dict[str, Any]) -> None:
    state = order["state"]
    owner = pwd.getpwnam(order["user"])
    env = {
        "HOME": owner.pw_dir,
        "USER": order["user"],
        "LOGNAME": order["user"],
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
        "LANG": "C.UTF-8",
        **order["env"],
        "AUTOVIBE_PROMPT": state + "/prompt",
    }
    argv = [
        "systemd-run",
        "--quiet",
        "--unit=" + order["unit"],
        "--slice=" + order["slice"],
        "--uid=" + order["user"],
        "--working-directory=" + order["cwd"],
        "--property=StandardOutput=append:" + order["log"],
        "--property=StandardError=append:" + order["log"],
        "--property=OOMPolicy=continue",
        *("--setenv=" + name + "=" + value for name, value in env.items()),
        "/bin/sh",
        state + "/wrapper",
        state + "/run",
        *order["command"],
    ]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    if ran.returncode != 0:  # a command that failed before leaves its unit behind
        subprocess.run(["systemctl", "reset-failed", order["unit"]], capture_output=True, check=False)
        ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        sys.exit("the agent's unit cannot be started: " + ran.stderr.strip())


def main() -> None:
    order = json.loads(sys.stdin.buffer.readline())
    state = order["state"]
    is_known = read(state + "/machine") == order["machine"]
    if is_known and (os.path.exists(state + "/started") or os.listdir(state + "/run") or is_active(order["unit"])):
        answer = "found"
    else:
        prepare(order)
        start(order)
        answer = "started"
    write(state + "/started", "", 0o644)
    print(json.dumps({"agent": answer}))


main()
