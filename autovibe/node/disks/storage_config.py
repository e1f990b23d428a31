"""`storage.cfg`: which storages there are and what each may hold, in Proxmox's own form of sections.

    dir: local
            path local
            content images,iso

A path is written relative to the folder of all storages, so that the node's home can be moved, and told absolute.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autovibe.node.files import replace_durably
from autovibe.node.refusal import Refusal

_DEFAULTS = """dir: local
\tpath local
\tcontent images,import,iso,snippets,vztmpl

lvmthin: local-lvm
\tthinpool data
\tvgname pve
\tcontent images,rootdir

"""
_SECTION = re.compile(r"(\w+):\s+(\S+)\s*")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FLAGS = ("create-base-path", "create-subdirs", "disable", "mkdir", "shared")
_COMMON = ("content", "disable", "nodes", "bwlimit")
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "dir": (
        *_COMMON,
        *("create-base-path", "create-subdirs", "format", "max-protected-backups", "mkdir", "path", "preallocation"),
        *("prune-backups", "shared"),
    ),
    "lvmthin": (*_COMMON, "thinpool", "vgname"),
}
_FIXED: Mapping[str, tuple[str, ...]] = {"dir": ("path",), "lvmthin": ("thinpool", "vgname")}
_HOLDS: Mapping[str, tuple[str, ...]] = {
    "dir": ("images", "rootdir", "vztmpl", "iso", "backup", "snippets", "none", "import"),
    "lvmthin": ("images", "rootdir", "none"),
}


def _split(text: str) -> list[str]:
    return [item for item in re.split(r"[,;\s]+", text) if item]


@dataclass(frozen=True)
class Section:
    """One storage; `values` are strings as stored."""

    name: str
    type: str
    values: Mapping[str, str] = field(default_factory=dict)

    @property
    def content(self) -> tuple[str, ...]:
        default = "images,rootdir" if self.type == "lvmthin" else "images,rootdir,vztmpl,iso,backup,snippets"
        return tuple(_split(self.values.get("content", default)))

    @property
    def is_disabled(self) -> bool:
        return self.values.get("disable") == "1"

    def is_on(self, node: str) -> bool:
        """Whether the node is among those the storage is restricted to, if it is restricted."""
        return "nodes" not in self.values or node in _split(self.values["nodes"])


class StorageConfig:
    """The sections below `root`, the folder of all storages. Refusals are those of Proxmox's `/storage`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._file = root / "storage.cfg"
        self._lock = threading.RLock()
        self.digest = ""
        self.sections: dict[str, Section] = {}
        self._load()

    def require(self, name: str) -> Section:
        try:
            return self.sections[name]
        except KeyError:
            raise Refusal(f"storage '{name}' does not exist") from None

    def path(self, section: Section) -> Path:
        """Where a storage's files lie."""
        return self._root / (section.values["path"] if section.type == "dir" else section.name)

    def describe(self, section: Section) -> dict[str, Any]:
        """A section as the API gives it."""
        found: dict[str, Any] = {
            key: int(text) if key in (*_FLAGS, "max-protected-backups") else text
            for key, text in section.values.items()
        }
        if section.type == "dir":
            found["path"] = str(self.path(section))
        content = ",".join(section.content)
        return {**found, "storage": section.name, "type": section.type, "content": content, "digest": self.digest}

    # Changing

    def create(self, name: str, kind: str, given: Mapping[str, str]) -> Section:
        with self._lock:
            _check_options(kind, given, is_new=True)
            if name in self.sections:
                raise Refusal(f"create storage failed: storage ID '{name}' already defined")
            try:
                section = Section(name, kind, self._values(name, kind, given))
            except Refusal as refusal:
                raise Refusal(f"create storage failed: {refusal}") from None
            self._save({**self.sections, name: section})
            return section

    def update(self, name: str, given: Mapping[str, str], delete: str, digest: str | None) -> Section:
        with self._lock:
            try:
                section = self._updated(name, given, _split(delete), digest)
            except Refusal as refusal:
                raise Refusal(f"update storage failed: {refusal}") from None
            self._save({**self.sections, name: section})
            return section

    def delete(self, name: str) -> None:
        """Forget a storage; its files stay. `local` is there again at once, as a fresh one is."""
        with self._lock:
            if name not in self.sections:
                raise Refusal(f"delete storage failed: storage '{name}' does not exist")
            self._save({key: section for key, section in self.sections.items() if key != name})

    def _updated(self, name: str, given: Mapping[str, str], delete: list[str], digest: str | None) -> Section:
        if digest is not None and digest != self.digest:
            raise Refusal("detected modified configuration - file changed by other user? Try again.")
        section = self.require(name)
        _check_options(section.type, given, is_new=False)
        for key in delete:
            if key not in _OPTIONS[section.type]:
                raise Refusal(f"no such option '{key}'")
            if key in _FIXED[section.type]:
                raise Refusal(f"unable to delete required option '{key}'")
            if key in given:
                raise Refusal(f"cannot set and delete property '{key}' at the same time!")
        kept = {key: text for key, text in section.values.items() if key not in delete}
        return Section(name, section.type, {**kept, **given})

    def _values(self, name: str, kind: str, given: Mapping[str, str]) -> dict[str, str]:
        if kind == "dir":
            must_exist = "0" in (given.get("mkdir"), given.get("create-base-path"))
            return {**given, "path": self._confined(name, given["path"], must_exist=must_exist)}
        volume = f"{given['vgname']}/{given['thinpool']}"
        if (name, volume) != ("local-lvm", "pve/data"):
            raise Refusal(f"no such logical volume {volume}")
        return dict(given)

    def _confined(self, name: str, text: str, *, must_exist: bool) -> str:
        """A path as it is stored. It lies below the folder of all storages, on no link, and on no other storage."""
        path = Path(text)
        parts = path.relative_to(self._root).parts if path.is_relative_to(self._root) else ()
        if not parts or not all(_PART.fullmatch(part) for part in parts) or path.resolve() != path:
            raise Refusal(
                f"unable to activate storage '{name}' - directory '{text}' is not below '{self._root}', "
                "where this node keeps its storages"
            )
        taken = {"local", "local-lvm"} - {name}
        taken |= {self.path(other).relative_to(self._root).as_posix() for other in self.sections.values()}
        stored = "/".join(parts)
        if any(f"{stored}/".startswith(f"{other}/") or f"{other}/".startswith(f"{stored}/") for other in taken):
            raise Refusal(f"unable to activate storage '{name}' - directory '{text}' belongs to another storage")
        if not path.is_dir() and (must_exist or path.exists()):
            raise Refusal(f"unable to activate storage '{name}' - directory '{text}' does not exist or is unreachable")
        return stored

    # On disk

    def _load(self) -> None:
        with self._lock:
            text = self._file.read_text(encoding="utf-8") if self._file.exists() else None
            self.digest = hashlib.sha1((text or "").encode()).hexdigest()  # noqa: S324 - Proxmox's digest
            self.sections = parse(_DEFAULTS if text is None else text)
            if "local" not in self.sections:
                self.sections = {"local": parse(_DEFAULTS)["local"], **self.sections}

    def _save(self, sections: Mapping[str, Section]) -> None:
        replace_durably(self._file, render(sections))
        self._load()


