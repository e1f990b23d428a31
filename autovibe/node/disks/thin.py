"""The storage `local-lvm`: what LVM-thin can do, done with chains of qcow2 overlays.

    volumes/<name>.json     a volume: its top layer, and the layer each snapshot names
    layers/<file>           qcow2 files; each says in its own header which layer it lies on

A snapshot freezes the top layer and puts a new one on it; a linked clone puts a new layer on a frozen one; a rollback
puts a new top on the snapshot's layer. A layer is *named* while a volume's top or snapshot is it. Of the layers nobody
names, one without a child is removed and one with a single child is merged into that child, whenever `collect` runs.

Invariants. Only a top layer is written to, and only by one VM. A volume's JSON is replaced by one rename, and every
operation is that rename with a layer made before it; so a crash leaves a layer that nobody names, which `collect`
removes. The one exception is a snapshot of a running VM, which QEMU and the JSON must learn of together: the JSON
carries the intent (`pending`) until QEMU has switched, and `recover` asks QEMU's own file locks which side it was on.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from autovibe.node.disks import blocks, qemu_img
from autovibe.node.disks.volume import (
    DiskError,
    Volume,
    check_snapshot_name,
    format_of,
    is_cloudinit,
    is_state,
    is_written,
    parse_thin_name,
    partial_file,
    sync,
    write_durably,
)
from autovibe.node.vm.monitor import Monitor, MonitorError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """A volume's JSON. Layers are file names; `pending` is (snapshot, new top) of a switch that is under way."""

    top: str
    parent: str | None = None
    snapshots: dict[str, str] = field(default_factory=dict)
    pending: tuple[str, str] | None = None

    def layers(self) -> set[str]:
        return {self.top, *self.snapshots.values(), *([self.pending[1]] if self.pending else [])}


