"""Puts the files of a tar stream in their places: all or none. Runs in the guest as root; answers one JSON object.

Standard input: one line of JSON (how many files to expect), then a pax archive made by `files._archive`.
"""

from __future__ import annotations

import errno
import grp
import json
import os
import pwd
import resource
import secrets
import stat
import sys
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from typing import IO

CHUNK = 1 << 20
TRUSTED = (0, os.geteuid())


class Refused(Exception):
    """What cannot be placed, in words for a person."""


class Directories:
    """Directories by path, open; those that were made for this can be taken back."""

    def __init__(self) -> None:
        self.open: dict[str, int] = {}
        self.made: list[tuple[int, str]] = []

    def parent_of(self, path: str, making: bool) -> int | None:
        """The directory of `path`; None when it is not there and nothing shall be made.

        Links are followed only where root alone can have made them (/lib, /var/run): one in a user's directory could
        lead a write as root anywhere.
        """
        parent = os.path.dirname(path)
        if parent in self.open:
            return self.open[parent]
        todo = [part for part in reversed(parent.split("/")) if part]
        current = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
        followed = 0
        while todo:
            part = todo.pop()
            try:
                following = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=current)
            except FileNotFoundError:
                if not making:
                    return None
                following = self.make(current, part)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                followed += 1
                target = trusted_target(current, part, path, followed)
                todo.extend(part for part in reversed(target.split("/")) if part not in ("", "."))
                following = os.open(
                    "/" if target.startswith("/") else ".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=current
                )
            current = following
        self.open[parent] = current
        return current

    def make(self, parent: int, name: str) -> int:
        owner = os.fstat(parent)
        os.mkdir(name, 0o755, dir_fd=parent)
        self.made.append((parent, name))
        made = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        if os.geteuid() == 0:
            os.fchown(made, owner.st_uid, owner.st_gid)
        os.fchmod(made, 0o755)
        return made

    def take_back(self) -> None:
        for parent, name in reversed(self.made):
            with suppress(OSError):  # somebody has put something into it
                os.rmdir(name, dir_fd=parent)


def trusted_target(parent: int, name: str, path: str, followed: int) -> str:
    found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if not stat.S_ISLNK(found.st_mode):
        raise Refused(f"'{path}' leads through '{name}', which is no directory")
    holder = os.fstat(parent)
    if found.st_uid not in TRUSTED or holder.st_uid not in TRUSTED or holder.st_mode & 0o022 or followed > 40:
        raise Refused(f"'{path}' leads through '{name}', a link that a user could have made")
    return os.readlink(name, dir_fd=parent)


def owner_ids(owner: str, path: str) -> tuple[int, int]:
    user, _, group = owner.partition(":")
    try:
        found = pwd.getpwnam(user)
        return found.pw_uid, grp.getgrnam(group).gr_gid if group else found.pw_gid
    except KeyError:
        raise Refused(f"'{path}' shall belong to '{owner}', and there is no such user or group here") from None


def existing(parent: int, path: str) -> os.stat_result | None:
    """What is at the path now; a directory is refused."""
    try:
        found = os.stat(os.path.basename(path), dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise Refused(f"'{path}' is a directory")
    return found


def write_beside(parent: int, path: str, source: IO[bytes] | None, headers: Mapping[str, str]) -> str:
    """Write the content to a new file in the same directory, with its final mode and owner; returns its name."""
    before = existing(parent, path)
    is_file = before is not None and stat.S_ISREG(before.st_mode)
    model = before if before is not None and is_file else os.fstat(parent)
    uid, gid = model.st_uid, model.st_gid
    mode = stat.S_IMODE(model.st_mode) if is_file else 0o644
    if "AUTOVIBE.owner" in headers:
        uid, gid = owner_ids(headers["AUTOVIBE.owner"], path)
    if "AUTOVIBE.mode" in headers:
        mode = int(headers["AUTOVIBE.mode"], 8)
    temporary = f".{secrets.token_hex(8)}.autovibe"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            while source is not None and (piece := source.read(CHUNK)):
                file.write(piece)
            file.flush()
            if (uid, gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), uid, gid)
            os.fchmod(file.fileno(), mode)
    except BaseException:
        os.unlink(temporary, dir_fd=parent)
        raise
    return temporary


class Placement:
    """What is written beside its place, and what shall go; nothing is visible before `finish`."""

    def __init__(self) -> None:
        self.directories = Directories()
        self.written: list[tuple[int, str, str]] = []
        self.deleted: list[tuple[int, str]] = []
        self.count = 0

    def take(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self.count += 1
        headers = member.pax_headers
        path = headers["AUTOVIBE.path"]
        if not path.startswith("/") or os.path.normpath(path) != path or path == "/":
            raise Refused(f"'{path}' is no absolute and normalised path")
        is_deletion = "AUTOVIBE.delete" in headers
        parent = self.directories.parent_of(path, making=not is_deletion)
        if parent is None:
            return
        if is_deletion:
            if existing(parent, path) is not None:
                self.deleted.append((parent, os.path.basename(path)))
        else:
            temporary = write_beside(parent, path, archive.extractfile(member), headers)
            self.written.append((parent, temporary, os.path.basename(path)))

    def finish(self, expected: int) -> dict[str, int]:
        if self.count != expected:
            raise Refused(f"{self.count} files arrived instead of {expected}")
        for parent, temporary, name in self.written:
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        for parent, name in self.deleted:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=parent)
        return {"written": len(self.written), "deleted": len(self.deleted)}

    def undo(self) -> None:
        for parent, temporary, _ in self.written:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=parent)
        self.directories.take_back()


def main() -> None:
    order = json.loads(sys.stdin.buffer.readline())
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every directory on the way stays open
    placement = Placement()
    try:
        with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
            for member in archive:
                placement.take(archive, member)
        answer = placement.finish(order["files"])
    except (Refused, OSError, tarfile.TarError) as error:
        placement.undo()
        sys.exit(f"the files cannot be placed: {error}.")
    except BaseException:
        placement.undo()
        raise
    print(json.dumps(answer))


main()