def _check_options(kind: str, given: Mapping[str, str], *, is_new: bool) -> None:
    for key in given:
        if key not in _OPTIONS[kind]:
            raise Refusal(f"unexpected property '{key}'")
        if not is_new and key in _FIXED[kind]:
            raise Refusal(f"can't change value of fixed parameter '{key}'")
    for key in _FIXED[kind] if is_new else ():
        if key not in given:
            raise Refusal(f"missing value for required option '{key}'")
    for content in _split(given.get("content", "")):
        if content not in _HOLDS[kind]:
            raise Refusal(f"storage does not support content type '{content}'")


def parse(text: str) -> dict[str, Section]:
    """The sections of a file, in its order; lines that are none are dropped, as are types the node has not."""
    found: dict[str, dict[str, str]] = {}
    kinds: dict[str, str] = {}
    values: dict[str, str] = {}
    for line in text.split("\n"):
        if match := _SECTION.fullmatch(line):
            kinds[match[2]] = match[1]
            values = found[match[2]] = {}
        elif line[:1] in ("\t", " ") and line.strip():
            key, _, value = line.strip().partition(" ")
            values[key] = value.strip()
    return {name: Section(name, kinds[name], values) for name, values in found.items() if kinds[name] in _OPTIONS}


def render(sections: Mapping[str, Section]) -> str:
    """The file's text."""
    blocks = []
    for name, section in sections.items():
        lines = [f"\t{key} {text}\n" for key, text in section.values.items()]
        blocks.append(f"{section.type}: {name}\n{''.join(lines)}\n")
    return "".join(blocks)
