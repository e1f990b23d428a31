"""Which files a spawn may place in a guest: absolute, normalised paths on real file systems, within a size."""

from __future__ import annotations

import base64
import binascii
import posixpath
from typing import Any

from autovibe import schemas
from autovibe.errors import InvalidRequest

TOTAL_BYTES = 8 * 1024 * 1024
COUNT = 1000

_NOT_A_DISK = ("/proc", "/sys", "/dev", "/run")  # what the kernel or the boot makes; nothing placed there would stay


def check(modifications: schemas.FileModifications) -> dict[str, Any]:
    """The files as a machine's row keeps them: path -> None (delete) or {content | content_base64, mode, owner}.

    Raises InvalidRequest naming the path and what is wrong with it.
    """
    if len(modifications) > COUNT:
        raise InvalidRequest(f"At most {COUNT} files can be placed, not {len(modifications)}.", details=_FIELD)
    total = 0
    kept: dict[str, Any] = {}
    for path, wanted in modifications.items():
        fault = _fault(path)
        if fault:
            raise InvalidRequest(
                f"The file path '{_printable(path)}' {fault}.", details={**_FIELD, "path": _printable(path)}
            )
        content = schemas.FileContent(content=wanted) if isinstance(wanted, str) else wanted
        kept[path] = None if content is None else content.model_dump(exclude_none=True)
        total += 0 if content is None else _size(path, content)
    if total > TOTAL_BYTES:
        raise InvalidRequest(
            f"The files to place have {total:,} bytes together; at most {TOTAL_BYTES:,} are taken. "
            "Put large data into a repository or a base image.",
            details=_FIELD,
        )
    for path, placed in kept.items():
        parent = posixpath.dirname(path)
        while placed is not None and parent != "/":
            if kept.get(parent) is not None:
                raise InvalidRequest(
                    f"'{_printable(parent)}' cannot be a file and the directory of '{_printable(path)}'.",
                    details=_FIELD,
                )
            parent = posixpath.dirname(parent)
    return kept


_FIELD = {"field": "file_modifications"}


def _fault(path: str) -> str:
    if "\x00" in path:
        return "contains a NUL character"
    if not path.startswith("/"):
        return "is not absolute; begin it with '/'"
    if ".." in path.split("/"):
        return "contains '..'"
    if path == "/" or path.startswith("//") or posixpath.normpath(path) != path:
        return "is not normalised; leave out '.', '//' and a '/' at the end"
    encoded = path.encode(errors="replace")
    if len(encoded) > 4000 or any(len(part) > 255 for part in encoded.split(b"/")):
        return "is too long"
    for place in _NOT_A_DISK:
        if path == place or path.startswith(place + "/"):
            return f"lies in '{place}', where no file lasts"
    return ""


def _size(path: str, content: schemas.FileContent) -> int:
    if content.content is not None:
        return len(content.content.encode())
    try:
        return len(base64.b64decode(content.content_base64 or "", validate=True))
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(
            f"The content of the file '{_printable(path)}' is not valid base64.", details=_FIELD
        ) from error


def _printable(path: str) -> str:
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in path[:200])
