"""Configurations of VMs in Proxmox's own form: one `<vmid>.conf` each.

The current configuration comes first (its description as `#` lines), then `[PENDING]` (what a running VM gets at its
next start; `delete:` for what it loses, a `!` before disks that go with their volumes), then a section per snapshot.
`digest` is the SHA-1 of the file. A file is replaced by rename after an fsync, so that it is always whole. One node
writes a home (flock), so reads are cached.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from autovibe.node.files import create_durably, replace_durably, sync_directory
from autovibe.node.refusal import Refusal

_FILE = re.compile(r"([1-9]\d{2,8})\.conf")
_SECTION = re.compile(r"\[([A-Za-z][\w-]*)\]\s*")
SNAPSHOT_KEYS = ("parent", "snaptime", "snapstate", "vmstate", "runningmachine", "runningcpu", "running-nets-host-mtu")
"""Keys of a snapshot's section that are no part of the configuration it keeps."""


@dataclass
class Config:
    """One VM's configuration; `values` are strings as stored. The disks of `forced` deletions go with their volumes."""

    values: dict[str, str] = field(default_factory=dict)
    pending: dict[str, str] = field(default_factory=dict)
    deletions: list[str] = field(default_factory=list)
    forced: list[str] = field(default_factory=list)
    snapshots: dict[str, dict[str, str]] = field(default_factory=dict)
    digest: str = ""

    def get(self, key: str, default: str = "") -> str:
        return self.values.get(key, default)

    def has(self, key: str) -> bool:
        """Whether a flag is set."""
        return self.values.get(key) == "1"

    @property
    def is_template(self) -> bool:
        return self.has("template")

    @property
    def effective(self) -> dict[str, str]:
        """The values with what is pending applied: what the VM has after its next start."""
        kept = {key: value for key, value in self.values.items() if key not in self.deletions}
        return {**kept, **self.pending}

    def check_lock(self) -> None:
        if lock := self.values.get("lock"):
            raise Refusal(f"VM is locked ({lock})")

    def snapshot(self, name: str) -> dict[str, str]:
        """Raises the refusal of an unknown snapshot."""
        if name not in self.snapshots:
            raise Refusal(f"snapshot '{name}' does not exist")
        return self.snapshots[name]

    def copy(self) -> Config:
        snapshots = {name: dict(values) for name, values in self.snapshots.items()}
        deletions = {"deletions": list(self.deletions), "forced": list(self.forced)}
        return Config(dict(self.values), dict(self.pending), **deletions, snapshots=snapshots, digest=self.digest)


def parse(text: str) -> Config:
    """A configuration file's text; lines that are none of ours are dropped, as Proxmox does."""
    config = Config(digest=hashlib.sha1(text.encode()).hexdigest())  # noqa: S324 - Proxmox's digest
    section = config.values
    for line in text.split("\n"):
        if match := _SECTION.fullmatch(line):
            section = config.pending if match[1] == "PENDING" else config.snapshots.setdefault(match[1], {})
        elif line.startswith("#"):
            section["description"] = section.get("description", "") + unquote(line[1:]) + "\n"
        elif ": " in line:
            key, _, value = line.partition(": ")
            section[key] = value
    deletions = [key for key in config.pending.pop("delete", "").split(",") if key]
    config.deletions = [key.removeprefix("!") for key in deletions]
    config.forced = [key[1:] for key in deletions if key.startswith("!")]
    for values in (config.values, config.pending, *config.snapshots.values()):
        if "description" in values:
            values["description"] = values["description"].rstrip()
    return config


def render(config: Config) -> str:
    text = _render_section(config.values)
    if config.pending or config.deletions:
        names = ",".join(f"!{name}" if name in config.forced else name for name in config.deletions)
        text += "\n[PENDING]\n" + _render_section({**config.pending, **({"delete": names} if names else {})})
    for name in sorted(config.snapshots):
        text += f"\n[{name}]\n" + _render_section(config.snapshots[name])
    return text


def _render_section(values: Mapping[str, str]) -> str:
    lines = [f"#{_escape(line)}" for line in values.get("description", "").split("\n") if values.get("description")]
    lines += [f"{key}: {values[key]}" for key in sorted(values) if key != "description"]
    return "".join(f"{line}\n" for line in lines)


def _escape(line: str) -> str:
    """Proxmox's encoding of a description: all but letters, digits and plain punctuation percent-encoded."""
    return re.sub(r"[^ -9;-~]|%", lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), line)


class Configs:
    """The configurations of one node."""

    def __init__(self, directory: Path, node: str) -> None:
        self._directory = directory
        self._node = node
        self._cache: dict[int, tuple[tuple[int, int, int], Config]] = {}
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in directory.glob("*.new"):
            leftover.unlink()

    def path(self, vmid: int) -> Path:
        return self._directory / f"{vmid}.conf"

    def vmids(self) -> list[int]:
        found = (_FILE.fullmatch(path.name) for path in self._directory.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def exists(self, vmid: int) -> bool:
        return self.path(vmid).exists()

    def find(self, vmid: int) -> Config | None:
        """A copy that the caller may change and `save`."""
        path = self.path(vmid)
        try:
            stat = path.stat()
            signature = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            cached = self._cache.get(vmid)
            if cached is None or cached[0] != signature:
                cached = self._cache[vmid] = (signature, parse(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        return cached[1].copy()

    def load(self, vmid: int) -> Config:
        """Raises Proxmox's 500 for a VM that does not exist."""
        config = self.find(vmid)
        if config is None:
            raise Refusal(f"Configuration file 'nodes/{self._node}/qemu-server/{vmid}.conf' does not exist")
        return config

    def create(self, vmid: int, values: Mapping[str, str]) -> bool:
        """Take a vmid; False when it is taken."""
        return create_durably(self.path(vmid), render(Config(dict(values))))

    def save(self, vmid: int, config: Config) -> None:
        text = render(config)
        replace_durably(self.path(vmid), text)
        config.digest = hashlib.sha1(text.encode()).hexdigest()  # noqa: S324

    def delete(self, vmid: int) -> None:
        self.path(vmid).unlink(missing_ok=True)
        self._cache.pop(vmid, None)
        sync_directory(self._directory)
