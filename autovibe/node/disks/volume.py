"""What a volume is, and the grammar of the names it goes by (volids).

    local:100/vm-100-disk-0.qcow2                                 a disk
    local:100/base-100-disk-0.qcow2                               the disk of a template
    local:100/base-100-disk-0.qcow2/301/vm-301-disk-0.qcow2       a linked clone of it
    local:import/x.qcow2  local:iso/x.iso  local:snippets/x.yaml  local:vztmpl/x.tar.zst  uploaded files
    local-lvm:vm-100-disk-0   local-lvm:base-9001-disk-0

A volid comes from a client, so the grammar is the fence: a name holds no separator, never starts with a dot, and its
owner's number is in it. Forms and error texts: recorded from Proxmox VE 9.2.11.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

NAME_BYTES = 255
"""The longest name of a file."""

Progress = Callable[[str], None]
"""Takes one line for the task's log; an exception it raises stops the work, and what was half made is removed."""

VMID = r"[1-9]\d{2,8}"
_REST = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?"
_THIN = re.compile(rf"(?P<kind>vm|base)-(?P<vmid>{VMID})-{_REST}")
_IMAGE = re.compile(
    rf"(?:(?P<base_dir>{VMID})/(?P<base>base-(?P=base_dir)-{_REST}\.(?:qcow2|raw))/)?"
    rf"(?P<vmid>{VMID})/(?P<name>(?P<kind>vm|base)-(?P=vmid)-{_REST}\.(?P<format>qcow2|raw))"
)
_FILE = re.compile(r"(?P<content>import|iso|snippets|vztmpl)/(?P<name>[A-Za-z0-9_][A-Za-z0-9._+=-]*)")
ENDINGS = {
    "import": (".qcow2", ".raw"),
    "iso": (".iso", ".img"),
    "snippets": (".yaml", ".yml", ".json", ".cfg", ".conf", ".txt", ".sh", ".pl", ".py"),
    "vztmpl": (".tar", ".tar.gz", ".tar.xz", ".tar.zst", ".tar.bz2"),
}
"""How the names of uploaded files end, by what they are."""


class DiskError(Exception):
    """A disk operation that could not be done; the text is the one Proxmox gives where it has one."""


class Volume(NamedTuple):
    """One volume as a storage lists it; `size` and `used` in bytes, `ctime` in seconds since the epoch."""

    volid: str
    storage: str
    format: str
    size: int
    used: int
    vmid: int | None
    parent: str | None
    content: str
    ctime: int


class ImageName(NamedTuple):
    """A disk's name on a directory."""

    vmid: int
    name: str
    format: str
    is_base: bool
    base_vmid: int | None
    base_name: str | None


class FileName(NamedTuple):
    """An uploaded file's name on a directory."""

    content: str
    name: str


class ThinName(NamedTuple):
    """A disk's name on the storage `local-lvm`."""

    vmid: int
    name: str
    is_base: bool


def split(volid: str) -> tuple[str, str]:
    """A volid's storage and the name within it."""
    storage, colon, name = volid.partition(":")
    if not colon or not name or not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", storage):
        raise DiskError(f"unable to parse volume ID '{volid}'")
    return storage, name


def parse_directory_name(name: str) -> ImageName | FileName:
    if match := _IMAGE.fullmatch(name):
        base_vmid = int(match["base_dir"]) if match["base_dir"] else None
        is_base = match["kind"] == "base"
        return ImageName(int(match["vmid"]), match["name"], match["format"], is_base, base_vmid, match["base"])
    if (match := _FILE.fullmatch(name)) and has_right_ending(match["content"], match["name"]):
        return FileName(match["content"], match["name"])
    raise DiskError(f"unable to parse directory volume name '{name}'")


def has_right_ending(content: str, name: str) -> bool:
    """Whether a file may have this name, which tells its format: the letters' case counts but for ISO images."""
    told = name.lower() if content == "iso" else name
    return len(name) <= NAME_BYTES and told.endswith(ENDINGS[content])


def parse_thin_name(name: str) -> ThinName:
    if match := _THIN.fullmatch(name):
        return ThinName(int(match["vmid"]), name, match["kind"] == "base")
    raise DiskError(f"unable to parse lvm volume name '{name}'")


def check_snapshot_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{1,39}", name):
        raise DiskError(f"invalid snapshot name '{name}'")


def extension(name: str) -> str:
    return name.rpartition(".")[2]


def format_of(path: Path) -> str:
    """The format a file is opened with: told by the names we give, never probed (its content is a guest's)."""
    return "qcow2" if path.suffix == ".qcow2" else "raw"


def is_cloudinit(name: str) -> bool:
    """Whether a volume is a cloud-init drive: made anew from the config at every start, so never worth a snapshot."""
    return bool(re.search(rf"vm-{VMID}-cloudinit(\.\w+)?$", name))


def is_state(name: str) -> bool:
    """Whether a volume holds a VM's RAM: written as a plain file, and never a disk."""
    return bool(re.search(rf"vm-{VMID}-state-[\w-]+(\.raw)?$", name))


# Files that survive a crash


def write_durably(path: Path, value: dict[str, Any]) -> None:
    """Replace a JSON file so that a crash leaves the old or the new one, whole."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """A name to make a file under; it is removed when the block fails, and by `recover` when the node was killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        yield path
    except BaseException:
        path.unlink(missing_ok=True)
        raise


_WRITE_PERMISSION_BYTE = 101


def is_written(path: Path) -> bool:
    """Whether a QEMU process has the image open for writing, by the lock QEMU holds on byte 101 of the file.

    Bytes from 100 are QEMU's permission locks, 101 is BLK_PERM_WRITE (block/file-posix.c, RAW_LOCK_PERM_BASE).
    """
    probe = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, _WRITE_PERMISSION_BYTE, 1, 0)
    try:
        with path.open("rb+") as file:
            answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, probe)
    except FileNotFoundError:
        return False
    return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)
