"""Files into a guest and out of it.

`push` sends one tar stream to `programs/place.py`, which writes everything beside its place first and renames it only
when all of it arrived: all or none. A path is absolute and normalised, and no link that a user of the guest could have
made leads it elsewhere.
"""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autovibe.errors import InvalidRequest, NotFound
from autovibe.guest import program
from autovibe.guest.links import Address

if TYPE_CHECKING:
    from autovibe.guest.pool import Guests

_OWNER = re.compile(r"^[a-z_][a-z0-9_-]{0,31}(:[a-z_][a-z0-9_-]{0,31})?$")
_MOST_PATH_BYTES = 4095
_NO_FILE = 66  # EX_NOINPUT
# $1 is the path and $2 the limit; a fifo or device is not opened.
_PULL = 'if [ ! -f "$1" ]; then [ -e "$1" ] && echo "it is no regular file" >&2; exit 66; fi; exec head -c "$2" -- "$1"'


@dataclass(frozen=True)
class File:
    """What shall be at `path`: `content`, or nothing at all when it is None (a missing file is deleted already).

    `mode` None keeps that of the file it replaces, else 0644; `owner` ("user" or "user:group") None keeps the owner of
    the file it replaces, else the owner of the nearest directory that is there, whose missing children are made.
    """

    path: str
    content: bytes | None
    mode: int | None = None
    owner: str | None = None


def checked_path(path: str) -> str:
    """`path` itself. Raises InvalidRequest unless it is absolute, normalised, and names something below the root."""
    if not path.startswith("/") or "\0" in path:
        raise InvalidRequest(f"The path '{path[:200]}' is not absolute.", details={"path": path[:200]})
    if posixpath.normpath(path) != path or path == "/" or path.startswith("//"):
        raise InvalidRequest(
            f"The path '{path[:200]}' is not normalised: write it without '..', '.', '//' and a final '/'.",
            details={"path": path[:200]},
        )
    encoded = path.encode("utf-8", "surrogateescape")
    if len(encoded) > _MOST_PATH_BYTES or any(len(part) > 255 for part in encoded.split(b"/")):
        raise InvalidRequest(f"The path '{path[:60]}…' is too long.", details={"path": path[:200]})
    return path


def push(guests: Guests, address: Address, files: Sequence[File], *, timeout_seconds: float = 300) -> None:
    """Put files in their places as root, all or none. Raises InvalidRequest for a path or owner that cannot be,
    GuestCommandFailed with the guest's words when one cannot be placed (no such user, a link in the way, a full
    disk).
    """
    if not files:
        return
    archive = _archive(files)
    program.run(guests, address, "place", {"files": len(files)}, payload=archive, timeout_seconds=timeout_seconds)


def pull(guests: Guests, address: Address, path: str, limit: int, *, user: str = "root") -> bytes:
    """The content of a regular file. Raises NotFound when there is none, InvalidRequest when it is above `limit`."""
    argv = ["sh", "-c", _PULL, "sh", checked_path(path), str(limit + 1)]
    result = guests.exec(address, argv, user=user, output_limit=limit + 1)
    if result.exit_status == _NO_FILE:
        why = ", it is no regular file" if result.stderr else ""
        raise NotFound(f"The machine has no file '{path}'{why}.", details={"path": path})
    if result.exit_status != 0:
        raise program.command_failure(["read", path], address, result)
    if len(result.stdout) > limit:
        raise InvalidRequest(f"The file '{path}' is larger than {limit} bytes.", details={"path": path, "limit": limit})
    return result.stdout


def _archive(files: Sequence[File]) -> bytes:
    """A pax archive; what tar has no word for travels as AUTOVIBE.* in the headers."""
    seen: set[str] = set()
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for file in files:
            path = checked_path(file.path)
            if path in seen:
                raise InvalidRequest(f"The path '{path}' is given twice.", details={"path": path})
            seen.add(path)
            member = tarfile.TarInfo(path.lstrip("/"))
            member.size = len(file.content or b"")
            if file.mode is not None and not 0 <= file.mode <= 0o7777:
                raise InvalidRequest(f"The mode of '{path}' is none between 0 and 07777.", details={"path": path})
            if file.owner is not None and not _OWNER.match(file.owner):
                raise InvalidRequest(f"The owner of '{path}' is no 'user' or 'user:group'.", details={"path": path})
            member.pax_headers = {"AUTOVIBE.path": path}
            if file.content is None:
                member.pax_headers["AUTOVIBE.delete"] = "1"
            if file.mode is not None:
                member.pax_headers["AUTOVIBE.mode"] = f"{file.mode:o}"
            if file.owner is not None:
                member.pax_headers["AUTOVIBE.owner"] = file.owner
            archive.addfile(member, io.BytesIO(file.content or b""))
    return target.getvalue()
