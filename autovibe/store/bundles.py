"""Bundles: a directory of files with a manifest of their sizes and SHA-256, whole or not there.

    <name>.<pid>.partial/   being made by that process
    <name>/                 sealed: every file is named by manifest.json, and all of it is on the disk

Directories are of mode 0700, files of mode 0600.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from autovibe.errors import NotFound, OperationFailed
from autovibe.store.copies import create_privately, sync

MANIFEST = "manifest.json"
FORMAT = 1
_CHUNK_BYTES = 1 << 20


class BundleFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    sha256: str


class Manifest(BaseModel):
    """What a bundle holds, by path relative to it; `facts` is what its maker says of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    facts: dict[str, Any]
    files: dict[str, BundleFile]

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files.values())


def begin(target: Path) -> Path:
    """An empty directory in which this process makes the bundle `target`; what dead ones left of it is gone."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in partials_of(target):
        if not Path("/proc", left.suffixes[-2].lstrip(".")).exists():
            shutil.rmtree(left, ignore_errors=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    return partial


def partials_of(target: Path) -> list[Path]:
    """What is being made of a bundle, or was when its process died."""
    return sorted(target.parent.glob(f"{target.name}.*.partial"))


def put(partial: Path, name: str, source: Path) -> None:
    """Copy one file into the bundle that is being made."""
    target = place_for(partial, name)
    with source.open("rb") as origin, target.open("r+b") as copy:
        shutil.copyfileobj(origin, copy, _CHUNK_BYTES)
    sync(target)


def place_for(partial: Path, name: str) -> Path:
    """An empty private file of that name in the bundle that is being made."""
    target = partial / name
    for parent in reversed(target.relative_to(partial).parents):
        (partial / parent).mkdir(mode=0o700, exist_ok=True)
    create_privately(target)
    return target


def seal(partial: Path, target: Path, facts: dict[str, Any]) -> Manifest:
    """Write the manifest of what `begin` began and give it its name: from now on it is there."""
    files = {
        path.relative_to(partial).as_posix(): BundleFile(size=path.stat().st_size, sha256=digest_of(path))
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    manifest = Manifest(format=FORMAT, facts=facts, files=files)
    place = place_for(partial, MANIFEST)
    place.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    sync(place)
    for directory in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync(directory)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    sync(target.parent)
    return manifest


def look(bundle: Path) -> Manifest:
    """The manifest of a sealed bundle. Raises NotFound where there is none, OperationFailed for one that is none."""
    try:
        text = (bundle / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFound(f"'{bundle}' holds no checkpoint of a Hub: there is no '{MANIFEST}' in it.") from error
    try:
        manifest = Manifest.model_validate_json(text)
    except (ValidationError, UnicodeDecodeError) as error:
        raise OperationFailed(f"The manifest of '{bundle}' is damaged: {error}.") from error
    if manifest.format != FORMAT:
        raise OperationFailed(f"'{bundle}' is of format {manifest.format}; this autovibe reads format {FORMAT}.")
    return manifest


def verify(bundle: Path) -> Manifest:
    """Read every file of a bundle. Raises OperationFailed naming what is missing, changed or too much."""
    manifest = look(bundle)
    wrong = []
    for name, file in manifest.files.items():
        path = bundle / name
        if not _is_plain(name) or not path.resolve().is_relative_to(bundle.resolve()):
            wrong.append(f"'{name}' lies outside of it")
        elif not path.is_file() or path.is_symlink():
            wrong.append(f"'{name}' is missing")
        elif path.stat().st_size != file.size or digest_of(path) != file.sha256:
            wrong.append(f"'{name}' was changed")
    found = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if not path.is_dir()}
    wrong += [f"'{name}' is not of it" for name in sorted(found - set(manifest.files) - {MANIFEST})]
    if wrong:
        raise OperationFailed(
            f"The checkpoint in '{bundle}' is not as it was made: {', '.join(wrong[:10])}.", details={"wrong": wrong}
        )
    return manifest


def _is_plain(name: str) -> bool:
    """Whether the name means the same place below any directory: `home/../x` lies in the bundle, and beside a home."""
    pure = PurePosixPath(name)
    return not pure.is_absolute() and ".." not in pure.parts and pure.as_posix() == name


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(partial: Path, name: str, value: Any) -> None:
    place_for(partial, name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
