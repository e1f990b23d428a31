"""The pool of connections to guests, and the conversations on them.

Invariants: a connection belongs to one Address (so to one pinned host key); at most `CHANNELS` conversations share
it, then another one is made; it is closed when nobody used it for ten minutes. Who finds all of a guest's connections
full waits for one that ends. A command is sent at most once: a connection that turns out dead before the command left
is replaced, one that dies after is a GuestUnreachable. While a guest is held (see `hold`) its holder talks to it over
the one connection that is not frozen, and all others wait: what they would run there could write.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import paramiko

from autovibe.errors import GuestUnreachable, LimitExceeded, NotYet
from autovibe.guest import conversation, files
from autovibe.guest.command import Result, Script, checked_timeout, guard_line, line
from autovibe.guest.files import File
from autovibe.guest.keys import generate_key
from autovibe.guest.links import Address, KeyRefused, Link, Silent, connect

_IDLE_SECONDS = 600.0
_MOST_LINKS = 8
_OPEN_SECONDS = 30.0
_LOOK_SECONDS = 1.0  # how long a dead connection may go unnoticed by who waits for a free one
_REFUSED_SECONDS = 0.05
_BANNER_SECONDS = 4.0
_RELOAD_SECONDS = 4.0
_REFUSAL_SECONDS = 90.0  # how long a booting guest may refuse the key (its user is not there yet, or pam_nologin)


class Guests:
    """Connections to guests, shared by all threads. `key_file` is the Hub's ed25519 key, made where there is none."""

    def __init__(self, key_file: Path, *, connect_timeout: float = 10) -> None:
        self.public_key = generate_key(key_file)
        self._key = paramiko.Ed25519Key.from_private_key_file(str(key_file))
        self._connect_timeout = connect_timeout
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._links: dict[Address, list[Link]] = {}
        self._pinned: dict[Address, tuple[Link, float]] = {}  # until when, by time.monotonic()
        self._connecting: dict[Address, threading.Lock] = {}
        self._refused_at: dict[tuple[str, int, str], float] = {}
        self._closed = threading.Event()
        threading.Thread(
            target=_reap, args=(weakref.ref(self), self._closed), name="guests-reaper", daemon=True
        ).start()

    generate_key = staticmethod(generate_key)

    # Conversations

    def reach(self, host: str, port: int, user: str) -> str:
        """First contact: the host key, to be pinned. The connection is kept for what comes next.

        Raises NotYet while nobody answers, also while a guest that boots does not know the key yet; GuestUnreachable
        when it goes on refusing the key.
        """
        who = (host, port, user)
        try:
            link = connect(host, port, user, self._key, host_key=None, timeout_seconds=_BANNER_SECONDS)
        except KeyRefused as error:
            first = self._refused_at.setdefault(who, time.monotonic())
            if time.monotonic() - first > _REFUSAL_SECONDS:
                self._refused_at.pop(who, None)
                raise
            raise NotYet(f"The guest at {host}:{port} does not know the Hub's key yet") from error
        except Silent as error:
            raise NotYet(f"The guest at {host}:{port} does not answer on SSH yet") from error
        self._refused_at.pop(who, None)
        with self._lock:
            self._links.setdefault(Address(host, port, user, link.host_key), []).append(link)
        return link.host_key

    def exec(
        self,
        address: Address,
        argv: Sequence[str] | Script,
        *,
        user: str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        input: bytes = b"",
        timeout_seconds: float = 120,
        output_limit: int = 1 << 20,
        is_holder: bool = False,
    ) -> Result:
        """Run a command to its end and return how it ended; any exit status is a result, no error.

        `user` None is the one who logs in; another one is reached by sudo. Of each stream `output_limit` bytes are
        kept, the rest is read and dropped. At the time-out the command's process group is ended and the status is
        124. `is_holder` is for who holds the guest. Raises LimitExceeded when as many commands as the guest takes ran
        for as long as the time-out, so that this one was not begun; GuestUnreachable when the connection is lost
        before the end: nobody knows then how far the command came.
        """
        checked_timeout(timeout_seconds)
        text = line(argv, login=address.user, user=user, cwd=cwd, env=env)
        with self._channel(address, timeout_seconds, is_holder) as (link, channel):
            return conversation.run(
                channel,
                address,
                text,
                _guard_on(link, address),
                input=input,
                timeout_seconds=timeout_seconds,
                output_limit=output_limit,
            )

    def stream(
        self,
        address: Address,
        argv: Sequence[str] | Script,
        *,
        user: str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        input: bytes = b"",
        timeout_seconds: float = 3600,
        is_holder: bool = False,
    ) -> Iterator[tuple[str, bytes]]:
        """Pieces of a command's output as they come: ("stdout" | "stderr", bytes), at the end ("exit", b"<status>").

        Closing the iterator closes the channel; the command is told by SIGPIPE and ended by its time-out.
        """
        checked_timeout(timeout_seconds)
        text = line(argv, login=address.user, user=user, cwd=cwd, env=env)
        with self._channel(address, timeout_seconds, is_holder) as (link, channel):
            guard = _guard_on(link, address)
            yield from conversation.pieces(channel, address, text, guard, input=input, timeout_seconds=timeout_seconds)

    def push(self, address: Address, placed: Sequence[File], *, timeout_seconds: float = 300) -> None:
        """Write (and delete) files as root, all or none; see `files.push`."""
        files.push(self, address, placed, timeout_seconds=timeout_seconds)

    def pull(self, address: Address, path: str, limit: int = 16 << 20, *, user: str = "root") -> bytes:
        """The content of one regular file of at most `limit` bytes; see `files.pull`."""
        return files.pull(self, address, path, limit, user=user)

    def open(self, address: Address) -> tuple[paramiko.Channel, Callable[[], None]]:
        """A channel for a conversation that goes on, and how to give its place back. Raises GuestUnreachable."""
        link, channel = self._open(address, time.monotonic() + _OPEN_SECONDS, is_holder=False)
        return channel, lambda: self._give_back(link)

    # The pool

    def forget(self, address: Address) -> None:
        """Close the connections to a guest that went away, was restarted, or shall be reached anew."""
        with self._lock:
            links = self._links.pop(address, [])
            self._pinned.pop(address, None)
            self._connecting.pop(address, None)
            self._freed.notify_all()
        for link in links:
            link.close()

    def repin(self, address: Address, host_key: str) -> Address:
        """The same guest under the new host key it told on a connection that was verified; connections are kept."""
        renewed = address.with_key(host_key)
        if renewed != address:
            with self._lock:
                self._links.setdefault(renewed, []).extend(self._links.pop(address, []))
        return renewed

    def pin(self, address: Address, seconds: float) -> Link:
        """From now on, for so long at most, only its holder talks to the guest, over one connection; see `unpin`.

        Asked again it keeps the connection: the others may be frozen.
        """
        with self._lock:
            before, _ = self._pinned.get(address, (None, 0.0))
            link = before if before is not None and before.is_alive else None
            link = link or min(self._living(address), key=lambda living: living.channels, default=None)
        if link is None:
            link = self._take(address, time.monotonic() + _OPEN_SECONDS, is_holder=True)
            self._give_back(link)
        with self._lock:
            self._pinned[address] = link, time.monotonic() + seconds
        return link

    def unpin(self, address: Address) -> None:
        with self._lock:
            self._pinned.pop(address, None)
            self._freed.notify_all()

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            links = [link for found in self._links.values() for link in found]
            self._links.clear()
            self._pinned.clear()
        for link in links:
            link.close()

    def close_idle(self, idle_seconds: float = _IDLE_SECONDS) -> None:
        """Close connections that are dead, or that nobody has used for so long. The reaper calls it by itself."""
        before = time.monotonic() - idle_seconds
        old: list[Link] = []
        with self._lock:
            for address, links in list(self._links.items()):
                gone = [x for x in links if not x.is_alive or (x.channels == 0 and x.used_at < before)]
                kept = [x for x in links if x not in gone]
                old += gone
                if kept:
                    self._links[address] = kept
                else:
                    del self._links[address]
                    self._connecting.pop(address, None)
        for link in old:
            link.close()

    @contextlib.contextmanager
    def _channel(
        self, address: Address, patience_seconds: float, is_holder: bool
    ) -> Iterator[tuple[Link, paramiko.Channel]]:
        link, channel = self._open(address, time.monotonic() + patience_seconds, is_holder)
        try:
            yield link, channel
        finally:
            channel.close()
            self._give_back(link)

    def _open(self, address: Address, deadline: float, is_holder: bool) -> tuple[Link, paramiko.Channel]:
        """A channel nobody has spoken on. Connections found dead are replaced, since nothing was sent yet."""
        failures = 0
        while True:
            link = self._take(address, deadline, is_holder)
            try:
                return link, link.transport.open_session(timeout=_OPEN_SECONDS)
            except paramiko.ChannelException:  # sshd's MaxSessions is lower than ours
                is_usable = self._lower(link) > 0
            except (paramiko.SSHException, EOFError, OSError):
                self._give_back(link)
                is_usable = False
            if not is_usable:
                self._drop(address, link)
                failures += 1
            if failures > _MOST_LINKS or time.monotonic() > deadline:
                break
            time.sleep(_REFUSED_SECONDS if is_usable else 0)
        raise GuestUnreachable(f"The guest at {address} opens no session.")

    def _take(self, address: Address, deadline: float, is_holder: bool) -> Link:
        """A connection with a free channel, taken; made when there is none (one at a time for an address)."""
        while True:
            with self._freed:
                while (link := self._free(address, is_holder)) is None and not self._has_room(address):
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise self._busy(address)
                    self._freed.wait(min(left, _LOOK_SECONDS))
                connecting = self._connecting.setdefault(address, threading.Lock())
            if link is None:
                link = self._make(address, deadline, is_holder, connecting)
            if link is not None:
                return link

    def _make(self, address: Address, deadline: float, is_holder: bool, connecting: threading.Lock) -> Link | None:
        """A new connection, taken; or what was made or filled up while another thread was at it."""
        if not connecting.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise GuestUnreachable(f"The guest at {address} did not answer on SSH in time.")
        try:
            with self._lock:
                link = self._free(address, is_holder)
                if link is not None or not self._has_room(address):
                    return link
            link = self._connect(address)
            link.channels = 1
            with self._lock:
                self._links.setdefault(address, []).append(link)
            return link
        finally:
            connecting.release()

    # With the lock held

    def _living(self, address: Address) -> list[Link]:
        return [link for link in self._links.get(address, []) if link.is_alive]

    def _holding(self, address: Address) -> Link | None:
        """The connection of who holds the guest; a guest whose holder's connection died lets itself go."""
        link, until = self._pinned.get(address, (None, 0.0))
        return link if link is not None and link.is_alive and time.monotonic() < until else None

    def _has_room(self, address: Address) -> bool:
        """Whether another connection may be made."""
        return self._holding(address) is None and len(self._living(address)) < _MOST_LINKS

    def _free(self, address: Address, is_holder: bool) -> Link | None:
        """A connection with a free channel, taken. A holder gets more: commands on its connection may be frozen."""
        holding = self._holding(address)
        if holding is not None:
            usable, times = ([holding] if is_holder else []), 2
        else:
            usable, times = self._living(address), 1
        for link in usable:
            if link.channels < times * link.most_channels:
                link.channels += 1
                return link
        return None

    def _busy(self, address: Address) -> LimitExceeded:
        if self._holding(address) is not None:
            return LimitExceeded(f"The guest at {address} is held still for a checkpoint; try again when it is made.")
        count = sum(link.channels for link in self._living(address))
        return LimitExceeded(
            f"The guest at {address} runs {count} commands, which is all it takes at a time, and none has ended while "
            "this one waited for its turn; run fewer at a time, or try again.",
            details={"limit": count},
        )

    # Without it

    def _connect(self, address: Address) -> Link:
        """A new connection. One that is reset at once is tried again for a moment: sshd takes one to reload."""
        end = time.monotonic() + _RELOAD_SECONDS
        while True:
            try:
                return connect(
                    address.host,
                    address.port,
                    address.user,
                    self._key,
                    host_key=address.host_key,
                    timeout_seconds=self._connect_timeout,
                )
            except Silent:
                if time.monotonic() > end:
                    raise
            time.sleep(0.25)

    def _give_back(self, link: Link) -> None:
        with self._freed:
            link.channels -= 1
            link.used_at = time.monotonic()
            self._freed.notify_all()

    def _lower(self, link: Link) -> int:
        """Give back a connection that opens no further session; how many it carries, which is all it can."""
        with self._freed:
            link.channels -= 1
            link.most_channels = max(1, link.channels)
            return link.channels

    def _drop(self, address: Address, link: Link) -> None:
        with self._freed:
            links = self._links.get(address, [])
            if link in links:
                links.remove(link)
            if self._pinned.get(address, (None, 0.0))[0] is link:
                del self._pinned[address]
            self._freed.notify_all()
        link.close()


def _guard_on(link: Link, address: Address) -> conversation.StartGuard:
    """Guards go over the connection of the command they guard."""

    def start(group: int, seconds: float) -> paramiko.Channel | None:
        try:
            channel = link.transport.open_session(timeout=_OPEN_SECONDS)
        except paramiko.ChannelException:
            return None
        return conversation.start(channel, guard_line(address.user, group, seconds))

    return start


def _reap(guests: weakref.ref[Guests], closed: threading.Event) -> None:
    while not closed.wait(30):
        pool = guests()
        if pool is None:
            return
        pool.close_idle()
        del pool
