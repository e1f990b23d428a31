"""Lists what a profile covers, with digests. Runs in the guest as root; writes `scan.MAGIC` and a zlib stream of
records.

A record is HEAD, path, digest, target; the last one has the kind "." and a JSON summary as its target. Order: depth
first, a directory's entries by the bytes of their names, parents before children. Sockets, fifos and devices are
never opened. A mount point inside a root is listed and not entered: a snapshot of the disk does not hold what is
mounted there.

The index remembers the digest of a file by (inode, device, size, mtime_ns, ctime_ns). ctime cannot be set, so an
unchanged quadruple means unchanged content, except for a file that changed within the clock's grain of the scan that
read it: such files are not put into the index.
"""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import hashlib
import json
import os
import re
import stat
import struct
import sys
import time
import zlib
from array import array
from collections.abc import Iterator
from typing import Any

MAGIC = b"autovibe-scan-1\n"
HEAD = struct.Struct("<cHIIQqHBH")
KNOWN = struct.Struct("<QQQqq32s")  # inode, device, size, mtime_ns, ctime_ns, digest
INDEX_MAGIC = b"autovibe-index-1"
MOST_KNOWN = 400_000
GRAIN_NS = 2_000_000_000
WINDOW = 256
CHUNK = 1 << 20
MOST_PATH = 4096
NO_DISK = re.compile(
    r"^(proc|sysfs|devtmpfs|devpts|tmpfs|ramfs|cgroup2?|debugfs|tracefs|securityfs|pstore|bpf|mqueue|hugetlbfs|configfs"
    r"|fusectl|autofs|binfmt_misc|efivarfs|rpc_pipefs|nsfs|nfs4?|cifs|smb3|9p|virtiofs|fuse(\..*)?)$"
)


class Index:
    """Digests of the last scan, looked up by inode, and those of this one."""

    def __init__(self, path: str, full: bool, now_ns: int) -> None:
        self.path = path
        self.before_ns = now_ns - GRAIN_NS
        self.records = b""
        self.inodes: array[int] = array("Q")
        self.fresh: list[bytes] = []
        if path and not full:
            self.load()

    def load(self) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            if found.st_uid != os.geteuid() or found.st_mode & 0o077 or not stat.S_ISREG(found.st_mode):
                return
            data = file.read(len(INDEX_MAGIC) + MOST_KNOWN * KNOWN.size + 32)
        body = data[len(INDEX_MAGIC) : -32]
        is_whole = data.startswith(INDEX_MAGIC) and hashlib.sha256(body).digest() == data[-32:]
        if is_whole and len(body) % KNOWN.size == 0:
            self.records = body
            self.inodes = array("Q", (record[0] for record in KNOWN.iter_unpack(body)))

    def digest(self, found: os.stat_result) -> bytes:
        """What the file's digest was and still is, b"" when it must be read."""
        at = bisect.bisect_left(self.inodes, found.st_ino)
        key = (found.st_ino, found.st_dev, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        while at < len(self.inodes) and self.inodes[at] == found.st_ino:
            record = KNOWN.unpack_from(self.records, at * KNOWN.size)
            if record[:5] == key:
                return bytes(record[5])
            at += 1
        return b""

    def remember(self, found: os.stat_result, digest: bytes) -> None:
        if self.path and found.st_ctime_ns < self.before_ns and len(self.fresh) < MOST_KNOWN:
            key = (found.st_ino, found.st_dev, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            self.fresh.append(KNOWN.pack(*key, digest))

    def save(self) -> None:
        if not self.path:
            return
        self.fresh.sort(key=lambda record: KNOWN.unpack(record)[:2])
        os.makedirs(os.path.dirname(self.path), 0o755, exist_ok=True)
        temporary = self.path + ".new"
        if os.path.lexists(temporary):
            os.unlink(temporary)
        checksum = hashlib.sha256()
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(INDEX_MAGIC)
            for record in self.fresh:
                file.write(record)
                checksum.update(record)
            file.write(checksum.digest())
        os.rename(temporary, self.path)


class Ignored:
    """Paths that are no part of the profile."""

    def __init__(self, patterns: list[str]) -> None:
        self.names = {pattern.encode() for pattern in patterns if "/" not in pattern}
        self.paths = {pattern.encode() for pattern in patterns if "/" in pattern and "*" not in pattern}
        globs = [translated(pattern) for pattern in patterns if "/" in pattern and "*" in pattern]
        self.globs = re.compile(b"|".join(globs)) if globs else None

    def has(self, path: bytes, name: bytes) -> bool:
        if name in self.names or path in self.paths:
            return True
        return self.globs is not None and self.globs.fullmatch(path) is not None


def translated(pattern: str) -> bytes:
    text = re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
    return b"(?s:" + text.encode() + b")"


def mounts() -> dict[bytes, str]:
    """Mount point -> type of the file system that is on top there."""
    found = {}
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            for line in file:
                left, _, right = line.partition(b" - ")
                point = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match.group(1), 8)]), left.split(b" ")[4])
                found[point] = right.split(b" ", 1)[0].decode("ascii", "replace")
    except OSError:
        return {}
    return found


