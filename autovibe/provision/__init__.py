"""One run of a playbook against one guest: started, watched, stopped; it outlives the process that started it.

A run is a directory (ansible-runner's private_data_dir, one a run, so that nothing leaks from one into the next):

    order.json        what the program is to run; its presence means that the run was begun
    process.json      pid and create_time of the program, written when it was started
    inventory/ env/   what ansible reads; env/extravars goes when the run is over
    known_hosts       the one pinned host key
    artifacts/run/    ansible-runner's own: job_events, status
    report.json       how it ended; written once, and then all that `poll` reads

Every process of a run carries AUTOVIBE_RUN in its environment: that is how one is found whose starter died before it
could write process.json, and how the children are ended that ansible puts into sessions of their own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from autovibe.errors import ConfigurationError, OperationFailed

MARK = "AUTOVIBE_RUN"
IDENT = "run"
GUEST_PYTHON = "/usr/bin/python3"

_PROGRAM = Path(__file__).with_name("program.py")
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class Report:
    """How a run ended. "lost" means that its processes vanished without a result; `duration` is in seconds.

    `stats` counts tasks as ansible does (ok, changed, failures, skipped, …); `failed_task` and `message` are "" for a
    run that went well.
    """

    status: Literal["ok", "failed", "unreachable", "lost"]
    stats: dict[str, int] = field(default_factory=dict)
    failed_task: str = ""
    message: str = ""
    duration: float = 0.0


def start(
    run: Path,
    *,
    playbook: Path,
    host: str,
    port: int,
    user: str,
    host_key: str,
    private_key: Path,
    variables: Mapping[str, Any],
    project_dir: Path,
) -> None:
    """Begin the run in a process of its own, unless it was begun before.

    `host_key` is the guest's pinned key ("ssh-ed25519 AAAA…"); no other is accepted. Returns at once.
    """
    if not playbook.is_file():
        raise ConfigurationError(f"There is no playbook '{playbook}'.")
    run = run.absolute()
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _lock(run):
        if (run / "report.json").exists() or _is_running(run) or (run / "process.json").exists():
            return
        _write_orders(run, playbook, host, port, user, host_key, private_key, variables, project_dir)
        with (run / "program.log").open("ab") as output:
            child = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM), str(run)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=run,
                env=_environment(run),
                start_new_session=True,
            )
        _children[child.pid] = child
        created = psutil.Process(child.pid).create_time()
        _write(run / "process.json", {"pid": child.pid, "create_time": created, "started": time.time()})


def poll(run: Path) -> Report | None:
    """How the run ended, None while it is under way. A lost run's remains are ended before it is told."""
    run = run.absolute()
    if (report := _read(run / "report.json")) is not None:
        return Report(**report)
    if not (run / "order.json").exists():
        return Report(status="lost", message="The run was never started.")
    if _is_running(run):
        return None
    with _lock(run):
        report_now = _judge(run)
        _end(run)  # a lost run's children, and the shared SSH connection of any
        _write(run / "report.json", asdict(report_now))
        (run / "env/extravars").unlink(missing_ok=True)
    return report_now


def events(run: Path, offset: int = 0) -> tuple[list[str], int]:
    """The lines ansible printed since `offset` (a count of events), and the offset to ask with the next time."""
    lines: list[str] = []
    for counter, event in _events(run.absolute(), offset):
        offset = counter
        text = _COLOUR.sub("", str(event.get("stdout", ""))).replace("\r\n", "\n").rstrip()
        if text:
            lines += text.split("\n")
    return lines, offset


def stop(run: Path) -> None:
    """End every process of the run and report it as failed, unless it is over already. A run never begun stays so."""
    run = run.absolute()
    if not run.is_dir():
        return
    with _lock(run):
        _end(run)
        if (run / "order.json").exists() and not (run / "report.json").exists():
            report = _judge(run)
            if report.status == "lost":
                report = Report(status="failed", message="The run was stopped.", duration=_age(run))
            _write(run / "report.json", asdict(report))
        (run / "env/extravars").unlink(missing_ok=True)


