"""Files that survive a crash: written aside, synced, and renamed into place; secrets are never readable by others."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def sync_directory(directory: Path) -> None:
    """Make renames, new names and deletions in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_aside(path: Path, text: str) -> Path:
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return aside


def replace_durably(path: Path, text: str) -> None:
    """Put a file of mode 0600 in place, whole or not at all."""
    _write_aside(path, text).replace(path)
    sync_directory(path.parent)


def create_durably(path: Path, text: str) -> bool:
    """The same for a new file; False, and nothing done, when the name is taken."""
    aside = _write_aside(path, text)
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    finally:
        aside.unlink()
    sync_directory(path.parent)
    return True


def read_or_create_secret(path: Path, make: str) -> str:
    """The one line of a secret's file; the first time, `make`, written with mode 0600."""
    with contextlib.suppress(FileExistsError):
        if not path.exists():
            create_durably(path, make + "\n")
    return path.read_text(encoding="utf-8").strip()
