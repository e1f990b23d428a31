"""qemu-img, argv by argv, and the header of a qcow2 file.

Formats are always given, never probed: a guest may write what looks like another format's header into its raw disk,
and an uploaded image may name a backing file of the host.
"""

from __future__ import annotations

import io
import json
import re
import select
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from autovibe.node.disks.volume import DiskError, Progress
from autovibe.node.tasks import worker

_MAGIC = b"QFI\xfb"
_EXTERNAL_DATA = 1 << 2
_QUICK_SECONDS = 60
_OPTIONS = "cluster_size=64k,lazy_refcounts=off"
_LARGEST_BYTES = 64 << 40
_WATCH_SECONDS = 0.5


class ImageLocked(DiskError):
    """Another process, a running VM most likely, has the image open."""


class Header(NamedTuple):
    """What a qcow2 file says of itself (docs/interop/qcow2.txt of QEMU); `size` is the disk's, in bytes."""

    size: int
    backing: str | None
    has_data_file: bool
    is_encrypted: bool


def read_header(path: Path) -> Header:
    """Read a qcow2 header without opening anything it names. Raises DiskError when it is none."""
    try:
        with path.open("rb") as file:
            head = file.read(104)
            if len(head) < 72 or head[:4] != _MAGIC:
                raise DiskError(f"'{path.name}' is not a qcow2 image")
            version, offset, length, _, size, crypt = struct.unpack(">IQIIQI", head[4:36])
            features = struct.unpack(">Q", head[72:80])[0] if version >= 3 and len(head) >= 80 else 0
            backing = None
            if offset:
                file.seek(offset)
                backing = file.read(min(length, 1023)).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise DiskError(f"'{path.name}' cannot be read: {error.strerror}") from error
    return Header(size, backing, bool(features & _EXTERNAL_DATA), crypt != 0)


def check_untrusted(path: Path, format: str) -> int:
    """The virtual size of an uploaded image. Raises DiskError when it would make qemu-img read other files."""
    if format == "raw":
        return path.stat().st_size
    header = read_header(path)
    if header.size > _LARGEST_BYTES:
        raise DiskError(f"image '{path.name}' claims a size of {render(header.size)}, which is too large")
    if header.backing is not None:
        raise DiskError(f"image '{path.name}' has a backing file, which is not allowed for an import")
    if header.has_data_file:
        raise DiskError(f"image '{path.name}' has an external data file, which is not allowed for an import")
    if header.is_encrypted:
        raise DiskError(f"image '{path.name}' is encrypted, which is not supported")
    told = json.loads(run("info", "-f", format, "--output=json", str(path)))
    specific = told.get("format-specific", {}).get("data", {})
    if told.get("format") != format or "backing-filename" in told or "data-file" in specific:
        raise DiskError(f"image '{path.name}' refers to another file, which is not allowed for an import")
    return int(told["virtual-size"])


def create(path: Path, *, format: str, size: int, preallocation: str = "off") -> None:
    """`preallocation` is one of off, metadata, falloc and full; a raw file has no metadata."""
    chosen = "off" if (format, preallocation) == ("raw", "metadata") else preallocation
    options = f"{_OPTIONS},preallocation={chosen}" if format == "qcow2" else f"preallocation={chosen}"
    timeout = _QUICK_SECONDS if chosen == "off" else None
    run("create", "-q", "-f", format, "-o", options, str(path), str(size), timeout=timeout)


def create_overlay(path: Path, *, backing: str, backing_format: str, size: int) -> None:
    """A qcow2 file on top of another; `backing` is relative to it, so that the node's home can be moved."""
    # fmt: off
    run("create", "-q", "-u", "-f", "qcow2", "-o", _OPTIONS, "-b", backing, "-F", backing_format, str(path), str(size))
    # fmt: on


def resize(path: Path, *, format: str, size: int) -> None:
    run("resize", "-q", "-f", format, str(path), str(size))


def rebase(path: Path, *, backing: str | None) -> None:
    """Copy into `path` what lies between it and `backing` (None: everything below), then put it on `backing`.

    The disk reads the same at every moment, so a killed rebase is merely unfinished. Raises ImageLocked.
    """
    target = ["-b", backing, "-F", "qcow2"] if backing is not None else ["-b", ""]
    run("rebase", "-q", "-f", "qcow2", *target, str(path), timeout=None)


