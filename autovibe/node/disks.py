"""The node's disks: two storages behind one door, `local` (a directory) and `local-lvm` (behaves like LVM-thin).

Everything runs without root, on files below one folder. A `monitor` is given exactly when the VM that uses the disk
runs; the change then goes through its QEMU. A killed call leaves nothing that `recover` does not mend.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from autovibe.node import blocks, qemu_img
from autovibe.node.directory import Directory
from autovibe.node.monitor import Monitor
from autovibe.node.thin import Thin
from autovibe.node.volume import DiskError, Progress, Volume, format_of, is_cloudinit, partial_file, split

__all__ = ["DiskError", "Disks", "Progress", "Volume"]

_SPARE_BYTES = 256 << 20
"""Free space that must remain, so that running VMs and the node's own files do not meet a full disk."""


class Disks:
    """The storages below `root` (`<node home>/storage`). Sizes are bytes; every method may raise DiskError."""

    def __init__(self, root: Path) -> None:
        root = root.absolute()
        self._storages: dict[str, Directory | Thin] = {
            "local": Directory("local", root / "local"),
            "local-lvm": Thin("local-lvm", root / "local-lvm"),
        }

    def statuses(self) -> list[dict[str, Any]]:
        """Each storage as the API's storage list shows it, sizes in bytes."""
        return [self._status(storage) for storage in self._storages.values()]

    def path(self, volid: str, *, must_exist: bool = True) -> Path:
        """The file that holds a volume now; always below the root. An upload asks for a file that is yet to be."""
        storage, name = self._find(volid)
        return storage.path(name) if isinstance(storage, Thin) else storage.path(name, must_exist=must_exist)

    def volumes(self, storage: str, *, content: str | None = None, vmid: int | None = None) -> list[Volume]:
        return [
            volume
            for volume in self._storage(storage).volumes()
            if content in (None, volume.content) and vmid in (None, volume.vmid)
        ]

    def snapshots(self, volid: str) -> list[str]:
        """The names of a volume's snapshots."""
        storage, name = self._find(volid)
        return storage.snapshots(name)

    def size(self, volid: str) -> int:
        storage, name = self._find(volid)
        return storage.size(name)

    def has_feature(
        self,
        volid: str,
        feature: str,
        *,
        snapshot: str | None,
        is_running: bool,  # noqa: ARG002 - Proxmox asks it of a storage; neither of these two types minds
    ) -> bool:
        """Whether a storage of this type can `snapshot`, `clone` (linked) or `copy` (full) the volume."""
        storage, name = self._find(volid)
        return storage.has_feature(name, feature, snapshot)

    # Making and removing

    def allocate(
        self, storage: str, vmid: int, *, size: int, name: str | None = None, format: str | None = None
    ) -> str:
        """Make an empty volume (`name` as in `vm-100-cloudinit`; else the next free `vm-100-disk-N`): its volid."""
        if size <= 0:
            raise DiskError("a volume's size must be positive")
        target = self._storage(storage)
        self._require_space(target, 0)
        return target.allocate(vmid, size=size, name=name, format=format)

    def import_image(self, storage: str, vmid: int, source: Path, *, progress: Progress) -> str:
        """Make a volume of an uploaded qcow2 or raw file, which is not trusted."""
        if source.suffix not in (".qcow2", ".raw", ".img"):
            raise DiskError(f"image '{source.name}' is neither qcow2 nor raw")
        format = format_of(source)
        size = qemu_img.check_untrusted(source, format)
        return self._convert(self._storage(storage), vmid, source, None, size=size, format=None, progress=progress)

    def copy(
        self,
        volid: str,
        vmid: int,
        *,
        storage: str,
        snapshot: str | None,
        format: str | None,
        progress: Progress,
        monitor: Monitor | None,
    ) -> str:
        """A full copy of a volume, or of one of its snapshots, for another VM (or storage): its volid.

        Of a cloud-init drive only the name and size are copied: its content is made at every start.
        """
        origin, name = self._find(volid)
        target = self._storage(storage)
        if is_cloudinit(name):
            return target.allocate(vmid, size=origin.size(name), name=f"vm-{vmid}-cloudinit", format=format)
        path, internal = origin.source(name, snapshot)
        if monitor is None or snapshot is not None:
            size = origin.size(name)
            return self._convert(target, vmid, path, internal, size=size, format=format, progress=progress)
        self._require_space(target, _used(path))
        with partial_file(target.partial(format)) as partial:
            size = origin.size(name)
            qemu_img.create(partial, format=format_of(partial), size=size)
            blocks.copy(monitor, path, partial, format_of(partial))
            progress(f"transferred {qemu_img.render(size)} of {qemu_img.render(size)} (100.00%)")
            return target.adopt(partial, vmid)

    def clone(self, volid: str, vmid: int, *, snapshot: str | None) -> str:
        """A linked clone of a base volume, or of a snapshot where the storage can: its volid."""
        storage, name = self._find(volid)
        self._require_space(storage, 0)
        return storage.clone(name, vmid, snapshot)

    def make_base(self, volid: str) -> str:
        """Turn a volume into one that linked clones are made of: its new volid."""
        storage, name = self._find(volid)
        return storage.make_base(name)

    def free(self, volid: str) -> None:
        """Remove a volume with its snapshots. What clones still need of it stays, out of sight."""
        storage, name = self._find(volid)
        storage.free(name)

    def resize(self, volid: str, size: int, *, monitor: Monitor | None) -> None:
        storage, name = self._find(volid)
        present = storage.size(name)
        if size < present:
            raise DiskError("shrinking disks is not supported")
        if size > present:
            storage.resize(name, size, monitor)

    # Snapshots

    def snapshot(self, volid: str, name: str, *, monitor: Monitor | None) -> None:
        storage, volume = self._find(volid)
        self._require_space(storage, 0)
        storage.snapshot(volume, name, monitor)

    def delete_snapshot(self, volid: str, name: str, *, monitor: Monitor | None) -> None:
        storage, volume = self._find(volid)
        storage.delete_snapshot(volume, name, monitor)

    def rollback(self, volid: str, name: str) -> None:
        """Make the disk what it was at the snapshot, which stays, as do the others. The VM must be stopped."""
        storage, volume = self._find(volid)
        storage.rollback(volume, name)

    def recover(self) -> list[str]:
        """Mend what a killed node left half done, before anything else is called; a line for each mend."""
        return [f"{storage.name}: {line}" for storage in self._storages.values() for line in storage.recover()]

    # Inside

    def _storage(self, name: str) -> Directory | Thin:
        try:
            return self._storages[name]
        except KeyError:
            raise DiskError(f"storage '{name}' does not exist") from None

    def _find(self, volid: str) -> tuple[Directory | Thin, str]:
        storage, name = split(volid)
        return self._storage(storage), name

    def _convert(
        self,
        target: Directory | Thin,
        vmid: int,
        source: Path,
        snapshot: str | None,
        *,
        size: int,
        format: str | None,
        progress: Progress,
    ) -> str:
        self._require_space(target, _used(source))
        with partial_file(target.partial(format)) as partial:
            kinds = {"format": format_of(source), "to": format_of(partial)}
            qemu_img.convert(source, partial, **kinds, size=size, snapshot=snapshot, progress=progress)
            return target.adopt(partial, vmid)

    def _status(self, storage: Directory | Thin) -> dict[str, Any]:
        told = os.statvfs(storage.root)
        total, avail = told.f_blocks * told.f_frsize, told.f_bavail * told.f_frsize
        used = (told.f_blocks - told.f_bfree) * told.f_frsize
        return {
            "storage": storage.name,
            "type": storage.type,
            "content": ",".join(storage.content),
            "active": 1,
            "enabled": 1,
            "shared": 0,
            "total": total,
            "used": used,
            "avail": avail,
            "used_fraction": used / total if total else 0,
        }

    def _require_space(self, storage: Directory | Thin, size: int) -> None:
        told = os.statvfs(storage.root)
        avail = told.f_bavail * told.f_frsize
        if avail < size + _SPARE_BYTES:
            wanted, free = qemu_img.render(size + _SPARE_BYTES), qemu_img.render(avail)
            raise DiskError(f"not enough free space on storage '{storage.name}': {wanted} are needed, {free} are free")


def _used(path: Path) -> int:
    return path.stat().st_blocks * 512
