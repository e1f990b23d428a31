"""The node's disks: its storages behind one door: directories (`local` and others) and `local-lvm` (as LVM-thin).

Everything runs without root, on files below one folder. A `monitor` is given exactly when the VM that uses the disk
runs; the change then goes through its QEMU. A killed call leaves nothing that `recover` does not mend.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial as partial_of
from pathlib import Path
from typing import Any

from autovibe.node.disks import blocks, qemu_img
from autovibe.node.disks.directory import Directory
from autovibe.node.disks.storage_config import Section, StorageConfig
from autovibe.node.disks.thin import Thin
from autovibe.node.disks.volume import (
    DiskError,
    FileName,
    Progress,
    Volume,
    format_of,
    is_cloudinit,
    is_written,
    parse_directory_name,
    parse_thin_name,
    partial_file,
    split,
    sync,
)
from autovibe.node.vm import mirrors
from autovibe.node.vm.monitor import Monitor

logger = logging.getLogger(__name__)

__all__ = ["DiskError", "Disks", "Progress", "Volume"]

_METADATA_BITS = 13  # a qcow2 image's tables take an eight-thousandth of its size at most

_SPARE_BYTES = 256 << 20
"""Free space that must remain, so that running VMs and the node's own files do not meet a full disk."""


class Disks:
    """The storages below `root` (`<node home>/storage`). Sizes are bytes; every method may raise DiskError.

    Which there are says `configuration`; after a change of it `configure` is to be called. `node` is the node's name,
    for storages that are restricted to some nodes. On a disabled storage nothing is made and nothing starts from it;
    what it holds can be listed and removed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.root.mkdir(parents=True, exist_ok=True)
        self.configuration = StorageConfig(self.root)
        self.node = ""
        self._configuring = threading.Lock()
        self._opened: dict[tuple[str, Path], Directory | Thin] = {}  # one object a place: its locks outlive its section
        self._storages: dict[str, Directory | Thin] = {}
        self.configure()

    def configure(self) -> None:
        """Take the storages from the configuration."""
        with self._configuring:
            found = {}
            for name, section in self.configuration.sections.items():
                try:
                    found[name] = self._open(section)
                except OSError as error:  # the others are still of use
                    logger.error("Storage '%s' cannot be used: %s.", name, error)  # noqa: TRY400 - no defect
            self._storages = found

    def _open(self, section: Section) -> Directory | Thin:
        place = self.configuration.path(section)
        kind = Directory if section.type == "dir" else Thin
        storage = self._opened.get((section.name, place))
        if storage is None:
            storage = self._opened[section.name, place] = kind(section.name, place)
        if isinstance(storage, Directory):
            storage.default_format = section.values.get("format", "qcow2")
            storage.preallocation = section.values.get("preallocation", "off")
        return storage

    def statuses(self) -> list[dict[str, Any]]:
        """Each storage as the API's storage list shows it, sizes in bytes."""
        sections = self.configuration.sections
        return [self._status(storage, sections[name]) for name, storage in self._storages.items() if name in sections]

    def path(self, volid: str, *, must_exist: bool = True) -> Path:
        """The file that holds a volume now; always below the root. An upload asks for a file that is yet to be."""
        storage, name = self._find(volid)
        return storage.path(name) if isinstance(storage, Thin) else storage.path(name, must_exist=must_exist)

    def volumes(self, storage: str, *, content: str | None = None, vmid: int | None = None) -> list[Volume]:
        return [
            volume
            for volume in self._known(storage).volumes()
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
        target = self._target(storage)
        is_written = isinstance(target, Directory) and target.preallocation in ("falloc", "full")
        self._require_space(target, size if is_written else size >> _METADATA_BITS)
        return target.allocate(vmid, size=size, name=name, format=format)

    def allocate_state(self, storage: str, vmid: int, name: str, *, size: int, needed: int) -> str:
        """Make the sparse volume `vm-<vmid>-state-<name>`, when the storage has room for `needed` bytes: its volid."""
        target = self._target(storage)
        self._require_space(target, needed)
        return target.allocate(vmid, size=size, name=f"vm-{vmid}-state-{name}", format="raw")

    def import_image(self, storage: str, vmid: int, source: Path, *, progress: Progress) -> str:
        """Make a volume of an uploaded qcow2 or raw file, which is not trusted."""
        if source.suffix not in (".qcow2", ".raw", ".img"):
            raise DiskError(f"image '{source.name}' is neither qcow2 nor raw")
        format = format_of(source)
        size = qemu_img.check_untrusted(source, format)
        return self._convert(self._target(storage), vmid, source, None, size=size, format=None, progress=progress)

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
        limit: int = 0,
    ) -> str:
        """A full copy of a volume, or of one of its snapshots, for another VM (or storage): its volid.

        `limit` is bytes a second, 0 for none. Of a cloud-init drive only the name and size are copied: its content is
        made at every start.
        """
        origin, name = self._find(volid)
        target = self._target(storage)
        if is_cloudinit(name):
            return target.allocate(vmid, size=origin.size(name), name=f"vm-{vmid}-cloudinit", format=format)
        path, internal = origin.source(name, snapshot)
        if monitor is None or snapshot is not None:
            size = origin.size(name)
            sizes = {"size": size, "limit": limit}
            return self._convert(target, vmid, path, internal, **sizes, format=format, progress=progress)
        self._require_space(target, _used(path))
        with partial_file(target.partial(format)) as partial:
            size = origin.size(name)
            qemu_img.create(partial, format=format_of(partial), size=size)
            blocks.copy(monitor, path, partial, format_of(partial))
            progress(f"transferred {qemu_img.render(size)} of {qemu_img.render(size)} (100.00%)")
            return target.adopt(partial, vmid)

    def copy_running(
        self,
        volids: Sequence[str],
        vmid: int,
        *,
        storage: str | None,
        format: str | None,
        progress: Progress,
        monitor: Monitor,
        limit: int,
        still: Callable[[], AbstractContextManager[None]],
    ) -> list[str]:
        """Full copies of a running VM's disks, all as they are at one moment, the one inside `still`: their volids.

        `storage` None keeps each on its own; `limit` is bytes a second for each disk, 0 for none.
        """
        with ExitStack() as stack:
            copies, targets = [], []
            for volid in volids:
                origin, name = self._find(volid)
                target = self._target(storage or origin.name)
                path = origin.source(name, None)[0]
                self._require_space(target, _used(path))
                partial = stack.enter_context(partial_file(target.partial(format)))
                qemu_img.create(partial, format=format_of(partial), size=origin.size(name))
                copies.append(mirrors.Copy(name, path, partial))
                targets.append(target)
            mirrors.copy_all(monitor, copies, limit=limit, progress=progress, still=still)
            return [target.adopt(copy.target, vmid) for target, copy in zip(targets, copies, strict=True)]

    def duplicate(self, volid: str, target: str, *, progress: Progress) -> None:
        """A copy of a stopped VM's disk, or of an uploaded file, under the volid `target`."""
        origin, name = self._find(volid)
        storage, target_name = self._find(target)
        parsed = parse_directory_name(target_name) if isinstance(storage, Directory) else None
        if isinstance(parsed, FileName):
            self._copy_file(origin.source(name, None)[0], storage, self.path(target, must_exist=False), parsed.content)
            return
        self._target(storage.name)
        vmid = parsed.vmid if parsed else parse_thin_name(target_name).vmid
        own_name = parsed.name if parsed else target_name
        path, internal = origin.source(name, None)
        self._require_space(storage, _used(path))
        with partial_file(storage.partial(parsed.format if parsed else None)) as partial:
            self._fill(storage, path, internal, partial, size=origin.size(name), progress=progress)
            storage.adopt(partial, vmid, own_name)

    def _copy_file(self, source: Path, storage: Directory | Thin, target: Path, content: str) -> None:
        if not isinstance(storage, Directory) or target.suffix != source.suffix:
            raise DiskError(f"cannot copy '{source.name}' to '{target.name}'")
        if target.exists():
            raise DiskError(f"refusing to override existing file '{target.name}'")
        self._require_space(storage, _used(source))
        with partial_file(storage.incoming(content)) as partial:
            shutil.copyfile(source, partial)
            sync(partial)
            partial.rename(target)
            sync(target.parent)

    def clone(self, volid: str, vmid: int, *, snapshot: str | None) -> str:
        """A linked clone of a base volume, or of a snapshot where the storage can: its volid."""
        storage, name = self._find(volid)
        self._require_space(storage, 0)
        return storage.clone(name, vmid, snapshot)

    def make_base(self, volid: str) -> str:
        """Turn a volume into one that linked clones are made of: its new volid."""
        storage, name = self._find(volid)
        return storage.make_base(name)

    def rename(self, volid: str, vmid: int) -> str:
        """Give a volume that nothing uses to another VM: its new volid."""
        storage, name = self._find(volid)
        return storage.rename(name, vmid)

    def free(self, volid: str) -> None:
        """Remove a volume with its snapshots. What clones still need of it stays, out of sight."""
        storage, name = split(volid)
        self._known(storage).free(name)

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

    def mend(self, since: float) -> list[str]:
        """Free what a killed qemu-img left allocated in images written `since` (seconds since the epoch): lines.

        Those that a running VM has open are its QEMU's affair.
        """
        done = []
        for storage in self._storages.values():
            for path in storage.root.rglob("*.qcow2"):
                if path.stat().st_mtime < since or is_written(path):
                    continue
                try:
                    done += [line] if (line := qemu_img.mend(path)) else []
                except DiskError as error:
                    done.append(f"'{path.name}': {error}")
        return done

    def unnamed_files(self, named: Collection[str]) -> list[Path]:
        """Files of VMs that none of the volumes in `named` (volids) needs: what no crash may leave behind."""
        found = []
        for storage in self._storages.values():
            names = [volid.partition(":")[2] for volid in named if volid.startswith(f"{storage.name}:")]
            found += storage.unnamed_files(names)
        return sorted(found)

    def recover(self) -> list[str]:
        """Mend what a killed node left half done, before anything else is called; a line for each mend."""
        return [f"{storage.name}: {line}" for storage in self._storages.values() for line in storage.recover()]

    # Inside

    def _known(self, name: str) -> Directory | Thin:
        try:
            return self._storages[name]
        except KeyError:
            raise DiskError(f"storage '{name}' does not exist") from None

    def _storage(self, name: str) -> Directory | Thin:
        """A storage that is enabled here."""
        storage, section = self._known(name), self.configuration.sections.get(name)
        if section is None or section.is_disabled:
            raise DiskError(f"storage '{name}' is disabled")
        if not section.is_on(self.node):
            raise DiskError(f"storage '{name}' is not available on node '{self.node}'")
        return storage

    def _target(self, name: str) -> Directory | Thin:
        """A storage that takes disks."""
        storage = self._storage(name)
        if "images" not in self.configuration.require(name).content:
            raise DiskError(f"storage '{name}' does not support content type 'images'")
        return storage

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
        limit: int = 0,
    ) -> str:
        self._require_space(target, _used(source))
        with partial_file(target.partial(format)) as partial:
            self._fill(target, source, snapshot, partial, size=size, progress=progress, limit=limit)
            return target.adopt(partial, vmid)

    def _fill(
        self,
        target: Directory | Thin,
        source: Path,
        snapshot: str | None,
        partial: Path,
        *,
        size: int,
        progress: Progress,
        limit: int = 0,
    ) -> None:
        kinds: dict[str, Any] = {"format": format_of(source), "to": format_of(partial), "size": size, "limit": limit}
        watch = partial_of(self._require_space, target, -_SPARE_BYTES // 2)
        qemu_img.convert(source, partial, **kinds, snapshot=snapshot, progress=progress, watch=watch)

    def _status(self, storage: Directory | Thin, section: Section) -> dict[str, Any]:
        found: dict[str, Any] = {
            "storage": storage.name,
            "type": storage.type,
            "content": ",".join(section.content),
            "active": 0,
            "enabled": 0,
            "shared": int(section.values.get("shared", "0")),
            **dict.fromkeys(("total", "used", "avail", "used_fraction"), 0),
        }
        if section.is_disabled or not section.is_on(self.node):
            return found
        told = os.statvfs(storage.root)
        total, avail = told.f_blocks * told.f_frsize, told.f_bavail * told.f_frsize
        used = (told.f_blocks - told.f_bfree) * told.f_frsize
        fraction = used / total if total else 0
        sizes = {"total": total, "used": used, "avail": avail, "used_fraction": fraction}
        return {**found, "active": 1, "enabled": 1, **sizes}

    def check_import(self, path: Path, format: str) -> None:
        """Raises DiskError for an image that is none, or that would make QEMU read other files."""
        qemu_img.check_untrusted(path, format)

    def require_space(self, storage: str, size: int) -> None:
        """Raises DiskError when `size` more bytes would leave too little on a storage."""
        self._require_space(self._storage(storage), size)

    def incoming(self, storage: str, content: str) -> Path:
        """A name to receive a file under, on a directory; what is left of it after a kill `recover` removes."""
        target = self._storage(storage)
        if not isinstance(target, Directory):
            raise DiskError(f"can't upload to storage type '{target.type}', not a file based storage!")
        return target.incoming(content)

    def _require_space(self, storage: Directory | Thin, size: int) -> None:
        told = os.statvfs(storage.root)
        avail = told.f_bavail * told.f_frsize
        if avail < size + _SPARE_BYTES:
            wanted, free = qemu_img.render(size + _SPARE_BYTES), qemu_img.render(avail)
            raise DiskError(f"not enough free space on storage '{storage.name}': {wanted} are needed, {free} are free")


def _used(path: Path) -> int:
    return path.stat().st_blocks * 512
