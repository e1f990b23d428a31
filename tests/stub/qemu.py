"""VMs that are local sshds: each on its forward address, each command in bubblewrap on the VM's directory tree."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psutil

from autovibe.node.vm.monitor import MonitorError
from autovibe.node.vm.qemu import forward_address

SHIMS = Path(__file__).parent / "bin" / "shim"
COMMANDS = (
    "sudo",
    "systemctl",
    "systemd-run",
    "hostname",
    "hostnamectl",
    "date",
    "cloud-init",
    "timedatectl",
    "apt-get",
)
MARK = "AUTOVIBE_STUB_VM"


def make_base_tree(tree: Path) -> Path:
    """The file tree of a freshly imported image: what a command in a guest needs beside the host's read-only /usr."""
    for name in (
        "etc/ssh",
        "home",
        "root",
        "opt",
        "srv",
        "workspace",
        "var/lib",
        "var/log",
        "var/tmp",
        "tmp",
        "usr-local",
    ):
        (tree / name).mkdir(parents=True, exist_ok=True)
    for name in ("passwd", "group", "nsswitch.conf", "ld.so.cache", "ld.so.conf", "profile", "bash.bashrc"):
        if Path("/etc", name).exists():
            shutil.copy(Path("/etc", name), tree / "etc" / name)
    if Path("/etc/alternatives").is_dir():
        shutil.copytree("/etc/alternatives", tree / "etc/alternatives", symlinks=True, dirs_exist_ok=True)
    (tree / "etc/hostname").write_text("image\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost\n")
    (tree / "etc/machine-id").write_text("")
    return tree


class NoMonitor:
    """Stands where a QMP connection would; directories need none."""

    def execute(self, command: str, **arguments: Any) -> Any:
        if command == "query-balloon":
            raise MonitorError("the stub has no balloon")
        return {}

    def send(self, command: str, arguments: dict[str, Any]) -> Any:
        return {}

    def close(self) -> None:
        pass


class NoAgent:
    """A guest without an agent, as Proxmox finds one that is not running."""

    def __getattr__(self, name: str) -> Any:
        from autovibe.node.vm.agent import AgentError

        raise AgentError("QEMU guest agent is not running")