class Thin:
    """The storage's verbs; `Disks` is the door to them, and says what each means."""

    type = "lvmthin"

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.root = root
        self._volumes = root / "volumes"
        self._layers = root / "layers"
        for folder in (self._volumes, self._layers):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()  # the graph; held for moments
        self._collecting = threading.Lock()  # one merge at a time, which may take seconds; taken before _lock

    # Reading

    def path(self, name: str) -> Path:
        with self._collecting:  # a VM about to start waits for a merge into its layers
            return self._layers / self._read(name).top

    def size(self, name: str) -> int:
        return self._size(self._read(name).top)

    def volumes(self) -> list[Volume]:
        with self._lock:
            return [self._describe(name, record) for name, record in sorted(self._records().items())]

    def snapshots(self, name: str) -> list[str]:
        return list(self._read(name).snapshots)

    def source(self, name: str, snapshot: str | None) -> tuple[Path, str | None]:
        """The file to copy a volume from, and the internal snapshot in it (never one here)."""
        record = self._read(name)
        return self._layers / (record.top if snapshot is None else self._named(name, record, snapshot)), None

    def has_feature(self, name: str, feature: str, snapshot: str | None) -> bool:
        """As LvmThinPlugin.pm answers."""
        state = "snap" if snapshot is not None else "base" if parse_thin_name(name).is_base else "current"
        wanted = {"snapshot": ("current",), "clone": ("base", "snap"), "copy": ("base", "current", "snap")}
        return state in wanted.get(feature, ())

    # Making and removing

    def allocate(self, vmid: int, *, size: int, name: str | None, format: str | None) -> str:
        partial = self.partial(format)
        if name is not None and (is_cloudinit(name) or is_state(name)):
            partial = partial.with_suffix(".raw")
        with partial_file(partial):
            qemu_img.create(partial, format=format_of(partial), size=size)
            return self.adopt(partial, vmid, name)

    def partial(self, format: str | None = None) -> Path:
        """A name to make an image under before `adopt`. A thin volume is `raw` to the world, and qcow2 inside."""
        if format not in (None, "raw"):
            raise DiskError(f"unsupported format '{format}'")
        return self._layers / f"partial-{secrets.token_hex(4)}.qcow2"

    def adopt(self, partial: Path, vmid: int, name: str | None = None, parent: str | None = None) -> str:
        """Give a finished image a layer's and a volume's name."""
        sync(partial)
        with self._lock:
            name = self._free_name(vmid, name)
            layer = self._layer_name(name, format_of(partial))
            partial.rename(self._layers / layer)
            self._write(name, Record(top=layer, parent=parent))
        return f"{self.name}:{name}"

    def free(self, name: str) -> list[str]:
        with self._lock:
            record = self._read(name)
            if parse_thin_name(name).is_base and self._children()[record.top]:
                raise DiskError(f"base volume '{self.name}:{name}' is still in use by linked cloned")
            self._file(name).unlink()
            sync(self._volumes)
        return self.collect()

    def rename(self, name: str, vmid: int) -> str:
        with self._lock:
            self._idle(name)
            target = self._free_name(vmid, None)
            self._file(name).rename(self._file(target))
            sync(self._volumes)
        return f"{self.name}:{target}"

    def make_base(self, name: str) -> str:
        with self._lock:
            record = self._idle(name)
            if record.snapshots:
                raise DiskError(f"volume '{self.name}:{name}' has snapshots and cannot become a base volume")
            base = re.sub(r"^vm-", "base-", name)
            if self._file(base).exists():
                raise DiskError(f"volume '{self.name}:{base}' already exists")
            self._file(name).rename(self._file(base))
            sync(self._volumes)
        return f"{self.name}:{base}"

    def clone(self, name: str, vmid: int, snapshot: str | None) -> str:
        if not self.has_feature(name, "clone", snapshot):
            raise DiskError(f"Linked clone feature is not supported for '{self.name}:{name}'")
        with self._lock:
            record = self._read(name)
            below = record.top if snapshot is None else self._named(name, record, snapshot)
            with partial_file(self.partial()) as partial:
                qemu_img.create_overlay(partial, backing=below, backing_format="qcow2", size=self._size(below))
                return self.adopt(partial, vmid, parent=f"{self.name}:{name}" + (f"@{snapshot}" if snapshot else ""))

    def resize(self, name: str, size: int, monitor: Monitor | None) -> None:
        with self._lock:
            top = self._layers / (self._read(name).top if monitor else self._idle(name).top)
            if monitor:
                blocks.resize(monitor, top, size)
            else:
                qemu_img.resize(top, format=format_of(top), size=size)

    # Snapshots

    def snapshot(self, name: str, snapshot: str, monitor: Monitor | None) -> None:
        check_snapshot_name(snapshot)
        if is_cloudinit(name):
            return
        with self._lock:
            record = self._read(name) if monitor else self._idle(name)
            if snapshot in record.snapshots:
                raise DiskError(f"snapshot '{snapshot}' of volume '{self.name}:{name}' already exists")
            layer = self._overlay(name, record.top)
            if monitor:
                self._write(name, replace(record, pending=(snapshot, layer)))
                self._switch(name, record, layer, monitor)
            self._write(name, self._after(record, snapshot, layer))

    def delete_snapshot(self, name: str, snapshot: str, monitor: Monitor | None) -> list[str]:
        if is_cloudinit(name):
            return []
        with self._lock:
            record = self._read(name)
            self._named(name, record, snapshot)
            self._write(name, replace(record, snapshots=_without(record.snapshots, snapshot)))
        return self.collect(monitor)

    def rollback(self, name: str, snapshot: str) -> list[str]:
        if is_cloudinit(name):
            return []
        with self._lock:
            record = self._idle(name)
            below = self._named(name, record, snapshot)
            self._write(name, replace(record, top=self._overlay(name, below)))
        return self.collect()

    def _switch(self, name: str, record: Record, layer: str, monitor: Monitor) -> None:
        """Let the running VM write into the new layer from now on; on failure the intent is withdrawn."""
        try:
            blocks.put_on_top(monitor, self._layers / record.top, self._layers / layer)
        except MonitorError as error:
            if is_written(self._layers / layer):  # the answer was lost, the deed was done
                return
            self._write(name, record)
            raise DiskError(str(error)) from error

    @staticmethod
    def _after(record: Record, snapshot: str, layer: str) -> Record:
        return Record(layer, record.parent, {**record.snapshots, snapshot: record.top})

    # Collecting

    def collect(self, monitor: Monitor | None = None) -> list[str]:
        """Remove or merge the layers that nobody names; answers what was done, a line each.

        A layer whose only child a running VM uses is left for a later call, unless `monitor` is that VM's. Collecting
        is tidying up after work that is done, so what hinders it is logged and no error.
        """
        done: list[str] = []
        busy: set[str] = set()
        with self._collecting:
            try:
                while self._collect_one(monitor, busy, done):
                    pass
            except DiskError as error:
                log.warning("layers of '%s' are left for later: %s", self.name, error)
        return done

    def _collect_one(self, monitor: Monitor | None, busy: set[str], done: list[str]) -> bool:
        """Remove every layer without a child, or merge one; whether there may be more to do."""
        with self._lock:
            children = self._children()
            named: set[str] = set().union(*(record.layers() for record in self._records().values()))
            loose = sorted(children.keys() - named - busy)
            leaves = [layer for layer in loose if not children[layer]]
            for layer in leaves:
                (self._layers / layer).unlink()
                done.append(f"removed layer '{layer}'")
        single = next((layer for layer in loose if len(children[layer]) == 1), None)
        if leaves or single is None:
            return bool(leaves)
        if self._merge(single, children[single][0], monitor):
            done.append(f"merged layer '{single}' into '{children[single][0]}'")
        else:
            busy.add(single)
        return True

    def _merge(self, layer: str, child: str, monitor: Monitor | None) -> bool:
        gone, target = self._layers / layer, self._layers / child
        below = qemu_img.read_header(gone).backing
        try:
            if monitor is None or not blocks.pull_up(monitor, target, gone, self._layers / below if below else None):
                qemu_img.rebase(target, backing=below)
        except (qemu_img.ImageLocked, MonitorError) as error:
            log.info("layer '%s' is merged later: %s", layer, error)
            return False
        return True

    def unnamed_files(self, named: Collection[str]) -> list[Path]:
        with self._lock:
            records = [self._read(name) for name in named if self._file(name).exists()]
            wanted: set[str] = set().union(*(record.layers() for record in records))
            children = self._children()
            while below := {layer for layer, above in children.items() if wanted & set(above)} - wanted:
                wanted |= below
            files = {self._file(name) for name in named}
            left = [path for path in self._volumes.iterdir() if path not in files]
            return left + [path for path in self._layers.iterdir() if path.name not in wanted]

    def recover(self) -> list[str]:
        """Mend what a killed node left half done; see the invariants above."""
        done = [f"removed unfinished '{path.name}'" for path in self._layers.glob("partial-*")]
        for path in (*self._layers.glob("partial-*"), *self._volumes.glob("*.new")):
            path.unlink()
        for name, record in self._records().items():
            if record.pending is None:
                continue
            snapshot, layer = record.pending
            if is_written(self._layers / record.top) and not is_written(self._layers / layer):
                self._write(name, replace(record, pending=None))
                done.append(f"undid snapshot '{snapshot}' of '{name}', to which the VM had not switched")
            else:
                self._write(name, self._after(record, snapshot, layer))
                done.append(f"finished snapshot '{snapshot}' of '{name}'")
        return done + self.collect()

    # The graph

    def _children(self) -> dict[str, list[str]]:
        """Every layer with the layers that lie on it. A header that cannot be read fails it: better keep than lose."""
        children: dict[str, list[str]] = {}
        for path in sorted(self._layers.iterdir()):
            if path.name.startswith("partial-"):
                continue
            children.setdefault(path.name, [])
            if format_of(path) == "qcow2" and (below := qemu_img.read_header(path).backing) is not None:
                children.setdefault(below, []).append(path.name)
        return children

    def _overlay(self, name: str, below: str) -> str:
        """Make a layer on top of another. Call it under the lock: until the JSON names it, `collect` may remove it."""
        layer = self._layer_name(name, "qcow2")
        with partial_file(self.partial()) as partial:
            qemu_img.create_overlay(partial, backing=below, backing_format="qcow2", size=self._size(below))
            sync(partial)
            partial.rename(self._layers / layer)
        return layer

    def _layer_name(self, name: str, format: str) -> str:
        return f"{name}.{secrets.token_hex(4)}.{format}"

    def _size(self, layer: str) -> int:
        path = self._layers / layer
        return path.stat().st_size if format_of(path) == "raw" else qemu_img.read_header(path).size

    # The records

    def _file(self, name: str) -> Path:
        return self._volumes / f"{parse_thin_name(name).name}.json"

    def _read(self, name: str) -> Record:
        try:
            value = json.loads(self._file(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DiskError(f"no such logical volume '{self.name}:{name}'") from None
        pending = value.get("pending")
        return Record(value["top"], value["parent"], value["snapshots"], tuple(pending) if pending else None)

    def _write(self, name: str, record: Record) -> None:
        write_durably(self._file(name), asdict(record))

    def _records(self) -> dict[str, Record]:
        return {path.stem: self._read(path.stem) for path in self._volumes.glob("*.json")}

    def _idle(self, name: str) -> Record:
        """The record of a volume that no running VM writes to."""
        record = self._read(name)
        if is_written(self._layers / record.top):
            raise DiskError(f"volume '{self.name}:{name}' is in use by a running VM")
        return record

    def _named(self, name: str, record: Record, snapshot: str) -> str:
        if snapshot not in record.snapshots:
            raise DiskError(f"snapshot '{snapshot}' of volume '{self.name}:{name}' does not exist")
        return record.snapshots[snapshot]

    def _free_name(self, vmid: int, name: str | None) -> str:
        if name is None:
            taken = {path.stem.partition("-")[2] for path in self._volumes.glob("*.json")}
            return next(f"vm-{vmid}-disk-{n}" for n in range(10_000) if f"{vmid}-disk-{n}" not in taken)
        if parse_thin_name(name).vmid != vmid:
            raise DiskError(f"illegal name '{name}' - should be 'vm-{vmid}-*'")
        if self._file(name).exists():
            raise DiskError(f"volume '{self.name}:{name}' already exists")
        return name

    def _describe(self, name: str, record: Record) -> Volume:
        files = [self._layers / layer for layer in record.layers()]
        used = sum(path.stat().st_blocks * 512 for path in files if path.exists())
        ctime = int(self._file(name).stat().st_mtime)
        vmid = parse_thin_name(name).vmid
        volid = f"{self.name}:{name}"
        return Volume(volid, self.name, "raw", self._size(record.top), used, vmid, record.parent, "images", ctime)


def _without(snapshots: dict[str, str], name: str) -> dict[str, str]:
    return {each: layer for each, layer in snapshots.items() if each != name}