def sweep(runs: Path) -> list[str]:
    """At a start: runs under way go on and are found by `poll`; of those whose program died, what is left is ended.

    Returns the names of the runs found lost.
    """
    lost = []
    for order in sorted(runs.glob("*/order.json")):
        run = order.parent
        if not (run / "report.json").exists():
            report = poll(run)
            if report is not None and report.status == "lost":
                lost.append(run.name)
    return lost


# What a run is told


def _write_orders(
    run: Path,
    playbook: Path,
    host: str,
    port: int,
    user: str,
    host_key: str,
    private_key: Path,
    variables: Mapping[str, Any],
    project_dir: Path,
) -> None:
    for name in ("inventory", "env"):
        (run / name).mkdir(mode=0o700, exist_ok=True)
    (run / "ansible.cfg").write_text("", encoding="ascii")
    known_hosts = run / "known_hosts"
    known_hosts.write_text(f"{f'[{host}]:{port}' if port != 22 else host} {host_key.strip()}\n", encoding="ascii")
    machine = {
        "ansible_connection": "ssh",
        "ansible_host": host,
        "ansible_port": port,
        "ansible_user": user,
        "ansible_ssh_private_key_file": str(private_key.absolute()),
        "ansible_python_interpreter": GUEST_PYTHON,
        "ansible_ssh_pipelining": True,
        "ansible_host_key_checking": True,
        "ansible_ssh_args": shlex.join(_ssh_arguments(run, known_hosts)),
        "ansible_ssh_retries": 1,
    }
    _write(run / "inventory/hosts.json", {"all": {"hosts": {"machine": machine}}})
    _write(run / "env/extravars", dict(variables))
    _write(run / "order.json", {"playbook": str(playbook.absolute()), "project_dir": str(project_dir.absolute())})


def _ssh_arguments(run: Path, known_hosts: Path) -> list[str]:
    """OpenSSH as if this user had no configuration and no agent, and one connection for all tasks of a run."""
    options = {
        "UserKnownHostsFile": _quoted(known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "ForwardAgent": "no",
        "ConnectTimeout": "10",
        "ServerAliveInterval": "15",
        "ServerAliveCountMax": "4",
        "ControlMaster": "auto",
        "ControlPersist": "30",
        "ControlPath": f"{_socket_directory()}/{hashlib.sha256(str(run).encode()).hexdigest()[:16]}",
    }
    return ["-F", "/dev/null", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]


def _quoted(path: Path) -> str:
    """OpenSSH splits the value at blanks and expands % in it."""
    return '"' + str(path).replace("%", "%%") + '"'


def _socket_directory() -> Path:
    """A short directory of this user alone: a socket's path has 108 bytes at most, 17 of them OpenSSH's suffix."""
    path = Path(f"/tmp/autovibe-ssh-{os.geteuid()}")  # noqa: S108 - owner and mode are checked
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise OperationFailed(f"'{path}' must be a directory of this user alone (mode 0700); remove it.")
    return path


def _environment(run: Path) -> dict[str, str]:
    """What this process has, without what would change ansible or reach for the user's keys."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ANSIBLE_", "AUTOVIBE_", "SSH_")) and name not in ("PYTHONPATH", "DISPLAY")
    }
    return {
        **kept,
        MARK: str(run),
        "PATH": f"{Path(sys.executable).parent}:{kept.get('PATH', '/usr/bin:/bin')}",
        "LC_ALL": "C.UTF-8",
        "ANSIBLE_CONFIG": str(run / "ansible.cfg"),
        "ANSIBLE_HOME": str(run / "ansible"),
        "ANSIBLE_HOST_KEY_CHECKING": "True",
        "ANSIBLE_PIPELINING": "True",
        "ANSIBLE_NOCOLOR": "True",
        "ANSIBLE_SSH_RETRIES": "1",
        "ANSIBLE_TIMEOUT": "10",
    }


# Its processes


def _is_running(run: Path) -> bool:
    """Whether the run's program is alive; process.json answers quickly, the environment of processes surely."""
    process = _read(run / "process.json")
    if process is None:
        return any(_is_program(found) for found in _marked(run))
    if (child := _children.get(process["pid"])) is not None and child.poll() is not None:
        del _children[process["pid"]]  # reaped
    return _alive(process["pid"], process["create_time"])


def _alive(pid: int, create_time: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - create_time) < 0.05 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_program(process: psutil.Process) -> bool:
    try:
        return str(_PROGRAM) in process.cmdline()
    except psutil.Error:
        return False


def _marked(run: Path) -> list[psutil.Process]:
    """This user's processes that belong to the run."""
    wanted = f"\0{MARK}={run}\0".encode()
    found = []
    for process in psutil.process_iter():
        try:
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
            if wanted in b"\0" + environment and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.Error):
            continue  # another user's, or gone by now
    return found


