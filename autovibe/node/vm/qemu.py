"""The VMs' processes: started as daemons that outlive the node, found again by pid file, driven through QMP.

A pid file may be stale and its number taken by another process, so a process counts as ours only while its command
line names that very pid file.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from autovibe.node.disks import blocks
from autovibe.node.firewall import Firewall
from autovibe.node.vm import accel as accelerators
from autovibe.node.vm import command_line, qemu_console, qemu_state
from autovibe.node.vm.agent import Agent, AgentError
from autovibe.node.vm.command_line import ConfigError
from autovibe.node.vm.monitor import Monitor, MonitorError

__all__ = ["Agent", "ConfigError", "Monitor", "MonitorError", "Qemu", "QemuError", "forward_address"]

_START_SECONDS = 60
_LOCK_RETRY_SECONDS = 10.0
_QUIT_SECONDS = 5.0
_CONSOLE_BYTES = 256 << 10


class QemuError(Exception):
    """A VM could not be started or stopped; the text is the task's error."""


def forward_address(vmid: int) -> str:
    """The loopback address whose forward port leads to the guest's SSH: `127.x.y.z` made of the vmid, never 127.0."""
    return f"127.{1 + vmid // 65536 % 254}.{vmid // 256 % 256}.{vmid % 256}"


class Qemu:
    """The QEMU processes of one node. `home` keeps pid files, `run` (a short path) the sockets."""

    def __init__(self, home: Path, run: Path, *, accel: str = "auto", forward_port: int) -> None:
        if accel not in ("auto", "kvm", "tcg"):
            raise ValueError(f"accel is 'auto', 'kvm' or 'tcg', not '{accel}'.")
        self.accel = accel
        self.forward_port = forward_port
        self._home = home.absolute()
        self._run = run.absolute()
        self._monitors: dict[int, Monitor] = {}
        self._lock = threading.Lock()
        self._console_lock = threading.Lock()
        self._children: dict[int, subprocess.Popen[bytes]] = {}  # those this process must reap

    def probe(self) -> str:
        """Settle on the accelerator, `kvm` or `tcg`; takes some seconds when it must be tried."""
        if self.accel == "auto":
            self._home.mkdir(parents=True, exist_ok=True)
            self.accel = accelerators.probe(self._home)
        return self.accel

    # Life

    def start(
        self,
        vmid: int,
        config: Mapping[str, str],
        drives: Mapping[str, Path],
        *,
        state: Path | None = None,
        timeout: float | None = None,
    ) -> None:
        """Start a VM. `drives` gives the file of each of the config's drives; an empty disc drive has none.

        With a `state` (the file of a `save_state`) the VM is what it was then, and paused until `resume`; the config's
        `runningmachine` and `runningcpu` are those it was saved with. `timeout` is how many seconds QEMU may take until
        it answers. Raises QemuError, with QEMU's own words in it.
        """
        if self.is_running(vmid):
            raise QemuError(f"VM {vmid} already running")
        for folder in (self._pids, self._run):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        places = self._places(vmid)
        self._forget(vmid)
        forward = (forward_address(vmid), self.forward_port)
        try:
            is_restricted = Firewall(self._home / "firewall").restricts_outbound(vmid)
            argv = command_line.build(
                vmid, config, drives, places, accel=self.probe(), forward=forward, is_restricted=is_restricted
            )
        except (ConfigError, ValueError) as error:
            raise QemuError(f"start failed: {error}") from error
        deadline = time.monotonic() + _LOCK_RETRY_SECONDS
        if state is not None:
            argv += ["-incoming", "defer"]
        while (reason := self._launch(vmid, argv, state, timeout)) is not None:
            if '" lock' not in reason or time.monotonic() > deadline:  # a merge of layers may just be ending
                raise QemuError(f"start failed: {reason}")
            time.sleep(0.5)
        for key, value in config.items():
            if key.startswith("net") and command_line.options(value).get("link_down") == "1":
                self.monitor(vmid).execute("set_link", name=key, up=False)

    def stop(self, vmid: int) -> None:
        """End a VM's process at once, as pulling the plug does. A stopped VM is left as it is."""
        with contextlib.suppress(MonitorError):
            if self.is_running(vmid):
                self._save_console(vmid)
                self.monitor(vmid).execute("quit")
        for end in (None, signal.SIGTERM, signal.SIGKILL):
            pid = self.pid(vmid)
            if pid is None:
                break
            if end is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, end)
            self._await_end(vmid, _QUIT_SECONDS)
        if self.is_running(vmid):
            raise QemuError(f"VM {vmid} could not be stopped")
        self._forget(vmid)

    def powerdown(self, vmid: int, *, by_agent: bool = True) -> None:
        """Ask the guest to shut down, through its agent or else the power button; returns at once."""
        if by_agent:
            with contextlib.suppress(AgentError):
                self.agent(vmid).ping()
                self.agent(vmid).call("shutdown")
                return
        self.monitor(vmid).execute("system_powerdown")

    def reset(self, vmid: int) -> None:
        self.monitor(vmid).execute("system_reset")

    def suspend(self, vmid: int) -> None:
        self.monitor(vmid).execute("stop")

    def resume(self, vmid: int) -> None:
        """Let a VM go on that was paused, whose state was saved or loaded, that sleeps, or that has shut down.

        `cont` takes the disks back from a finished migration.
        """
        monitor = self.monitor(vmid)
        match monitor.execute("query-status")["status"]:
            case "running":
                return
            case "suspended":
                monitor.execute("system_wakeup")
                return
            case "shutdown":
                monitor.execute("system_reset")
        monitor.execute("cont")

    def tell(self, vmid: int, line: str) -> str:
        """A command of QEMU's human monitor, and what it printed."""
        return str(self.monitor(vmid).execute("human-monitor-command", command_line=line))

    def press(self, vmid: int, keys: list[dict[str, Any]]) -> None:
        """Press keys together and let them go (`KeyValue`s of QMP)."""
        self.monitor(vmid).execute("send-key", keys=keys)

    # RAM

    def save_state(self, vmid: int, path: Path, *, watch: qemu_state.Watch) -> None:
        """Pause the VM and write its RAM and devices to a file; it is paused until `resume`, also after an error.

        `watch` is told bytes and seconds while it lasts, and stops it by raising. Raises MonitorError and OSError.
        """
        qemu_state.save(self.monitor(vmid), path, watch=watch)

    def running_as(self, vmid: int) -> dict[str, str]:
        """`runningmachine` and `runningcpu`: what a saved state must be started with again."""
        kind = str(self.monitor(vmid).execute("qom-get", path="/machine", property="type"))
        words = Path(f"/proc/{self.pid(vmid)}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        return {"runningmachine": kind.removesuffix("-machine"), "runningcpu": words[words.index("-cpu") + 1]}

    def settle(self, vmid: int, *, goes_on: bool) -> list[str]:
        """End what a former node had QEMU do for it (copies, savings of RAM); lines that say what was done."""
        monitor = self.monitor(vmid)
        done = blocks.cancel_jobs(monitor)
        if qemu_state.cancel(monitor):
            done.append("cancelled the saving of its RAM")
        match monitor.execute("query-status")["status"]:
            case "inmigrate":
                self.stop(vmid)
                done.append("stopped it, for its RAM was not loaded")
            case "paused" if goes_on:
                self.resume(vmid)
                done.append("it goes on")
            case "postmigrate" | "finish-migrate":  # without its disks, which only going on gives it back
                self.resume(vmid)
                if not goes_on:
                    self.suspend(vmid)
                done.append("it has its disks again")
        return done

    # Facts

    def pid(self, vmid: int) -> int | None:
        """The VM's process, None when it is not running."""
        file = self._places(vmid).pid
        if child := self._children.get(vmid):
            child.poll()
        try:
            pid = int(file.read_text())
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if os.fsencode(file) in words else None  # a zombie has no words

    def is_running(self, vmid: int) -> bool:
        return self.pid(vmid) is not None

    def running(self) -> list[int]:
        """The vmids of all VMs that run, also those a former node started."""
        found = (int(file.stem) for file in self._pids.glob("*.pid") if file.stem.isdecimal())
        return sorted(vmid for vmid in found if self.is_running(vmid))

    def started_at(self, vmid: int) -> float | None:
        """Seconds since the epoch, None when it is not running."""
        pid = self.pid(vmid)
        try:
            return psutil.Process(pid).create_time() if pid is not None else None
        except psutil.NoSuchProcess:
            return None

    def status(self, vmid: int) -> dict[str, Any]:
        """What a running VM is and uses: `qmpstatus`, `running-qemu`, `running-machine`, `pid`, `uptime` (seconds),
        `cpu` (share of one core since its start), `mem` (bytes), `diskread`, `diskwrite` (bytes); {} when stopped.
        """
        pid = self.pid(vmid)
        if pid is None:
            return {}
        try:
            monitor = self.monitor(vmid)
            state = monitor.execute("query-status")["status"]
            version = "{major}.{minor}.{micro}".format(**monitor.execute("query-version")["qemu"])
            machine = str(monitor.execute("qom-get", path="/machine", property="type")).removesuffix("-machine")
            disks = [each["stats"] for each in monitor.execute("query-blockstats")]
            process = psutil.Process(pid)
            times, age = process.cpu_times(), max(time.time() - process.create_time(), 0.001)
            return {
                "qmpstatus": state,
                "running-qemu": version,
                "running-machine": machine,
                "pid": pid,
                "uptime": int(age),
                "cpu": (times.user + times.system) / age,
                "mem": process.memory_info().rss,
                "diskread": sum(each["rd_bytes"] for each in disks),
                "diskwrite": sum(each["wr_bytes"] for each in disks),
            }
        except (MonitorError, psutil.NoSuchProcess):
            return {} if not self.is_running(vmid) else {"qmpstatus": "running", "pid": pid}

    def console(self, vmid: int) -> str:
        """The end of what the guest wrote to its serial console, 256 KiB at most; also after it stopped."""
        with contextlib.suppress(MonitorError):
            if self.is_running(vmid):
                self._save_console(vmid)
        with contextlib.suppress(FileNotFoundError):
            return self._console(vmid).read_bytes()[-_CONSOLE_BYTES:].decode("utf-8", "replace")
        return ""

    # Doors into a VM

    def monitor(self, vmid: int) -> Monitor:
        """The VM's QMP socket; shared by all threads. It connects at the first command."""
        with self._lock:
            if vmid not in self._monitors:
                self._monitors[vmid] = Monitor(self._places(vmid).qmp, vmid)
            return self._monitors[vmid]

    def agent(self, vmid: int) -> Agent:
        return Agent(self._places(vmid).agent, vmid)

    def open_display(self, vmid: int, password: str) -> socket.socket:
        """A connection to the VM's display, for a client that knows `password`. Raises MonitorError."""
        return qemu_console.open_display(self.monitor(vmid), self._places(vmid).vnc, password)

    def open_serial(self, vmid: int, port: str) -> socket.socket:
        """A connection to a serial port, until `close_serial`. Raises MonitorError."""
        if port == "serial0":
            self._save_console(vmid)
        return qemu_console.open_serial(self.monitor(vmid), port, self._run / f"{vmid}.{port}")

    def close_serial(self, vmid: int, port: str) -> None:
        qemu_console.close_serial(self.monitor(vmid), port, self._run / f"{vmid}.{port}")

    def keep_console(self, vmid: int, port: str, data: bytes) -> None:
        """Keep what a terminal saw of the console, as if nobody had looked."""
        if port == "serial0":
            with self._console_lock, contextlib.suppress(OSError):  # a full disk is no reason to end a terminal
                self._append_console(vmid, data)

    # Inside

    @property
    def _pids(self) -> Path:
        return self._home / "run"

    def _places(self, vmid: int) -> command_line.Places:
        run = self._run
        return command_line.Places(
            self._pids / f"{vmid}.pid", run / f"{vmid}.qmp", run / f"{vmid}.agent", run / f"{vmid}.vnc"
        )

    def _console(self, vmid: int) -> Path:
        return self._pids / f"{vmid}.console"

    def _save_console(self, vmid: int) -> None:
        """Move QEMU's ring buffer (which reading empties) to a file that is as bounded as the buffer.

        While a terminal is open there is no ring buffer: the terminal keeps what it sees.
        """
        with self._console_lock, contextlib.suppress(MonitorError):
            new = self.monitor(vmid).execute("ringbuf-read", device="console", size=_CONSOLE_BYTES, format="base64")
            self._append_console(vmid, base64.b64decode(new))

    def _append_console(self, vmid: int, new: bytes) -> None:
        path = self._console(vmid)
        with path.open("ab") as file:
            file.write(new)
            size = file.tell()
        if size > 2 * _CONSOLE_BYTES:
            path.write_bytes(path.read_bytes()[-_CONSOLE_BYTES:])

    def _launch(self, vmid: int, argv: list[str], state: Path | None, timeout: float | None) -> str | None:
        """Start QEMU in a session of its own, so that it outlives the node: None once it answers, else why not.

        Not by `-daemonize`, whose fork the sandbox (spawn=deny) forbids. What it writes to stderr later is not kept:
        a guest can provoke messages without end.
        """
        reader, writer = os.pipe()
        with open(reader, "rb") as errors:
            try:
                child = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, start_new_session=True, cwd="/"
                )
            except FileNotFoundError:
                return "qemu-system-x86_64 is not installed; run: apt install qemu-system-x86 qemu-utils"
            finally:
                os.close(writer)
            deadline = time.monotonic() + (timeout or _START_SECONDS)
            reason = ""
            while child.poll() is None:
                with contextlib.suppress(MonitorError):
                    self.monitor(vmid).execute("query-status")
                    self._children[vmid] = child
                    if state is None or not (reason := self._load(vmid, state)):
                        return None
                    child.kill()
                    child.wait()
                if time.monotonic() > deadline:
                    child.kill()
                    child.wait()
                    return "got timeout"
                time.sleep(0.02)
            text = errors.read().decode("utf-8", "replace").strip() or reason
        return text.replace("qemu-system-x86_64: ", "") or f"QEMU exited with code {child.returncode}"

    def _load(self, vmid: int, state: Path) -> str:
        """Load a saved state; why not, where that fails."""
        try:
            qemu_state.load(self.monitor(vmid), state)
        except (MonitorError, OSError) as error:
            return str(error)
        return ""

    def _await_end(self, vmid: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.is_running(vmid) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _forget(self, vmid: int) -> None:
        """Drop what a VM's last process left behind."""
        self.monitor(vmid).close()
        for path in self._places(vmid):
            path.unlink(missing_ok=True)
