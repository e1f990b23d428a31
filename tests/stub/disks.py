"""Disks that are directory trees: a snapshot is a copy of the tree, a clone too."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autovibe.node.disks import DiskError, Volume
from autovibe.node.disks.storage_config import StorageConfig

GIB = 1 << 30
_VOLID = re.compile(r"^(local|local-lvm):(?:\d+/)?([A-Za-z0-9._-]+?)(?:\.qcow2|\.raw)?$")


def _copy(source: Path, target: Path) -> None:
    half = target.with_name(target.name + ".half")
    shutil.rmtree(half, ignore_errors=True)
    half.parent.mkdir(parents=True, exist_ok=True)
    # A file may vanish under a running guest: what a snapshot of a live disk would also not hold.
    subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(half)], capture_output=True, check=False)
    half.rename(target)


class StubDisks:
    """`base` is the tree an imported image becomes; `delays` maps a verb to the seconds it takes on real storage."""

    def __init__(self, root: Path, base: Path, delays: dict[str, float] | None = None) -> None:
        self.root, self.base, self.delays = root, base, delays or {}
        root.mkdir(parents=True, exist_ok=True)
        self.configuration = StorageConfig(root)
        for storage in ("local", "local-lvm"):
            (root / storage / "volumes").mkdir(parents=True, exist_ok=True)
        for content in ("import", "template/iso", "snippets"):
            (root / "local" / content).mkdir(parents=True, exist_ok=True)

    def _take_time(self, verb: str) -> None:
        time.sleep(self.delays.get(verb, 0))

    def _place(self, volid: str) -> Path:
        match = _VOLID.match(volid)
        if not match:
            raise DiskError(f"unable to parse volume ID '{volid}'")
        return self.root / match[1] / "volumes" / match[2]

    def check_import(self, path: Path, format: str) -> None:
        """Any file will do: `base` is what it becomes."""

    def statuses(self) -> list[dict[str, Any]]:
        usage = shutil.disk_usage(self.root)
        kinds = {"local": ("dir", "import,iso,snippets,vztmpl,images"), "local-lvm": ("lvmthin", "images,rootdir")}
        return [
            {
                "storage": name,
                "type": kind,
                "content": content,
                "active": 1,
                "enabled": 1,
                "shared": 0,
                "total": usage.total,
                "used": usage.used,
                "avail": usage.free,
                "used_fraction": usage.used / usage.total,
            }
            for name, (kind, content) in kinds.items()
        ]

    def size(self, volid: str) -> int:
        return self._size(self._place(volid))

    def snapshots(self, volid: str) -> list[str]:
        place = self._place(volid) / "snapshots"
        return sorted(item.name for item in place.iterdir() if item.suffix != ".half") if place.is_dir() else []

    def path(self, volid: str, *, must_exist: bool = True) -> Path:
        storage, _, rest = volid.partition(":")
        for prefix, directory in (("import/", "import"), ("iso/", "template/iso"), ("snippets/", "snippets")):
            if storage == "local" and rest.startswith(prefix):
                return self.root / "local" / directory / Path(rest).name
        place = self._place(volid)
        return place / "disk.iso" if "cloudinit" in place.name else place / "tree"

    def volumes(self, storage: str, *, content: str | None = None, vmid: int | None = None) -> list[Volume]:
        found = []
        if storage == "local" and content in (None, "import"):
            for file in sorted((self.root / "local" / "import").iterdir()):
                if file.suffix != ".half":
                    size = file.stat().st_size
                    found.append(
                        Volume(
                            f"local:import/{file.name}",
                            storage,
                            "qcow2",
                            size,
                            size,
                            None,
                            None,
                            "import",
                            int(file.stat().st_mtime),
                        )
                    )
        if content not in (None, "images"):
            return found
        for place in sorted((self.root / storage / "volumes").iterdir()):
            owner = re.match(r"(?:vm|base)-(\d+)-", place.name)
            if owner and (vmid is None or int(owner[1]) == vmid):
                found.append(
                    Volume(
                        f"{storage}:{place.name}",
                        storage,
                        "raw",
                        self._size(place),
                        0,
                        int(owner[1]),
                        None,
                        "images",
                        int(place.stat().st_mtime),
                    )
                )
        return found

    def _size(self, place: Path) -> int:
        file = place / "size"
        return int(file.read_text()) if file.exists() else 8 * GIB

    def _fresh_name(self, storage: str, vmid: int) -> str:
        volumes = self.root / storage / "volumes"
        number = 0
        while any((volumes / f"{kind}-{vmid}-disk-{number}").exists() for kind in ("vm", "base")):
            number += 1
        return f"vm-{vmid}-disk-{number}"

    def allocate(
        self,
        storage: str,
        vmid: int,
        *,
        size: int,
        name: str | None = None,
        format: str | None = None,
    ) -> str:
        name = (name or self._fresh_name(storage, vmid)).removesuffix(".qcow2").removesuffix(".raw")
        place = self.root / storage / "volumes" / name
        if place.exists():
            raise DiskError(f"disk image '{place}' already exists")
        place.mkdir()
        (place / "size").write_text(str(size))
        if "cloudinit" in name:
            (place / "disk.iso").write_bytes(b"")
        else:
            (place / "tree").mkdir()
        return f"{storage}:{name}"

    def allocate_state(self, storage: str, vmid: int, name: str, *, size: int, needed: int) -> str:
        return self.allocate(storage, vmid, size=size, name=f"vm-{vmid}-state-{name}")

    def import_image(self, storage: str, vmid: int, source: Path, *, progress: Callable[[str], None]) -> str:
        if not source.is_file():
            raise DiskError(f"volume '{source.name}' does not exist")
        self._take_time("import")
        name = self._fresh_name(storage, vmid)
        place = self.root / storage / "volumes" / name
        place.mkdir()
        _copy(self.base, place / "tree")
        progress("transferred 100.00%")
        return f"{storage}:{name}"

    def free(self, volid: str) -> None:
        storage, _, rest = volid.partition(":")
        if storage == "local" and rest.startswith(("import/", "iso/", "snippets/")):
            self.path(volid).unlink(missing_ok=True)
            return
        self._take_time("free")
        shutil.rmtree(self._place(volid), ignore_errors=True)

    def resize(self, volid: str, size: int, *, monitor: Any) -> None:
        if size < self._size(self._place(volid)):
            raise DiskError("shrinking disks is not supported")
        (self._place(volid) / "size").write_text(str(size))

    def make_base(self, volid: str) -> str:
        place = self._place(volid)
        base = place.with_name(place.name.replace("vm-", "base-", 1))
        place.rename(base)
        return f"{volid.partition(':')[0]}:{base.name}"

    def clone(self, volid: str, vmid: int, *, snapshot: str | None) -> str:
        self._take_time("clone")
        return self._duplicate(volid, vmid, volid.partition(":")[0], snapshot)

    def copy(
        self,
        volid: str,
        vmid: int,
        *,
        storage: str,
        snapshot: str | None,
        format: str | None,
        progress: Callable[[str], None],
        monitor: Any,
        limit: int = 0,
    ) -> str:
        self._take_time("copy")
        if "cloudinit" in volid:
            return self.allocate(storage, vmid, size=self.size(volid), name=f"vm-{vmid}-cloudinit")
        return self._duplicate(volid, vmid, storage, snapshot)

    def copy_running(self, volids: list[str], vmid: int, *, storage: str | None, still: Any, **_: Any) -> list[str]:
        self._take_time("copy")
        with still():
            return [self._duplicate(volid, vmid, storage or volid.partition(":")[0], None) for volid in volids]

    def _duplicate(self, volid: str, vmid: int, storage: str, snapshot: str | None) -> str:
        source = self._place(volid)
        tree = source / "snapshots" / snapshot if snapshot else source / "tree"
        if not tree.is_dir():
            raise DiskError(f"snapshot '{snapshot}' does not exist")
        name = self._fresh_name(storage, vmid)
        place = self.root / storage / "volumes" / name
        place.mkdir()
        (place / "size").write_text(str(self._size(source)))
        _copy(tree, place / "tree")
        return f"{storage}:{name}"

    def snapshot(self, volid: str, name: str, *, monitor: Any) -> None:
        self._take_time("snapshot")
        if (self._place(volid) / "tree").is_dir():
            _copy(self._place(volid) / "tree", self._place(volid) / "snapshots" / name)

    def delete_snapshot(self, volid: str, name: str, *, monitor: Any) -> None:
        shutil.rmtree(self._place(volid) / "snapshots" / name, ignore_errors=True)

    def rollback(self, volid: str, name: str) -> None:
        tree = self._place(volid) / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        _copy(self._place(volid) / "snapshots" / name, tree)

    def has_feature(self, volid: str, feature: str, *, snapshot: str | None, is_running: bool) -> bool:
        is_thin, is_base = volid.startswith("local-lvm:"), self._place(volid).name.startswith("base-")
        if feature == "clone":
            return is_base or (is_thin and snapshot is not None)
        return feature in ("snapshot", "copy") and not (feature == "snapshot" and is_base)

    def recover(self) -> list[str]:
        lines = []
        for half in self.root.glob("*/volumes/*/**/*.half"):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(half)
                lines.append(f"removed {half.name}")
        return lines
