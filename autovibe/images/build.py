"""Build a guest image of a recipe: the tree, the disk made of it, the qcow2 made of that.

No root is needed where user namespaces work. The result is made beside its final name and renamed; a lock keeps two
builders of one image apart; what a killed build left is removed by the next.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autovibe.errors import ConfigurationError, InsufficientSpace
from autovibe.images import disk, host, tree
from autovibe.images.commands import Log, which
from autovibe.images.recipe import Recipe, digest
from autovibe.images.tree import Progress, Report

NEEDED_BYTES = 3 * 2**30
"""Room a build needs at its peak: the tree, the disk and the qcow2, some 0.6 GB each, and apt's cache."""

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
"""Programs a build runs, and the Debian packages they are in."""


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

    `ca_bundle` (None: the one the host's programs are told to trust) is added to what the guest trusts; `apt_sources`
    is a deb822 file (None: the host's own, see `host.host_sources`). Raises ConfigurationError (a tool, the keyring or
    a file is missing), InsufficientSpace and OperationFailed (with the tail of the log).
    """
    images_home.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = image_path(recipe, images_home)
    with _lock(images_home / f".{recipe.name}.lock", progress):
        if path.is_file() and not force:
            progress(Progress("ready", 1.0))
            return path
        _check_tools()
        mode = tree.mode()
        sources = host.read_sources(apt_sources) if apt_sources else host.host_sources(recipe.suite)
        bundle = ca_bundle or host.host_ca_bundle()
        certificates = host.read_ca_bundle(bundle) if bundle else ""
        with _workspace(images_home, recipe, mode) as work:
            _check_space([work, images_home])
            log = Log(images_home / f"{recipe.name}.log")
            root = work / "tree"
            tree.make(recipe, mode, work, root, sources=sources, certificates=certificates, log=log, progress=progress)
            progress(Progress("making the file system", 0.82))
            disk.make(recipe, mode, root, work / "disk.raw", log)
            progress(Progress("writing the image", 0.92))
            _convert(work / "disk.raw", path, compress=compress, log=log)
        progress(Progress("ready", 1.0))
    return path


def _convert(source: Path, path: Path, *, compress: bool, log: Log) -> None:
    made = path.with_name(f".{path.name}.new")
    options = ["-c", "-o", "compression_type=zstd"] if compress else []
    try:
        log.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", *options, "-W", str(source), str(made)])
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)


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
    missing = {package for tool, package in TOOLS.items() if which(tool) is None}
    if not any(path.exists() for path in disk.MBR_CODE):
        missing.add("syslinux-common")
    if host.keyring() is None:
        missing.add("debian-archive-keyring")  # Ubuntu does not install Debian's keys by itself
    if missing:
        raise ConfigurationError(
            "Building an image needs packages that are not installed; run: "
            f"apt-get install --no-install-recommends {' '.join(sorted(missing))}"
        )


@contextmanager
def _workspace(images_home: Path, recipe: Recipe, mode: str) -> Iterator[Path]:
    """A directory for one build, removed at its end; those of killed builds of this image go first.

    In a user namespace the build runs under mapped ids, which need a way in: then it lies in /var/tmp, passable by all
    and named at random.
    """
    parent = images_home if mode == "root" else Path("/var/tmp")  # noqa: S108 - made by mkdtemp
    home = hashlib.sha256(str(images_home.resolve()).encode()).hexdigest()[:8]
    prefix = f".autovibe-build-{home}-{recipe.name}-"
    for stale in parent.glob(f"{prefix}*"):
        if stale.lstat().st_uid == os.geteuid():
            _remove(stale, mode)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        work.chmod(0o755)
        yield work
    finally:
        _remove(work, mode)


def _remove(work: Path, mode: str) -> None:
    if mode != "root":  # what lies in it belongs to mapped ids
        inner = [str(path) for path in work.iterdir()]
        subprocess.run(["mmdebstrap", "--unshare-helper", "rm", "-rf", *inner], check=False, capture_output=True)
    shutil.rmtree(work, ignore_errors=True)


def _check_space(places: list[Path]) -> None:
    for place in places:
        free = shutil.disk_usage(place).free
        if free < NEEDED_BYTES:
            raise InsufficientSpace(
                f"Building an image needs {NEEDED_BYTES / 2**30:.0f} GiB free in '{place}', and there are "
                f"{free / 2**30:.1f} GiB; nothing was started."
            )
