"""The node as a whole: `serve` builds it around a hypervisor and disks, `run` is the program `autovibe serve node`."""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import logging
import logging.handlers
import os
import signal
import stat
import sys
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING

from autovibe.errors import ConfigurationError
from autovibe.node.access.auth import Auth
from autovibe.node.firewall import Firewall
from autovibe.node.host.sampler import Sampler
from autovibe.node.http import certificate
from autovibe.node.http.api import Api
from autovibe.node.http.faults import Faults
from autovibe.node.http.server import Server
from autovibe.node.recovery import recover
from autovibe.node.state import State
from autovibe.node.tasks import Tasks
from autovibe.node.vm.vmconfig import Configs

if TYPE_CHECKING:
    from autovibe.node.disks import Disks
    from autovibe.node.vm.qemu import Qemu

logger = logging.getLogger(__name__)

STOP_SECONDS = 8.0
_LOG_BYTES, _LOG_COUNT = 10 << 20, 5


class Node:
    """One node on one home. Making it takes the home and recovers; `start` opens the door."""

    def __init__(
        self, home: Path, host: str, port: int, name: str, qemu: Qemu, disks: Disks, faults: Faults | None
    ) -> None:
        self.home, self.name, self.host = home.absolute(), name, host
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _take(self.home)
        uploads = self.home / "uploads"
        uploads.mkdir(mode=0o700, exist_ok=True)
        context, self.fingerprint = certificate.load(self.home, host)
        auth = Auth(self.home)
        self.token = auth.token
        self.state = State(
            name=name,
            home=self.home,
            address=host,
            fingerprint=self.fingerprint,
            auth=auth,
            access=auth.access,
            tasks=Tasks(self.home / "tasks", name, wrap=faults.wrap if faults else None),
            configs=Configs(self.home / "qemu-server", name),
            disks=disks,
            qemu=qemu,
            sampler=Sampler(self.home / "rrd"),
            firewall=Firewall(self.home / "firewall"),
        )
        disks.node = name
        recover(self.state)
        for leftover in uploads.glob("upload-*"):
            leftover.unlink()
        try:
            self._server = Server(host, port, context, Api(self.state, uploads, faults).answer)
        except OSError as error:
            self._lock.close()
            raise ConfigurationError(
                f"The node cannot listen on '{host}:{port}': {error.strerror}; choose another port with --node-port."
            ) from error
        self.port = self._server.port

    @property
    def url(self) -> str:
        return f"https://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def start(self) -> Node:
        self._server.start()
        self.state.sampler.start(self.state)
        logger.info("Node '%s' serves %s, fingerprint %s.", self.name, self.url, self.fingerprint)
        return self

    def stop(self, timeout_seconds: float = STOP_SECONDS) -> bool:
        """Stop accepting and let tasks end; whether all did. VMs stay, and the next node finds them."""
        self._server.stop()
        self.state.consoles.close_all()
        self.state.sampler.stop()
        left = self.state.tasks.await_all(timeout_seconds)
        for task in left:
            logger.warning("Task '%s' was still running; the next start recovers it.", task.upid)
        self._lock.close()
        return not left


def serve(
    home: Path,
    host: str,
    port: int,
    *,
    name: str = "autovibe",
    qemu: Qemu,
    disks: Disks,
    faults: Path | None = None,
) -> Node:
    """A node on `home` (the node's own: `<autovibe home>/node`); port 0 takes a free one. Call `start`, then `stop`.

    `faults` is a file of faults on demand, on loopback only. Raises ConfigurationError when another node has the home,
    when something has the port, or when that file is wrong.
    """
    if faults is not None and not _is_loopback(host):
        raise ConfigurationError(f"Faults on demand are for tests: the node must listen on loopback, not on '{host}'.")
    return Node(home, host, port, name, qemu, disks, Faults(faults) if faults is not None else None)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(
    home: Path,
    host: str,
    port: int,
    name: str = "autovibe",
    accel: str = "auto",
    log_level: str = "info",
    faults: Path | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; exits within ten seconds of it, whatever tasks are running."""
    from autovibe.node.disks import Disks
    from autovibe.node.vm.qemu import Qemu

    home = home.absolute()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    _log_to(home / "node.log", log_level)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    qemu = Qemu(home, run_directory(home), accel=accel, forward_port=port + 1)
    node = serve(home, host, port, name=name, qemu=qemu, disks=Disks(home / "storage"), faults=faults)
    (home / "node.pid").write_text(f"{os.getpid()}\n", encoding="ascii")
    node.start()
    print(f"Node '{name}' serves {node.url}", flush=True)
    print(f"Fingerprint {node.fingerprint}", flush=True)
    if faults is not None:
        print(f"FAULTS ON DEMAND from '{faults}': this node fails on purpose. It is for tests only.", flush=True)
    threading.Thread(target=qemu.probe, name="probe", daemon=True).start()
    stopping.wait()
    logger.info("Node '%s' stops; VMs stay.", name)
    has_ended = node.stop()
    (home / "node.pid").unlink(missing_ok=True)
    logging.shutdown()
    if not has_ended:  # threads of tasks that are recovered at the next start
        sys.stdout.flush()
        os._exit(0)


def run_directory(home: Path) -> Path:
    """Where sockets lie: a short path (108 bytes is the limit), the user's own, the same for a home each time."""
    digest = hashlib.sha256(os.fsencode(home.absolute())).hexdigest()[:8]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    place = Path(runtime) / f"autovibe-{digest}" if runtime and Path(runtime).is_dir() else None
    place = place or Path("/tmp") / f"autovibe-{os.getuid()}-{digest}"  # noqa: S108 - owner and mode are checked
    place.mkdir(mode=0o700, exist_ok=True)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigurationError(f"'{place}' is not a directory of your own with mode 0700; remove it.")
    return place


def _take(home: Path) -> IO[str]:
    """Hold the home for this process; the lock goes with it, however it ends."""
    file = (home / "lock").open("a", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigurationError(f"The node home '{home}' is in use by another node; stop that one first.") from None
    return file


def _log_to(path: Path, level: str) -> None:
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=_LOG_COUNT, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level.upper())
