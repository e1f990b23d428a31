"""A fabric Connection to a machine, for scripts of an operator's own.

It knows exactly one host key, the one the Hub pinned, and refuses every other; it offers exactly one key, the Hub's.
The person's SSH and fabric configuration, agent and known_hosts are not read: they are about other computers.
"""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path
from typing import Any

import fabric
from fabric.runners import Remote

from autovibe import schemas
from autovibe.errors import GuestUnreachable

CONNECT_SECONDS = 10


class _Remote(Remote):  # type: ignore[misc]  # fabric has no types
    """What is sent to a command that has ended meanwhile goes nowhere, where fabric would fail the command for it."""

    def _write_proc_stdin(self, data: bytes) -> None:
        try:
            super()._write_proc_stdin(data)
        except OSError:
            if not self.channel.closed:
                raise


class _RemoteShell(_Remote):
    def send_start_message(self, _command: None) -> None:
        self.channel.invoke_shell()


OVERRIDES = {"load_ssh_configs": False, "runners": {"remote": _Remote, "remote_shell": _RemoteShell}}


class MachineConnection(fabric.Connection):  # type: ignore[misc]
    """Opens by itself at the first command. `open` raises GuestUnreachable, also for another host key."""

    client: Any

    def __init__(self, there: schemas.MachineSsh, key_file: Path) -> None:
        super().__init__(
            there.host,
            user=there.user,
            port=there.port,
            config=fabric.Config(lazy=True, overrides=OVERRIDES),
            gateway=False,
            forward_agent=False,
            connect_timeout=CONNECT_SECONDS,
            connect_kwargs={
                "key_filename": [str(key_file)],
                "allow_agent": False,
                "look_for_keys": False,
                "banner_timeout": CONNECT_SECONDS,  # a forward accepts before anybody listens behind it
            },
        )
        # fabric's own client accepts whatever host key it meets; a new one of the same class rejects unknown ones.
        self.client = type(self.client)()
        self._pin(there)

    def _pin(self, there: schemas.MachineSsh) -> None:
        name = there.host if there.port == 22 else f"[{there.host}]:{there.port}"
        with tempfile.NamedTemporaryFile("w", prefix="autovibe-", suffix=".known_hosts") as file:
            file.write(f"{name} {there.host_key}\n")
            file.flush()
            try:
                self.client.get_host_keys().load(file.name)
            except Exception as error:  # of a class of paramiko, which is not imported here
                raise GuestUnreachable(f"The pinned host key of {name} is none: {error}") from error

    def open(self) -> Any:
        if self.is_connected:
            return None
        try:
            result = super().open()
        except Exception as error:  # OSError, EOFError, and paramiko's own
            (key_file,) = self.connect_kwargs["key_filename"]
            raise GuestUnreachable(
                f"{self.user}@{self.host}:{self.port} is not reached on SSH with the key '{key_file}': "
                f"{str(error) or type(error).__name__}"
            ) from error
        # Without this a command waits for the other side's delayed acknowledgement: 50 ms instead of 10.
        self.transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return result