class StubQemu:
    """`boot_seconds` pass between the start of a VM and its answer on SSH."""

    accel = "tcg"

    def __init__(
        self, home: Path, *, forward_port: int, boot_seconds: float = 0.0, delays: dict[str, float] | None = None
    ):
        self.home, self.forward_port, self.boot_seconds, self.delays = home, forward_port, boot_seconds, delays or {}
        self.shims = home / "shims"
        self.shims.mkdir(parents=True, exist_ok=True)
        shutil.copy(SHIMS, self.shims / "shim")
        for name in COMMANDS:
            link = self.shims / name
            if not link.is_symlink():
                link.symlink_to("shim")
        self._lock = threading.Lock()

    def probe(self) -> str:
        return self.accel

    def _run(self, vmid: int) -> Path:
        return self.home / "vms" / str(vmid)

    def start(
        self,
        vmid: int,
        config: Mapping[str, str],
        drives: Mapping[str, Path],
        *,
        state: Path | None = None,
        timeout: float | None = None,
    ) -> None:
        time.sleep(self.delays.get("start", 0))
        tree = next(path for path in drives.values() if Path(path).is_dir())
        run = self._run(vmid)
        shutil.rmtree(run, ignore_errors=True)
        (run / "stub").mkdir(parents=True)
        self._first_boot(tree, config)
        keys = run / "authorized_keys"
        keys.write_text(unquote(str(config.get("sshkeys", ""))) + "\n")
        keys.chmod(0o600)
        script = run / "command"
        script.write_text(self._wrapper(vmid, tree, run))
        script.chmod(0o700)
        (run / "sshd_config").write_text(
            f"""ListenAddress {forward_address(vmid)}:{self.forward_port}
HostKey {tree}/etc/ssh/ssh_host_ed25519_key
PidFile {run}/stub/sshd.pid
AuthorizedKeysFile {keys}
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowUsers {getpass.getuser()}
MaxStartups 100
MaxSessions 20
UseDNS no
SetEnv SHLVL=5
ForceCommand {script}
Subsystem sftp {script} sftp
"""
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        # The delay is the sshd's own, so that the start task ends as soon as a real one would.
        launcher = 'sleep "$1"; exec /usr/sbin/sshd -D -e -f "$2"'
        process = subprocess.Popen(
            ["/bin/sh", "-c", launcher, "sh", str(self.boot_seconds), str(run / "sshd_config")],
            env={"PATH": "/usr/bin:/bin", MARK: self._mark(vmid)},
            stdin=subprocess.DEVNULL,
            stdout=(run / "sshd.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        threading.Thread(target=process.wait, daemon=True).start()
        (run / "pid.new").write_text(f"{process.pid} {time.time()}")
        (run / "pid.new").rename(run / "pid")  # whole for whoever lists VMs at this moment
        if not self.boot_seconds:
            deadline = time.monotonic() + 5
            while not (run / "stub/sshd.pid").exists() and time.monotonic() < deadline:
                time.sleep(0.01)

    def _mark(self, vmid: int) -> str:
        return f"{self.home}/{vmid}"

    def _first_boot(self, tree: Path, config: Mapping[str, str]) -> None:
        """What cloud-init does when the instance is new: host name and host keys."""
        seen = f"{config.get('name')} {config.get('sshkeys')} {config.get('smbios1')}"
        instance = hashlib.sha1(seen.encode()).hexdigest()
        marker = tree / "var/lib/cloud/instance-id"
        key = tree / "etc/ssh/ssh_host_ed25519_key"
        if marker.exists() and marker.read_text() == instance and key.exists():
            return
        for old in (tree / "etc/ssh").glob("ssh_host_*"):
            old.unlink()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        (tree / "etc/hostname").write_text(f"{config.get('name', 'vm')}\n")
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(instance)

    def _wrapper(self, vmid: int, tree: Path, run: Path) -> str:
        binds = ["--ro-bind", "/usr", "/usr", "--bind", str(tree / "usr-local"), "/usr/local"]
        for name in ("bin", "sbin", "lib", "lib64", "lib32"):
            if Path("/", name).is_symlink():
                binds += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        for name in ("etc", "home", "root", "opt", "srv", "workspace", "var", "tmp"):
            binds += ["--bind", str(tree / name), f"/{name}"]
        binds += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/run", "--bind", str(run / "stub"), "/run/stub"]
        binds += ["--ro-bind", str(self.shims), "/run/bin", "--cap-drop", "CAP_SYS_TIME", "--cap-drop", "CAP_SYS_BOOT"]
        binds += ["--setenv", "PATH", "/run/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "--chdir", "/"]
        inside = shlex.join(["bwrap", *binds, "--"])
        return f"""#!/bin/sh
export {MARK}={shlex.quote(self._mark(vmid))}
[ "$1" = sftp ] || case "$SSH_ORIGINAL_COMMAND" in */sftp-server*|internal-sftp) set -- sftp ;; esac
[ "$1" = sftp ] && exec {inside} /usr/lib/openssh/sftp-server
exec {inside} /bin/sh -c "$SSH_ORIGINAL_COMMAND"
"""

    def _processes(self, vmid: int) -> Iterator[int]:
        listener = self.pid(vmid)
        if listener is not None:  # a connection's sshd shows neither our mark nor its arguments
            with contextlib.suppress(psutil.NoSuchProcess):
                yield from (child.pid for child in psutil.Process(listener).children(recursive=True))
            yield listener
        mark = f"{MARK}={self._mark(vmid)}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        yield int(entry.name)
                except OSError:
                    continue

    def pid(self, vmid: int) -> int | None:
        try:
            pid = int((self._run(vmid) / "pid").read_text().split()[0])
            alive = f"{self._run(vmid)}/sshd_config".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if alive else None

    def is_running(self, vmid: int) -> bool:
        return self.pid(vmid) is not None

    def started_at(self, vmid: int) -> float | None:
        try:
            return float((self._run(vmid) / "pid").read_text().split()[1]) if self.is_running(vmid) else None
        except FileNotFoundError:  # it was stopped in this moment
            return None

    def stop(self, vmid: int) -> None:
        deadline = time.monotonic() + 10
        while (found := list(self._processes(vmid))) and time.monotonic() < deadline:
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.01)
        shutil.rmtree(self._run(vmid), ignore_errors=True)

    def powerdown(self, vmid: int, *, by_agent: bool = True) -> None:
        self.stop(vmid)

    def running(self) -> list[int]:
        vms = self.home / "vms"
        found = (int(run.name) for run in vms.iterdir()) if vms.exists() else ()
        return sorted(vmid for vmid in found if self.is_running(vmid))

    def settle(self, vmid: int, *, goes_on: bool) -> list[str]:
        return []

    def status(self, vmid: int) -> dict[str, Any]:
        return {"qmpstatus": "running" if self.is_running(vmid) else "stopped", "running-qemu": "7.2.0"}

    def monitor(self, vmid: int) -> NoMonitor:
        return NoMonitor()

    def agent(self, vmid: int) -> NoAgent:
        return NoAgent()

    def running_as(self, vmid: int) -> dict[str, str]:
        return {"runningmachine": "pc-i440fx-7.2", "runningcpu": "max"}

    def save_state(self, vmid: int, path: Path, *, watch: Any) -> None:
        """What runs in a guest does not outlive it here; the time it takes does."""
        time.sleep(self.delays.get("save", 0))
        watch(1 << 20, 0.1)

    def reset(self, vmid: int) -> None:
        pass

    def suspend(self, vmid: int) -> None:
        pass

    def resume(self, vmid: int) -> None:
        pass

    def stop_all(self) -> None:
        vms = self.home / "vms"
        for run in list(vms.iterdir()) if vms.exists() else []:
            self.stop(int(run.name))