class Walk:
    """Yields (path, lstat, target) in order; counts what it had to leave out."""

    def __init__(self, roots: list[bytes], ignored: Ignored) -> None:
        self.ignored = ignored
        self.mounts = mounts()
        self.is_diskless = NO_DISK.match(self.mounts.get(b"/", "")) is not None
        self.entered = {b"/"}
        self.roots = set(roots)
        self.above: set[bytes] = set()
        for root in roots:
            above = os.path.dirname(root)
            while above != b"/":
                self.above.add(above)
                above = os.path.dirname(above)
        self.skipped = 0

    def entries(self) -> Iterator[tuple[bytes, os.stat_result]]:
        tops = {root for root in self.roots if not any(root.startswith(other + b"/") for other in self.roots)}
        wanted = sorted(tops | self.above, key=lambda path: path.split(b"/"))
        for path in wanted:
            try:
                found = os.lstat(path)
            except OSError:
                continue
            if path in self.above and path not in tops:
                if stat.S_ISDIR(found.st_mode):  # a link there leads to what another path tells
                    yield path, found
            elif all(self.is_directory(above) for above in parents(path)):
                yield path, found
                if stat.S_ISDIR(found.st_mode) and self.may_enter(path):
                    yield from self.below(path)

    @staticmethod
    def is_directory(path: bytes) -> bool:
        try:
            return stat.S_ISDIR(os.lstat(path).st_mode)
        except OSError:
            return False

    def may_enter(self, path: bytes) -> bool:
        kind = self.mounts.get(path)
        if kind is None:
            return True
        is_pseudo = NO_DISK.match(kind) is not None and not (self.is_diskless and kind == self.mounts.get(b"/"))
        return path in self.roots and not is_pseudo

    def below(self, top: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
        stack = [self.names(top)]
        while stack:
            try:
                path = next(stack[-1])
            except StopIteration:
                stack.pop()
                continue
            try:
                found = os.lstat(path)
            except OSError:
                self.skipped += 1
                continue
            yield path, found
            if stat.S_ISDIR(found.st_mode) and self.may_enter(path):
                stack.append(self.names(path))

    def names(self, directory: bytes) -> Iterator[bytes]:
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            self.skipped += 1
            return
        for name in names:
            path = directory + b"/" + name
            if self.ignored.has(path, name):
                continue
            if len(path) > MOST_PATH:
                self.skipped += 1
                continue
            yield path


def parents(path: bytes) -> Iterator[bytes]:
    while (path := os.path.dirname(path)) != b"/":
        yield path


def hashed(path: bytes, expected: os.stat_result) -> tuple[bytes, os.stat_result]:
    """The digest and the state of the file that was read; b"" for one that cannot be."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | getattr(os, "O_NOATIME", 0)
    try:
        try:
            descriptor = os.open(path, flags)
        except PermissionError:  # O_NOATIME is for the owner
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                return b"", expected
            digest = hashlib.sha256()
            left = found.st_size  # a file that grows while it is read shall not keep us
            while left > 0 and (piece := file.read(min(CHUNK, left))):
                digest.update(piece)
                left -= len(piece)
            return (digest.digest(), found) if left == 0 else (b"", found)
    except OSError:
        return b"", expected


class Output:
    """Compressed records to standard output, and what the summary tells."""

    def __init__(self) -> None:
        self.deflate = zlib.compressobj(1)
        self.plain: list[bytes] = []
        self.held = 0
        self.summary = collections.Counter({"entries": 0, "files": 0, "bytes": 0, "unreadable": 0})
        sys.stdout.buffer.write(MAGIC)

    def put(self, path: bytes, found: os.stat_result, digest: bytes) -> None:
        kind, target = letter(found.st_mode), b""
        size = found.st_size if kind == b"f" else 0
        if kind == b"l":
            try:
                target = os.readlink(path)
            except OSError:
                self.summary["unreadable"] += 1
        self.summary["entries"] += 1
        if kind == b"f":
            self.summary["files"] += 1
            self.summary["bytes"] += size
            self.summary["unreadable"] += not digest
        self.record(kind, found, size, path, digest, target)

    def record(self, kind: bytes, found: Any, size: int, path: bytes, digest: bytes, target: bytes) -> None:
        mode, uid, gid, mtime = (
            (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime_ns) if found else (0, 0, 0, 0)
        )
        head = HEAD.pack(kind, mode, uid, gid, size, mtime, len(path), len(digest), len(target))
        self.plain.append(head + path + digest + target)
        self.held += HEAD.size + len(path) + len(digest) + len(target)
        if self.held > 1 << 16:
            self.flush()

    def flush(self) -> None:
        sys.stdout.buffer.write(self.deflate.compress(b"".join(self.plain)))
        self.plain.clear()
        self.held = 0

    def finish(self, extra: dict[str, int]) -> None:
        self.record(b".", None, 0, b"", b"", json.dumps({**self.summary, **extra}).encode())
        self.flush()
        sys.stdout.buffer.write(self.deflate.flush())
        sys.stdout.buffer.flush()


def letter(mode: int) -> bytes:
    kinds = (
        (stat.S_ISREG, b"f"),
        (stat.S_ISDIR, b"d"),
        (stat.S_ISLNK, b"l"),
        (stat.S_ISFIFO, b"p"),
        (stat.S_ISSOCK, b"s"),
        (stat.S_ISCHR, b"c"),
    )
    return next((kind for test, kind in kinds if test(mode)), b"b")


def main() -> None:
    began = time.time_ns()
    order = json.loads(sys.stdin.buffer.readline())
    roots = [os.path.normpath(root).encode() for root in order["roots"]]
    index = Index(order["index"], order["full"], began)
    walk = Walk(roots, Ignored(order["ignores"]))
    output = Output()
    reused = 0
    pending: collections.deque[tuple[bytes, os.stat_result, Any]] = collections.deque()
    cores = len(os.sched_getaffinity(0))
    pool = concurrent.futures.ThreadPoolExecutor(min(cores, 8)) if cores > 1 else None

    def settle() -> None:
        path, found, answer = pending.popleft()
        if not isinstance(answer, bytes):
            answer, found = answer.result()
        if answer:
            index.remember(found, answer)
        output.put(path, found, answer)

    for path, found in walk.entries():
        answer: Any = b""
        if stat.S_ISREG(found.st_mode) and found.st_size <= order["most_file_bytes"]:
            answer = index.digest(found)
            reused += bool(answer)
            if not answer and pool is not None:
                answer = pool.submit(hashed, path, found)
            elif not answer:
                answer, found = hashed(path, found)
        pending.append((path, found, answer))
        if len(pending) > WINDOW:
            settle()
    while pending:
        settle()
    output.finish({"reused": reused, "skipped": walk.skipped})
    index.save()


main()