def _end(run: Path) -> None:
    """End all of a run's processes, politely, then by force; a dying parent may start one more, so look again."""
    for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 2.0), (signal.SIGKILL, 2.0)):
        processes = _marked(run)
        for process in processes:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        _, left = psutil.wait_procs(processes, timeout=patience)
        if not left and not _marked(run):
            return


# How it ended


def _judge(run: Path) -> Report:
    """The report of a run whose program is gone, from what ansible-runner left."""
    status = _text(run / f"artifacts/{IDENT}/status")
    if status not in ("successful", "failed", "timeout", "canceled"):
        log = _text(run / "program.log").splitlines()
        return Report(status="lost", message="\n".join(log[-5:]) or "Its process vanished.", duration=_age(run))
    stats: dict[str, int] = {}
    failed_task = message = ""
    kind: Literal["failed", "unreachable"] = "failed"
    printed: list[str] = []
    for _, event in _events(run, 0):
        name, data = event.get("event", ""), event.get("event_data", {})
        if name == "playbook_on_stats":
            stats = _stats(data)
        elif name in ("runner_on_failed", "runner_on_unreachable", "runner_item_on_failed") and not data.get(
            "ignore_errors"
        ):
            failed_task, message = str(data.get("task", "")), _reason(data.get("res", {}))
            kind = "unreachable" if name == "runner_on_unreachable" else "failed"
        elif event.get("stdout"):
            printed = [*printed[-9:], _COLOUR.sub("", str(event["stdout"])).strip()]
    if status == "successful":
        return Report(status="ok", stats=stats, duration=_age(run))
    if not message:  # the playbook did not get as far as a task
        message = "\n".join(line for line in printed if line) or f"ansible-playbook ended '{status}'."
    return Report(status=kind, stats=stats, failed_task=failed_task, message=message, duration=_age(run))


def _reason(result: Mapping[str, Any]) -> str:
    """What a failed task says of itself, 2000 characters at most: its message, and what a command printed last."""
    if result.get("censored"):
        return str(result["censored"])
    texts = [str(result.get(name) or "").strip() for name in ("msg", "stderr", "stdout")]
    said = [texts[0], texts[1] or texts[2]]
    return "\n".join(text[-1000:] for text in dict.fromkeys(said) if text) or "It gave no reason."


def _stats(data: Mapping[str, Any]) -> dict[str, int]:
    names = ("ok", "changed", "failures", "dark", "skipped", "rescued", "ignored")
    counts = {name: sum(int(count) for count in (data.get(name) or {}).values()) for name in names}
    counts["unreachable"] = counts.pop("dark")
    return counts


def _age(run: Path) -> float:
    """Seconds from the run's start to its end (its status file), or to now."""
    process = _read(run / "process.json")
    if process is None:
        return 0.0
    status = run / f"artifacts/{IDENT}/status"
    end = status.stat().st_mtime if status.exists() else time.time()
    return round(max(0.0, end - float(process["started"])), 3)


def _events(run: Path, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Events after the first `offset`, in order; files are renamed into place one after the other."""
    found = []
    for path in (run / f"artifacts/{IDENT}/job_events").glob("*-*.json"):
        digits = path.name.split("-", 1)[0]
        if digits.isdigit() and int(digits) > offset:
            found.append((int(digits), path))
    for counter, path in sorted(found):
        event = _read(path)
        if event is not None:
            yield counter, event


# Files


@contextmanager
def _lock(run: Path) -> Iterator[None]:
    with (run / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""
