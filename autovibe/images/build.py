"""Build a guest image of a recipe: mmdebstrap, ext4 by `mke2fs -d`, syslinux on FAT, one MBR disk as qcow2.

No loop device and no mount is needed, and no root where user namespaces work. The result is made beside its final name
and renamed; a lock keeps two builders of one image apart; whatever a killed build left is removed by the next.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from autovibe.errors import ConfigurationError, InsufficientSpace, OperationFailed
from autovibe.images import host
from autovibe.images.recipe import Recipe, digest

MIB = 2**20
SECTOR = 512
BOOT_START = MIB
NEEDED_BYTES = 3 * 2**30
"""Room a build needs at its peak: the tree, the disk made of it, the qcow2 made of that (some 0.6 GB each) and apt's cache."""

TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "sfdisk": "fdisk",
    "mformat": "mtools",
    "mcopy": "mtools",
    "syslinux": "syslinux",
    "qemu-img": "qemu-utils",
    "setpriv": "util-linux",
}
MBR_CODE = (
    Path("/usr/lib/syslinux/mbr/mbr.bin"),
    Path("/usr/lib/SYSLINUX/mbr.bin"),
    Path("/usr/share/syslinux/mbr.bin"),
)
SYSTEM_PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

Report = Callable[["Progress"], None]


@dataclass(frozen=True)
class Progress:
    """How far a build is: the phase in words, and the fraction (0-1) of the whole."""

    phase: str
    fraction: float


def image_path(recipe: Recipe, images_home: Path) -> Path:
    """Where the image of this recipe lies once it is built."""
    return images_home / f"{recipe.name}-{digest(recipe)}.qcow2"


def built(recipe: Recipe, images_home: Path) -> Path | None:
    """The image of exactly this recipe, None where it was not built yet."""
    path = image_path(recipe, images_home)
    return path if path.is_file() else None


def build(
    recipe: Recipe,
    images_home: Path,
    *,
    ca_bundle: Path | None = None,
    apt_sources: Path | None = None,
    progress: Report = lambda _: None,
    force: bool = False,
    compress: bool = False,
) -> Path:
    """The image of `recipe`, built unless it is there (or `force`).

    `ca_bundle` (None: the one the host's programs are told to trust) is appended to the trust of build and guest;
    `apt_sources` is a deb822 file (None: the host's own, see `host.host_sources`). Raises ConfigurationError (a tool, the
    keyring or a file is missing), InsufficientSpace and OperationFailed (with the tail of the log).
    """
    images_home.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = image_path(recipe, images_home)
    with _lock(images_home / f".{recipe.name}.lock", progress):
        if path.is_file() and not force:
            progress(Progress("ready", 1.0))
            return path
        _check_tools()
        mode = _mode()
        sources = host.read_sources(apt_sources) if apt_sources else host.host_sources(recipe.suite)
        bundle = ca_bundle or host.host_ca_bundle()
        certificates = host.read_ca_bundle(bundle) if bundle else ""
        with _workspace(images_home, recipe, mode) as work:
            _check_space({work, images_home})
            log = _Log(images_home / f"{recipe.name}.log")
            tree = work / "tree"
            (work / "debian.sources").write_text(sources, encoding="utf-8")
            _write_overlay(work / "overlay.tar", recipe, certificates)
            hooks = _write_hooks(work, recipe, has_certificates=bool(certificates))
            _install(recipe, mode, work, tree, hooks, log, bundle, progress)
            disk = work / "disk.raw"
            progress(Progress("making the file system", 0.82))
            _make_disk(recipe, mode, tree, disk, log)
            progress(Progress("writing the image", 0.92))
            made = images_home / f".{path.name}.new"
            convert = ["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", "-m", "8", "-W"]
            log.run([*convert, *(["-c", "-o", "compression_type=zstd"] if compress else []), str(disk), str(made)])
            made.replace(path)
        progress(Progress("ready", 1.0))
    return path


@contextmanager
def _lock(path: Path, progress: Report) -> Iterator[None]:
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress(Progress("waiting for another build of this image", 0.0))
                time.sleep(0.5)
        yield


