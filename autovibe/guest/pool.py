"""The pool of connections to guests, and the conversations on them.

Invariants: a connection belongs to one Address (so to one pinned host key); at most `CHANNELS` conversations share
it, then another one is made; it is closed when nobody used it for ten minutes. A command is sent at most once: a
connection that turns out dead before the command left is replaced, one that dies after is a GuestUnreachable. While a
guest is held (see `hold`) every conversation with it goes through the one connection that is not frozen.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import paramiko

from autovibe.errors import GuestUnreachable, NotYet
from autovibe.guest import conversation, files
from autovibe.guest.command import Result, Script, checked_timeout, guard_line, line
from autovibe.guest.files import File
from autovibe.guest.keys import generate_key
from autovibe.guest.links import Address, KeyRefused, Link, Silent, connect

_IDLE_SECONDS = 600.0
_MOST_LINKS = 8
_OPEN_SECONDS = 30.0
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
        self._links: dict[Address, list[Link]] = {}
        self._pinned: dict[Address, Link] = {}
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
    ) -> Result:
        """Run a command to its end and return how it ended; any exit status is a result, no error.

        `user` None is the one who logs in; another one is reached by sudo. Of each stream `output_limit` bytes are
        kept, the rest is read and dropped. At the time-out the command's process group is ended and the status is
        124. Raises GuestUnreachable when the connection is lost before the end: nobody knows then how far the command
        came.
        """
        checked_timeout(timeout_seconds)
        text = line(argv, login=address.user, user=user, cwd=cwd, env=env)
        with self._channel(address) as (link, channel):
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
    ) -> Iterator[tuple[str, bytes]]:
        """Pieces of a command's output as they come: ("stdout" | "stderr", bytes), at the end ("exit", b"<status>").

        Closing the iterator closes the channel; the command is told by SIGPIPE and ended by its time-out.
        """
        checked_timeout(timeout_seconds)
        text = line(argv, login=address.user, user=user, cwd=cwd, env=env)
        with self._channel(address) as (link, channel):
            guard = _guard_on(link, address)
            yield from conversation.pieces(channel, address, text, guard, input=input, timeout_seconds=timeout_seconds)

    def push(self, address: Address, placed: Sequence[File], *, timeout_seconds: float = 300) -> None:
        """Write (and delete) files as root, all or none; see `files.push`."""
        files.push(self, address, placed, timeout_seconds=timeout_seconds)

    def pull(self, address: Address, path: str, limit: int = 16 << 20, *, user: str = "root") -> bytes:
        """The content of one regular file of at most `limit` bytes; see `files.pull`."""
        return files.pull(self, address, path, limit, user=user)

    # The pool

    def forget(self, address: Address) -> None:
        """Close the connections to a guest that went away, was restarted, or shall be reached anew."""
        with self._lock:
            links = self._links.pop(address, [])
            self._pinned.pop(address, None)
            self._connecting.pop(address, None)
        for link in links:
            link.close()

    def repin(self, address: Address, host_key: str) -> Address:
        """The same guest under the new host key it told on a connection that was verified; connections are kept."""
        renewed = address.with_key(host_key)
        if renewed != address:
            with self._lock:
                self._links.setdefault(renewed, []).extend(self._links.pop(address, []))
        return renewed

    def pin(self, address: Address) -> Link:
        """From now on talk to the guest over one connection only; undone by `unpin`."""
        link = self._take(address)
        self._give_back(link)
        with self._lock:
            self._pinned[address] = link
        return link

    def unpin(self, address: Address) -> None:
        with self._lock:
            self._pinned.pop(address, None)

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
    def _channel(self, address: Address) -> Iterator[tuple[Link, paramiko.Channel]]:
        link, channel = self._open(address)
        try:
            yield link, channel
        finally:
            channel.close()
            self._give_back(link)

    def _open(self, address: Address) -> tuple[Link, paramiko.Channel]:
        """A channel nobody has spoken on. Connections found dead are replaced, since nothing was sent yet."""
        for _ in range(_MOST_LINKS + 2):
            link = self._take(address)
            try:
                return link, link.transport.open_session(timeout=_OPEN_SECONDS)
            except paramiko.ChannelException:  # sshd's MaxSessions is lower than ours
                self._give_back(link)
                link.most_channels = max(1, link.channels)
            except (paramiko.SSHException, EOFError, OSError):
                self._give_back(link)
                self._drop(address, link)
        raise GuestUnreachable(f"The guest at {address} opens no session.")

    def _take(self, address: Address) -> Link:
        """A connection with a free channel, taken; made when there is none (one at a time for an address)."""
        if (link := self._take_free(address)) is not None:
            return link
        with self._lock:
            connecting = self._connecting.setdefault(address, threading.Lock())
        with connecting:
            if (link := self._take_free(address)) is not None:
                return link
            link = self._connect(address)
            link.channels = 1
            with self._lock:
                self._links.setdefault(address, []).append(link)
            return link

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

    def _take_free(self, address: Address) -> Link | None:
        with self._lock:
            pinned = self._pinned.get(address)
            links = [pinned] if pinned is not None and pinned.is_alive else self._links.get(address, [])
            is_full = len(links) >= _MOST_LINKS or links == [pinned]
            for link in links:
                if link.is_alive and (link.channels < link.most_channels or (is_full and link is links[-1])):
                    link.channels += 1
                    return link
        return None

    def _give_back(self, link: Link) -> None:
        with self._lock:
            link.channels -= 1
            link.used_at = time.monotonic()

    def _drop(self, address: Address, link: Link) -> None:
        with self._lock:
            links = self._links.get(address, [])
            if link in links:
                links.remove(link)
            if self._pinned.get(address) is link:
                del self._pinned[address]
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
