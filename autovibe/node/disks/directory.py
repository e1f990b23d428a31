"""A storage of type `dir` (`local` is one): a directory of qcow2 or raw files; snapshots lie inside the qcow2 files.

    images/<vmid>/vm-<vmid>-disk-0.qcow2   import/   template/iso/   template/cache/   snippets/

QEMU cannot back an overlay onto an internal snapshot, so a linked clone is possible from a base volume alone, which is
what a directory storage of Proxmox answers too.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Iterable
from pathlib import Path

from autovibe.node.disks import blocks, qemu_img
from autovibe.node.disks.volume import (
    DiskError,
    FileName,
    ImageName,
    Volume,
    check_snapshot_name,
    extension,
    format_of,
    is_cloudinit,
    is_written,
    parse_directory_name,
    partial_file,
    sync,
)
from autovibe.node.vm.monitor import Monitor

_FOLDERS = {"import": "import", "iso": "template/iso", "snippets": "snippets", "vztmpl": "template/cache"}


class Directory:
    """The storage's verbs; `Disks` is the door to them, and says what each means.

    `default_format` and `preallocation` are of the storage's configuration, which may change at any time.
    """

    type = "dir"
    default_format = "qcow2"
    preallocation = "off"

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.root = root
        self._images = root / "images"
        self._lock = threading.RLock()
        for folder in (*_FOLDERS.values(), "images"):
            (root / folder).mkdir(parents=True, exist_ok=True)

    # Reading

    def path(self, name: str, *, must_exist: bool = True) -> Path:
        parsed = parse_directory_name(name)
        if isinstance(parsed, FileName):
            path = self.root / _FOLDERS[parsed.content] / parsed.name
        else:
            path = self._images / str(parsed.vmid) / parsed.name
        if path.is_symlink() or (must_exist and not path.is_file()):
            raise DiskError(f"volume '{self.name}:{name}' does not exist")
        return path

    def size(self, name: str) -> int:
        return _size(self.path(name))

    def volumes(self) -> list[Volume]:
        images = [self._describe_image(path) for path in sorted(self._images.glob("[1-9]*/*-*-*"))]
        files = [
            self._describe_file(content, path)
            for content, folder in _FOLDERS.items()
            for path in sorted((self.root / folder).iterdir())
        ]
        return [volume for volume in (*images, *files) if volume is not None]

    def snapshots(self, name: str) -> list[str]:
        path = self.path(name)
        return qemu_img.snapshot_names(path) if format_of(path) == "qcow2" else []

    def source(self, name: str, snapshot: str | None) -> tuple[Path, str | None]:
        """The file to copy a volume from, and the internal snapshot in it."""
        if snapshot is not None and snapshot not in self.snapshots(name):
            raise DiskError(f"snapshot '{snapshot}' of volume '{self.name}:{name}' does not exist")
        return self.path(name), snapshot

    def has_feature(self, name: str, feature: str, snapshot: str | None) -> bool:
        """As Plugin.pm answers for a directory."""
        image = self._image(name)
        state = "snap" if snapshot is not None else "base" if image.is_base else "current"
        if feature == "clone":
            return state == "base"
        if feature == "copy":
            return state != "snap" or image.format == "qcow2"
        return feature == "snapshot" and state in ("current", "snap") and image.format == "qcow2"

    # Making and removing

    def allocate(self, vmid: int, *, size: int, name: str | None, format: str | None) -> str:
        format = format or (extension(name) if name and "." in name else self.default_format)
        with partial_file(self.partial(format)) as partial:
            qemu_img.create(partial, format=format, size=size, preallocation=self.preallocation)
            return self.adopt(partial, vmid, name)

    def partial(self, format: str | None = None) -> Path:
        """A name to make an image under before `adopt`; its suffix tells the format."""
        if format not in (None, "qcow2", "raw"):
            raise DiskError(f"unsupported format '{format}'")
        return self._images / f"partial-{secrets.token_hex(4)}.{format or self.default_format}"

    def incoming(self, content: str) -> Path:
        """A name to receive a file under before it gets its own."""
        return self.root / _FOLDERS[content] / f"partial-{secrets.token_hex(8)}"

    def adopt(self, partial: Path, vmid: int, name: str | None = None, base: str | None = None) -> str:
        """Move a finished image to a volume's name."""
        sync(partial)
        folder = self._images / str(vmid)
        with self._lock:
            folder.mkdir(exist_ok=True)
            name = self._free_name(vmid, name, format_of(partial))
            partial.rename(folder / name)
            sync(folder)
        return f"{self.name}:" + (f"{base}/" if base else "") + f"{vmid}/{name}"

    def free(self, name: str) -> list[str]:
        with self._lock:
            path = self.path(name)
            parsed = parse_directory_name(name)
            if isinstance(parsed, ImageName) and parsed.is_base and self._has_clones(parsed):
                raise DiskError(f"base volume '{self.name}:{name}' is still in use by linked cloned")
            path.unlink()
            sync(path.parent)
            if isinstance(parsed, ImageName) and not any(path.parent.iterdir()):
                path.parent.rmdir()
        return []

    def rename(self, name: str, vmid: int) -> str:
        with self._lock:
            path, image = self.path(name), self._image(name)
            folder = self._images / str(vmid)
            folder.mkdir(exist_ok=True)
            target = self._free_name(vmid, None, image.format)
            path.rename(folder / target)
            sync(folder)
            sync(path.parent)
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
        return f"{self.name}:{f'{image.base_vmid}/{image.base_name}/' if image.base_name else ''}{vmid}/{target}"

    def make_base(self, name: str) -> str:
        with self._lock:
            path, image = self.path(name), self._image(name)
            if image.is_base:
                raise DiskError(f"volume '{self.name}:{name}' is a base volume already")
            if is_written(path):
                raise DiskError(f"volume '{self.name}:{name}' is in use by a running VM")
            target = path.with_name(re.sub(r"^vm-", "base-", path.name))
            if target.exists():
                raise DiskError(f"volume '{self.name}:{image.vmid}/{target.name}' already exists")
            path.rename(target)
            sync(path.parent)
        return (
            f"{self.name}:"
            + (f"{image.base_vmid}/{image.base_name}/" if image.base_name else "")
            + f"{image.vmid}/{target.name}"
        )

    def clone(self, name: str, vmid: int, snapshot: str | None) -> str:
        if not self.has_feature(name, "clone", snapshot):
            raise DiskError(f"Linked clone feature is not supported for '{self.name}:{name}'")
        with self._lock:
            path, image = self.path(name), self._image(name)
            below = f"../{image.vmid}/{image.name}"
            with partial_file(self.partial()) as partial:
                qemu_img.create_overlay(partial, backing=below, backing_format=image.format, size=_size(path))
                return self.adopt(partial, vmid, base=f"{image.vmid}/{image.name}")

    def resize(self, name: str, size: int, monitor: Monitor | None) -> None:
        path = self.path(name)
        if monitor:
            blocks.resize(monitor, path, size)
        else:
            qemu_img.resize(path, format=format_of(path), size=size)

    # Snapshots

    def snapshot(self, name: str, snapshot: str, monitor: Monitor | None) -> None:
        check_snapshot_name(snapshot)
        if is_cloudinit(name):
            return
        path = self._snapshotable(name)
        if snapshot in qemu_img.snapshot_names(path):
            raise DiskError(f"snapshot '{snapshot}' of volume '{self.name}:{name}' already exists")
        if monitor:
            blocks.internal_snapshot(monitor, path, snapshot)
        else:
            qemu_img.snapshot(path, "-c", snapshot)

    def delete_snapshot(self, name: str, snapshot: str, monitor: Monitor | None) -> list[str]:
        if is_cloudinit(name):
            return []
        path, _ = self.source(name, snapshot)
        if monitor:
            blocks.delete_internal_snapshot(monitor, path, snapshot)
        else:
            qemu_img.snapshot(path, "-d", snapshot)
        return []

    def rollback(self, name: str, snapshot: str) -> list[str]:
        if not is_cloudinit(name):
            path, _ = self.source(name, snapshot)
            qemu_img.snapshot(path, "-a", snapshot)
        return []

    def unnamed_files(self, named: Iterable[str]) -> list[Path]:
        wanted = {self.path(name, must_exist=False) for name in named}
        wanted |= {path.parent / backing for path in wanted if path.exists() and (backing := _backing(path))}
        resolved = {os.path.normpath(path) for path in wanted}
        left = [path for path in self._images.rglob("*") if path.is_file() and str(path) not in resolved]
        return left + [path for folder in _FOLDERS.values() for path in (self.root / folder).glob("partial-*")]

    def recover(self) -> list[str]:
        """Remove what a killed node left unfinished."""
        folders = (self._images, *(self.root / folder for folder in _FOLDERS.values()))
        left = [path for folder in folders for path in folder.glob("partial-*")] + [*self._images.glob("*/partial-*")]
        for path in left:
            path.unlink()
        return [f"removed unfinished '{path.name}'" for path in left]

    # Names

    def _image(self, name: str) -> ImageName:
        parsed = parse_directory_name(name)
        if isinstance(parsed, FileName):
            raise DiskError(f"volume '{self.name}:{name}' is no disk image")
        return parsed

    def _snapshotable(self, name: str) -> Path:
        if not self.has_feature(name, "snapshot", None):
            raise DiskError(f"snapshot feature is not available for volume '{self.name}:{name}'")
        return self.path(name)

    def _free_name(self, vmid: int, name: str | None, format: str) -> str:
        folder = self._images / str(vmid)
        if name is None:
            taken = {path.stem.partition("-")[2] for path in folder.iterdir()}
            return next(f"vm-{vmid}-disk-{n}.{format}" for n in range(10_000) if f"{vmid}-disk-{n}" not in taken)
        name = name if extension(name) == format else f"{name}.{format}"
        try:
            parse_directory_name(f"{vmid}/{name}")
        except DiskError:
            raise DiskError(f"illegal name '{name}' - should be 'vm-{vmid}-*'") from None
        if (folder / name).exists():
            raise DiskError(f"disk image '{folder / name}' already exists")
        return name

    def _has_clones(self, base: ImageName) -> bool:
        below = f"../{base.vmid}/{base.name}"
        return any(_backing(path) == below for path in self._images.glob("*/*.qcow2"))

    def _describe_image(self, path: Path) -> Volume | None:
        try:
            backing = _backing(path)
            name = f"{backing.removeprefix('../')}/" if backing else ""
            name += f"{path.parent.name}/{path.name}"
            image = self._image(name)
            told = path.stat()
            volid, used, ctime = f"{self.name}:{name}", told.st_blocks * 512, int(told.st_ctime)
            return Volume(volid, self.name, image.format, _size(path), used, image.vmid, backing, "images", ctime)
        except (DiskError, OSError):  # removed in this moment, or not a volume of ours
            return None

    def _describe_file(self, content: str, path: Path) -> Volume | None:
        name = f"{content}/{path.name}"
        try:
            told = self.path(name).stat()
        except (DiskError, OSError):
            return None
        format = {"iso": "iso", "snippets": "snippet", "vztmpl": f"t{extension(path.name)}"}.get(content)
        format = format or extension(path.name)
        volid, used = f"{self.name}:{name}", told.st_blocks * 512
        return Volume(volid, self.name, format, told.st_size, used, None, None, content, int(told.st_ctime))


def _backing(path: Path) -> str | None:
    return qemu_img.read_header(path).backing if format_of(path) == "qcow2" else None


def _size(path: Path) -> int:
    return qemu_img.read_header(path).size if format_of(path) == "qcow2" else os.stat(path).st_size
