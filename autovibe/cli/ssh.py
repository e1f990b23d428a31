"""autovibe machine ssh: by OpenSSH, or by fabric where OpenSSH is not installed."""

from __future__ import annotations

import os
import select
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO
from uuid import UUID

import typer

from autovibe.cli import connection, names
from autovibe.cli.guest import Machine
from autovibe.errors import ConfigurationError

if TYPE_CHECKING:
    from autovibe.sdk import Client


def ssh(
    machine: Machine,
    argv: Annotated[
        list[str] | None, typer.Argument(metavar="-- COMMAND…", help="Run this instead of a shell, as ssh does.")
    ] = None,
) -> None:
    """Open a shell in the guest over SSH, with the Hub's key and the pinned host key.

    It works where the Hub's home is, with OpenSSH where that is installed, and without.
    """
    from autovibe.sdk.machines import readable_key_file

    settings = connection.settings()
    key = readable_key_file(settings)
    with connection.client(settings) as client:
        found = names.machine(client, machine)
        there = client.machines.ssh(found.uuid)
        program = shutil.which("ssh")
        if program is None:
            raise typer.Exit(_without_openssh(client, found.uuid, key, argv or []))
    known_hosts = settings.hub_home / "ssh" / "known_hosts.d" / str(found.uuid)
    known_hosts.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    known_hosts.write_text(f"{found.uuid} {there.host_key}\n", encoding="utf-8")
    options = {
        "IdentitiesOnly": "yes",
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": str(known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlias": str(found.uuid),
        "UpdateHostKeys": "no",
        "LogLevel": "ERROR",
    }
    command = ["ssh", "-i", str(key), "-p", str(there.port), "-l", there.user]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    os.execv(program, [*command, there.host, *(argv or [])])  # noqa: S606 - no shell is wanted


def _without_openssh(client: Client, uuid: UUID, key: Path, argv: list[str]) -> int:
    """The exit status of the shell, or of the command: as with ssh, its words joined by spaces."""
    if argv and argv[0].startswith("-"):
        raise ConfigurationError(
            f"'{argv[0]}' is an option of OpenSSH, which is missing; install it with: "
            "sudo apt-get install openssh-client"
        )
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    command = " ".join(argv) or 'exec "$SHELL" -l'
    with client.machines.connect(uuid, key_file=key) as guest:
        if not is_terminal:
            streams = {
                "in_stream": Bytes(sys.stdin.buffer),
                "out_stream": Bytes(sys.stdout.buffer),
                "err_stream": Bytes(sys.stderr.buffer),
            }
            result = guest.run(command, warn=True, encoding="latin-1", **streams)
        elif argv:
            result = guest.run(command, warn=True, encoding="utf-8", pty=True)
        else:
            result = _shell(guest)
    return int(result.exited) & 0xFF


def _shell(guest: Any) -> Any:
    from invoke.exceptions import UnexpectedExit

    try:
        return guest.shell(encoding="utf-8")
    except UnexpectedExit as error:  # fabric's documentation says that `shell` raises nothing
        return error.result


class Bytes:
    """A stream as fabric wants one, of characters, each of which is a byte: nothing is decoded."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, _count: int) -> str | None:
        """What is there, None when nothing is yet, "" at the end."""
        if not select.select([self._file], [], [], 0.05)[0]:
            return None
        return os.read(self._file.fileno(), 1 << 15).decode("latin-1")

    def write(self, text: str) -> None:
        self._file.write(text.encode("latin-1"))

    def flush(self) -> None:
        self._file.flush()