def _check_tools() -> None:
    missing = sorted({package for tool, package in TOOLS.items() if _which(tool) is None})
    if not any(path.exists() for path in MBR_CODE):
        missing.append("syslinux-common")
    if host.keyring() is None:
        missing.append("debian-archive-keyring")  # Ubuntu does not install Debian's keys by itself
    if missing:
        raise ConfigurationError(
            f"Building an image needs packages that are not installed; run: apt-get install {' '.join(missing)}"
        )


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATHS}")


def _mode() -> str:
    """mmdebstrap's mode: "root" for root, else "unshare". Raises ConfigurationError where user namespaces do not work."""
    if os.geteuid() == 0:
        return "root"
    probe = subprocess.run(["mmdebstrap", "--unshare-helper", "true"], capture_output=True, text=True, check=False)
    if probe.returncode == 0:
        return "unshare"
    reason = (probe.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise ConfigurationError(
        f"This user cannot make a user namespace with mapped ids, which building an image without root needs ({reason}). "
        "Install the package 'uidmap', give the user a range in /etc/subuid and /etc/subgid, or build as root."
    )


@contextmanager
def _workspace(images_home: Path, recipe: Recipe, mode: str) -> Iterator[Path]:
    """A directory for one build, removed at its end; those of killed builds of this image go first.

    In a user namespace the build runs under mapped ids, which need a way in: then it lies in /var/tmp, passable by all
    and named at random.
    """
    parent = images_home if mode == "root" else Path("/var/tmp")  # noqa: S108 - made by mkdtemp
    prefix = f".autovibe-build-{hashlib.sha256(str(images_home.resolve()).encode()).hexdigest()[:8]}-{recipe.name}-"
    for stale in parent.glob(f"{prefix}*"):
        if stale.lstat().st_uid == os.geteuid():
            _remove(stale, mode)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        work.chmod(0o755)
        yield work
    finally:
        _remove(work, mode)


def _remove(directory: Path, mode: str) -> None:
    if mode != "root":
        subprocess.run(["mmdebstrap", "--unshare-helper", "rm", "-rf", str(directory / "tree")], check=False)
    shutil.rmtree(directory, ignore_errors=True)


def _check_space(places: set[Path]) -> None:
    for place in places:
        free = shutil.disk_usage(place).free
        if free < NEEDED_BYTES:
            raise InsufficientSpace(
                f"Building an image needs {NEEDED_BYTES / 2**30:.0f} GiB free in '{place}', and there are "
                f"{free / 2**30:.1f} GiB; nothing was started."
            )


def _write_overlay(path: Path, recipe: Recipe, certificates: str) -> None:
    """The recipe's files as one tar, all owned by root; tar makes the directories that are missing."""
    files = [(file.path, file.content.encode(), int(file.mode, 8)) for file in recipe.files]
    if certificates:
        files.append(("/usr/local/share/autovibe/host-certificates.pem", certificates.encode(), 0o644))
    with tarfile.open(path, "w") as tar:
        for name, content, mode in files:
            entry = tarfile.TarInfo(f".{name}")
            entry.size, entry.mode, entry.mtime = len(content), mode, int(time.time())
            tar.addfile(entry, io.BytesIO(content))


TRUST_PROGRAM = """\
import base64, hashlib, pathlib, re, subprocess
def parts(path):
    text = pathlib.Path(path).read_text(errors="replace")
    return re.findall("-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", text, re.S)
def digest(body):
    return hashlib.sha256(base64.b64decode(body)).hexdigest()
given = pathlib.Path("/usr/local/share/autovibe/host-certificates.pem")
known = {digest(body) for body in parts("/etc/ssl/certs/ca-certificates.crt")}
extra = {digest(body): body for body in parts(given) if digest(body) not in known}
given.unlink()
for name, body in extra.items():
    target = pathlib.Path(f"/usr/local/share/ca-certificates/autovibe-{name[:16]}.crt")
    target.write_text(f"-----BEGIN CERTIFICATE-----{body}-----END CERTIFICATE-----\\n")
if extra:
    subprocess.run(["update-ca-certificates"], check=True)
    names = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO"]
    bundle = "/etc/ssl/certs/ca-certificates.crt"
    with open("/etc/environment", "a") as environment:
        environment.writelines(f"{name}={bundle}\\n" for name in names)
    directory = pathlib.Path("/etc/systemd/system.conf.d")
    directory.mkdir(exist_ok=True)
    pairs = " ".join(f"{name}={bundle}" for name in names)
    (directory / "autovibe-trust.conf").write_text(f"[Manager]\\nDefaultEnvironment={pairs}\\n")
"""
"""Run in the image: trusts those certificates of the host that Debian does not, also for programs with a bundle of their own."""


def _write_hooks(work: Path, recipe: Recipe, *, has_certificates: bool) -> list[Path]:
    """A file a step; mmdebstrap calls each with the tree as its first argument."""
    commands: list[list[str]] = []
    if has_certificates:
        commands.append(["python3", "-c", TRUST_PROGRAM])
    commands += [list(step.argv) or ["/bin/sh", "-euc", step.script] for step in recipe.steps]
    hooks = []
    for number, argv in enumerate(commands):
        path = work / f"step-{number:02}"
        path.write_text(f'#!/bin/sh\nexec chroot "$1" {shlex.join(argv)}\n', encoding="utf-8")
        path.chmod(0o755)
        hooks.append(path)
    return hooks


def _install(
    recipe: Recipe,
    mode: str,
    work: Path,
    tree: Path,
    hooks: Sequence[Path],
    log: _Log,
    bundle: Path | None,
    progress: Report,
) -> None:
    """Run mmdebstrap into `tree`, telling how far it is by what apt and dpkg say."""
    excluded = ["doc/*", "man/*", "info/*", "locale/*", "lintian/*", "bash-completion/*"]
    dpkg = [
        "force-unsafe-io",
        "force-confold",
        "force-confdef",
        *(f"path-exclude=/usr/share/{each}" for each in excluded),
    ]
    options = [*(f"--dpkgopt={each}" for each in dpkg), "--dpkgopt=path-include=/usr/share/doc/*/copyright"]
    if bundle:
        options.append("--setup-hook=true")
    log.run(
        [
            "mmdebstrap",
            f"--mode={mode}",
            "--variant=apt",
            "--format=directory",
            "--verbose",
            f"--architectures={recipe.architecture}",
            f"--include={','.join(recipe.packages)}",
            '--aptopt=Acquire::Languages "none"',
            *options,
            f"--essential-hook=tar-in {shlex.quote(str(work / 'overlay.tar'))} /",
            *(f'--customize-hook={shlex.quote(str(hook))} "$1"' for hook in hooks),
            recipe.suite,
            str(tree),
            str(work / "debian.sources"),
        ],
        environment={"TMPDIR": str(work), **_proxies()},
        on_line=_Meter(progress),
    )


def _proxies() -> dict[str, str]:
    """The host's apt proxy as environment, unless the environment names one: it serves the build, and is not left in the guest."""
    found = {}
    for scheme in ("http", "https"):
        if not os.environ.get(f"{scheme}_proxy"):
            dump = subprocess.run(
                ["apt-config", "shell", "PROXY", f"Acquire::{scheme}::Proxy"],
                capture_output=True,
                text=True,
                check=False,
            )
            if match := re.fullmatch(r"PROXY='(.+)'\s*", dump.stdout):
                found[f"{scheme}_proxy"] = match[1]
    return found


class _Meter:
    """Turns mmdebstrap's lines into progress: each package is fetched, unpacked and set up once."""

    def __init__(self, progress: Report) -> None:
        self.progress = progress
        self.expected = 0
        self.seen = 0
        self.phase = "reading package lists"

    def __call__(self, line: str) -> None:
        if match := re.search(r"(\d+) newly installed", line):
            self.expected += 3 * int(match[1])
        elif line.startswith(("Get:", "Unpacking ", "Setting up ")):
            self.seen += 1
            self.phase = {"G": "fetching packages", "U": "unpacking packages", "S": "setting up packages"}[line[0]]
        else:
            return
        done = self.seen / max(self.expected, 600)
        self.progress(Progress(self.phase, 0.8 * min(done, 1.0)))


def _make_disk(recipe: Recipe, mode: str, tree: Path, disk: Path, log: _Log) -> None:
    """One raw disk: MBR, a FAT partition with loader, kernel and initramfs, and the tree as ext4."""
    root_start = BOOT_START + recipe.boot_size_bytes
    root_size = recipe.size_bytes - root_start
    with disk.open("wb") as file:
        file.truncate(recipe.size_bytes)
    disk.chmod(0o666)  # mapped ids write it in a user namespace
    table = f"label: dos\nstart={BOOT_START // SECTOR}, size={recipe.boot_size_bytes // SECTOR}, type=e, bootable\n"
    log.run(["sfdisk", "--quiet", str(disk)], input=f"{table}start={root_start // SECTOR}, type=83\n")
    with disk.open("r+b") as file:
        file.write(next(path for path in MBR_CODE if path.exists()).read_bytes()[:440])
    root_uuid = str(uuid.uuid4())
    _make_boot_partition(recipe, tree, disk, root_uuid, log)
    log.run(
        [
            *(["mmdebstrap", "--unshare-helper"] if mode != "root" else []),
            "mke2fs",
            *("-q", "-F", "-t", "ext4", "-L", "autovibe-root", "-U", root_uuid, "-m", "1", "-J", "size=64"),
            *("-E", f"offset={root_start},assume_storage_prezeroed=1", "-d", str(tree)),
            str(disk),
            f"{root_size // 1024}k",
        ]
    )


def _make_boot_partition(recipe: Recipe, tree: Path, disk: Path, root_uuid: str, log: _Log) -> None:
    kernels = sorted(tree.glob("boot/vmlinuz-*"))
    if len(kernels) != 1:
        raise OperationFailed(
            f"The image '{recipe.name}' has {len(kernels)} kernels; its recipe must install exactly one."
        )
    initramfs = tree / "boot" / kernels[0].name.replace("vmlinuz-", "initrd.img-")
    arguments = " ".join(
        ["root=UUID=" + root_uuid, "rootfstype=ext4", "rootflags=noatime", "rw", *recipe.kernel_arguments]
    )
    config = f"DEFAULT linux\nPROMPT 0\nTIMEOUT 0\nLABEL linux\nKERNEL vmlinuz\nINITRD initrd\nAPPEND {arguments}\n"
    (disk.parent / "syslinux.cfg").write_text(config, encoding="ascii")
    partition = f"{disk}@@{BOOT_START}"
    sectors = recipe.boot_size_bytes // SECTOR
    hidden = BOOT_START // SECTOR
    geometry = ["-h", "64", "-s", "32", "-H", str(hidden)]
    log.run(["mformat", "-i", partition, "-v", "AVBOOT", *geometry, "-T", str(sectors), "::"])
    log.run(["mcopy", "-i", partition, str(kernels[0]), "::vmlinuz"])
    log.run(["mcopy", "-i", partition, str(initramfs), "::initrd"])
    log.run(["mcopy", "-i", partition, str(disk.parent / "syslinux.cfg"), "::syslinux.cfg"])
    log.run(["syslinux", "--install", "--offset", str(BOOT_START), str(disk)])


class _Log:
    """Runs a build's commands, keeps what they say in a file, and explains a failure by its tail."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("", encoding="utf-8")

    def run(
        self,
        argv: Sequence[str],
        *,
        input: str = "",
        environment: dict[str, str] | None = None,
        on_line: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Run to the end. Raises OperationFailed; an interruption ends the whole group before it goes on."""
        tail: list[str] = []
        settings = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{SYSTEM_PATHS}", "LC_ALL": "C.UTF-8"}
        child = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**settings, **(environment or {})},
            start_new_session=True,
        )
        assert child.stdin is not None and child.stdout is not None
        try:
            with self.path.open("a", encoding="utf-8") as log:
                log.write(f"+ {shlex.join(argv)}\n")
                child.stdin.write(input)
                child.stdin.close()
                for line in child.stdout:
                    log.write(line)
                    tail = [*tail[-24:], line.rstrip()]
                    on_line(line)
            status = child.wait()
        except BaseException:
            _end(child)
            raise
        if status != 0:
            raise OperationFailed(
                f"'{argv[0]}' ended with status {status} while the image was built. The last lines of '{self.path}':\n"
                + "\n".join(tail),
                log_detail="\n".join(tail),
            )


def _end(child: subprocess.Popen[str]) -> None:
    for number, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        if child.poll() is None:
            os.killpg(child.pid, number)
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                continue
