"""What is on a guest's disk: held still, read in one round trip, released.

hold -> scan -> (the snapshot) -> release. `hold` freezes whatever may write, flushes the file systems, and leaves a
watchdog in the guest that thaws it by itself when the Hub does not come back. `release` tells whether nothing moved
since. The scan runs in the guest (programs/scan.py) and sends one compressed stream; it is a hostile guest's word, so
its order, its paths and its size are checked here.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autovibe.errors import GuestCommandFailed
from autovibe.guest import program
from autovibe.guest.command import Result
from autovibe.guest.links import Address
from autovibe.types import Entry, EntryKind

if TYPE_CHECKING:
    from autovibe.guest.pool import Guests

MAGIC = b"autovibe-scan-1\n"
_HEAD = struct.Struct("<cHIIQqHBH")  # kind, mode, uid, gid, size, mtime_ns, length of path, of digest, of target
_PIECE = 1 << 18
_MOST_ENTRIES = 5_000_000
_MOST_PATH = 4096
_MOST_BYTES = 1 << 60  # so that sums of sizes fit into a database's integers
_KINDS = {kind.value.encode(): kind for kind in EntryKind}
_END = b"."
_STDERR_KEPT = 4000
_PINNED_FOR_GOOD = 600.0  # seconds; by then the VM is off


@dataclass(frozen=True)
class Profile:
    """What a manifest covers. `ignores`: absolute paths, globs of absolute paths (`*` stays within a name, `**` does
    not), and bare names anywhere; what is ignored is not looked into. `index` tells unchanged files, "" for no index.
    """

    name: str
    roots: tuple[str, ...]
    ignores: tuple[str, ...]
    index: str = "/var/lib/autovibe/scan-index"
    most_file_bytes: int = 64 << 30  # a larger (sparse) file is listed without a digest

    def order(self, *, full: bool) -> dict[str, Any]:
        return {
            "roots": sorted(self.roots),
            "ignores": list(self.ignores),
            "index": self.index,
            "most_file_bytes": self.most_file_bytes,
            "full": full,
        }


IDENTITY_FILES = (
    "/etc/hostname",
    "/etc/hosts",
    "/etc/machine-id",
    "/etc/ssh/ssh_host_*",
    "/etc/resolv.conf",
    "/etc/.pwd.lock",
    "/etc/adjtime",
    "/etc/mtab",
    "/etc/network/interfaces.d/50-cloud-init*",
    "/etc/netplan/50-cloud-init.yaml",
    "/etc/systemd/network/10-cloud-init-*",
    "/etc/sudoers.d/90-cloud-init-users",
)
CACHES = (
    "/home/*/.cache",
    "/root/.cache",
    "__pycache__",
    ".pytest_cache",
    ".mypy_cache",
    ".ruff_cache",
)
OWN = ("/home/*/.ansible", "/root/.ansible", "/etc/autovibe")

WORKSPACE = Profile(
    name="workspace",
    roots=("/workspace", "/home", "/root", "/etc", "/opt", "/srv", "/usr/local"),
    ignores=(*IDENTITY_FILES, *CACHES, *OWN),
)


def hold(guests: Guests, address: Address, *, token: str, watchdog_seconds: float | None) -> None:
    """Freeze what may write and flush, until `release`, or until `watchdog_seconds` are over.

    None is for good: until a release, also one after the VM went on from its saved RAM; new connections work then.
    Idempotent for a token. From now on the Hub talks to the guest over the one connection that stays alive. Raises
    GuestCommandFailed when something cannot be frozen; nothing is frozen then.
    """
    guests.pin(address, _PINNED_FOR_GOOD if watchdog_seconds is None else watchdog_seconds)
    try:
        order = {"do": "hold", "token": token, "watchdog_seconds": watchdog_seconds}
        program.run(guests, address, "hold", order, timeout_seconds=60, is_holder=True)
    except BaseException:
        guests.unpin(address)
        raise


def check(guests: Guests, address: Address, token: str) -> bool:
    """Whether the guest was held without a break so far, which it goes on being."""
    order = {"do": "check", "token": token}
    answer = program.run(guests, address, "hold", order, timeout_seconds=60, is_holder=True)
    return answer.get("held") is True


def release(guests: Guests, address: Address, token: str) -> bool:
    """Thaw. True when the guest was held without a break since `hold` with this token: what was scanned is what is
    there.
    """
    try:
        order = {"do": "release", "token": token}
        answer = program.run(guests, address, "hold", order, timeout_seconds=60, is_holder=True)
    finally:
        guests.unpin(address)
    return answer.get("held") is True


def scan(
    guests: Guests, address: Address, profile: Profile, *, full: bool = False, timeout_seconds: float = 1800
) -> Iterator[Entry]:
    """Every path of the profile, depth first, a directory's entries sorted by the bytes of their names.

    The directories above a root come too (`/usr` before `/usr/local`), the root directory itself does not. `full` reads
    every file; otherwise files that are unchanged since the last scan keep its digest. Raises GuestCommandFailed when
    the scan fails in the guest or sends what no scan can send.
    """
    reader = _Reader(address, profile)
    said = b""
    status = -1
    order = profile.order(full=full)
    pieces = program.stream(guests, address, "scan", order, timeout_seconds=timeout_seconds, is_holder=True)
    for name, piece in pieces:
        if name == "stdout":
            yield from reader.feed(piece)
        elif name == "stderr":
            said = (said + piece)[-_STDERR_KEPT:]
        else:
            status = int(piece)
    if status != 0:
        raise program.failure("scan", address, Result(status, b"", said, False, 0))
    reader.finish()


class _Reader:
    """Turns the stream into entries and trusts none of it."""

    def __init__(self, address: Address, profile: Profile) -> None:
        self._address = address
        self._roots = [tuple(root.encode().strip(b"/").split(b"/")) for root in profile.roots]
        self._inflate = zlib.decompressobj()
        self._compressed = bytearray()
        self._plain = bytearray()
        self._has_magic = False
        self._last: tuple[bytes, ...] = ()
        self._directories: list[tuple[bytes, ...]] = [()]
        self._count = 0
        self._summary: dict[str, Any] | None = None

    def feed(self, piece: bytes) -> Iterator[Entry]:
        if not self._has_magic:
            self._compressed += piece
            if len(self._compressed) < len(MAGIC):
                return
            if not self._compressed.startswith(MAGIC):
                raise self._nonsense("it begins with something else")
            self._has_magic = True
            piece = bytes(self._compressed[len(MAGIC) :])
        while piece:
            if self._inflate.eof:
                raise self._nonsense("it goes on after its end")
            try:
                self._plain += self._inflate.decompress(piece, _PIECE)
            except zlib.error as error:
                raise self._nonsense("it cannot be decompressed") from error
            yield from self._records()
            piece = self._inflate.unconsumed_tail
        if self._inflate.unused_data:
            raise self._nonsense("it goes on after its end")

    def finish(self) -> None:
        if self._summary is None or self._plain:
            raise self._nonsense("it ends too early")
        if self._summary.get("entries") != self._count:
            raise self._nonsense("its sum is wrong")

    def _records(self) -> Iterator[Entry]:
        plain, at = self._plain, 0
        while len(plain) - at >= _HEAD.size:
            kind, mode, uid, gid, size, mtime_ns, of_path, of_digest, of_target = _HEAD.unpack_from(plain, at)
            end = at + _HEAD.size + of_path + of_digest + of_target
            if len(plain) < end:
                break
            at += _HEAD.size
            path = bytes(plain[at : at + of_path])
            digest = bytes(plain[at + of_path : at + of_path + of_digest])
            target = bytes(plain[at + of_path + of_digest : end])
            at = end
            if self._summary is not None:
                raise self._nonsense("it goes on after its end")
            if kind == _END:
                self._summary = self._parse_summary(target)
                continue
            self._count += 1
            if self._count > _MOST_ENTRIES:
                raise self._nonsense(f"it has more than {_MOST_ENTRIES} entries")
            self._check(kind, mode, size, path, digest, target)
            yield Entry(path, _KINDS[kind], mode, uid, gid, size, digest, target, mtime_ns)
        del plain[:at]

    def _check(self, kind: bytes, mode: int, size: int, path: bytes, digest: bytes, target: bytes) -> None:
        if kind not in _KINDS or mode > 0o7777 or len(digest) not in (0, 32) or (digest and kind != b"f"):
            raise self._nonsense("an entry is malformed")
        if (target and kind != b"l") or len(target) > _MOST_PATH or size > _MOST_BYTES:
            raise self._nonsense("an entry is malformed")
        parts = tuple(path[1:].split(b"/"))
        if len(path) > _MOST_PATH or not path.startswith(b"/") or not all(parts):
            raise self._nonsense("a path is malformed")
        if b"." in parts or b".." in parts or b"\0" in path:
            raise self._nonsense("a path is malformed")
        if not any(parts[: len(root)] == root[: len(parts)] for root in self._roots):
            raise self._nonsense("a path lies outside the profile")
        if parts <= self._last:
            raise self._nonsense("its order is wrong")
        while self._directories[-1] != parts[:-1]:
            self._directories.pop()
            if not self._directories:
                raise self._nonsense("a path has no directory")
        if kind == b"d":
            self._directories.append(parts)
        self._last = parts

    def _parse_summary(self, text: bytes) -> dict[str, Any]:
        try:
            summary = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._nonsense("its sum is no JSON") from error
        if not isinstance(summary, dict):
            raise self._nonsense("its sum is no object")
        return summary

    def _nonsense(self, why: str) -> GuestCommandFailed:
        return GuestCommandFailed(f"The guest at {self._address} sent no valid scan: {why}.")
