"""A root shell that waits in the guest for one word to freeze the agent, so that nothing has to be started by then.

To begin a command costs an emulated or busy guest seconds; to wake one that waits, milliseconds. When the connection
ends before the word came, the shell ends too and nothing is frozen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import paramiko

from autovibe.guest import agent, conversation
from autovibe.guest.command import line
from autovibe.guest.links import Address

if TYPE_CHECKING:
    from autovibe.guest.pool import Guests

_WORD, _DONE = b"freeze\n", b"frozen"
_WAIT = 'echo ready; read -r word && [ "$word" = freeze ] && echo 1 > "$1" && echo frozen'


class Brake:
    """Held by one process for one machine that nears its limit."""

    def __init__(self, channel: paramiko.Channel, give_back: Callable[[], None]) -> None:
        self._channel, self._give_back = channel, give_back

    @property
    def is_ready(self) -> bool:
        return not self._channel.closed and not self._channel.eof_received

    def pull(self, seconds: float) -> bool:
        """Freeze; False when the guest did not say within that time that it is done."""
        said, end = b"", time.monotonic() + seconds
        try:
            self._channel.sendall(_WORD)
            while _DONE not in said and (left := end - time.monotonic()) > 0:
                self._channel.settimeout(left)
                if not (piece := self._channel.recv(100)):
                    break
                said += piece
        except (OSError, paramiko.SSHException):
            said = b""
        finally:
            self.close()
        return _DONE in said

    def close(self) -> None:
        if not self._channel.closed:
            self._channel.close()
            self._give_back()


def ready(guests: Guests, address: Address) -> Brake:
    """A brake that will be ready in a moment. Raises GuestUnreachable."""
    channel, give_back = guests.open(address)
    argv = ["sh", "-c", _WAIT, "sh", agent.FREEZER]
    conversation.start(channel, line(argv, login=address.user, user="root", cwd=None, env=None))
    return Brake(channel, give_back)