def mend(path: Path) -> str | None:
    """Give back the clusters that a killed change of an image left allocated; what was wrong, if anything was."""
    if '"leaks"' not in (told := _check(path)) and '"corruptions"' not in told:
        return None
    run("check", "-q", "-r", "leaks", "-f", "qcow2", str(path), timeout=None)
    return f"gave back what a killed change of '{path.name}' had left allocated"


def _check(path: Path) -> str:
    """qemu-img's findings as JSON; it exits with 3 for leaks and 2 for damage."""
    argv = _argv(["check", "-f", "qcow2", "--output=json", str(path)])
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 2, 3):
        raise _failure(done.stderr, argv)
    return done.stdout


def snapshot_names(path: Path) -> list[str]:
    """The internal snapshots of a qcow2 file, also while a VM writes to it."""
    told = json.loads(run("info", "-U", "-f", "qcow2", "--output=json", str(path)))
    return [each["name"] for each in told.get("snapshots", [])]


def snapshot(path: Path, action: str, name: str) -> None:
    """Act on an internal snapshot: `-c` creates, `-d` deletes, `-a` goes back to it."""
    run("snapshot", "-q", action, name, str(path), timeout=None)


def convert(
    source: Path,
    target: Path,
    *,
    format: str,
    to: str,
    size: int,
    snapshot: str | None = None,
    progress: Progress,
    watch: Callable[[], None] = lambda: None,
    limit: int = 0,
) -> None:
    """Copy an image; `size` (bytes) is for the progress lines, which read like the real `qm`'s; `limit` bytes a second.

    `watch` is called again and again and stops the copy by raising: a few compressed bytes may become gigabytes.
    """
    argv = ["convert", "-p", "-f", format, "-O", to, *(["-o", _OPTIONS] if to == "qcow2" else [])]
    argv += ["-r", str(limit)] if limit else []
    if snapshot is not None:
        argv += ["-U", "-l", f"snapshot.name={snapshot}"]  # the snapshot's own clusters no running VM changes
    process = subprocess.Popen(
        _argv([*argv, str(source), str(target)]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        with worker.running(process):
            _report(cast(io.BufferedReader, process.stdout), size, progress, watch)
    except BaseException:
        process.kill()
        raise
    finally:
        _, errors = process.communicate()
    if process.returncode != 0:
        raise _failure(errors.decode("utf-8", "replace"), argv)


def _report(output: io.BufferedReader, size: int, progress: Progress, watch: Callable[[], None]) -> None:
    """Turn qemu-img's `(12.34/100%)` into log lines, one a percent at most."""
    told, text = -1, b""
    while True:
        watch()
        if not select.select([output], [], [], _WATCH_SECONDS)[0]:
            continue
        chunk = output.read1(4096)
        if not chunk:
            return
        text = (text + chunk)[-64:]
        if found := re.findall(rb"\((\d+\.\d+)/100%\)", text):
            percent = float(found[-1])
            if int(percent) > told:
                told = int(percent)
                progress(f"transferred {render(size * percent / 100)} of {render(size)} ({percent:.2f}%)")


def render(count: float) -> str:
    """Bytes as Proxmox's logs write them: `12.0 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def run(*arguments: str, timeout: float | None = _QUICK_SECONDS) -> str:
    """Run qemu-img to its end and answer its output. Raises DiskError with its first line of complaint."""
    process = subprocess.Popen(
        _argv(arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        with worker.running(process):
            output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise DiskError(f"qemu-img {arguments[0]} took longer than {timeout:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            process.communicate()
    if process.returncode != 0:
        raise _failure(errors, arguments)
    return output


def _argv(arguments: Sequence[str]) -> list[str]:
    """qemu-img's argv; it dies with the thread that started it, so that a killed node leaves nothing writing."""
    guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    return [*guard, "qemu-img", *arguments]


def _failure(errors: str, arguments: Sequence[str]) -> DiskError:
    lines = errors.strip().splitlines() or ["it gave no reason"]
    text = f"qemu-img {arguments[0]} failed: {lines[0].removeprefix('qemu-img: ')}"
    return ImageLocked(text) if "lock" in errors and "Failed to get" in errors else DiskError(text)
