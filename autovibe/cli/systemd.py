"""autovibe service …: systemd units for the Hub and the embedded node, in the place of `autovibe up`.

A unit carries no secret: what the environment is to hold lies in `<home>/environment`, mode 0600, and is named by path.
The virtual machines are children of the node's unit and stay when it stops or starts again (`KillMode=process`); the
Hub's unit ends with all it has started (`KillMode=mixed`).
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autovibe.cli import connection, output, prepare
from autovibe.cli.output import Json
from autovibe.cli.processes import is_claimed
from autovibe.cli.supervise import environment, program
from autovibe.errors import Conflict, OperationFailed

if TYPE_CHECKING:
    from autovibe.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Run the Hub and the node as services of systemd.")

MARK = "# Written by 'autovibe service install'; it is replaced by the next one."
HUB, NODE = "autovibe-hub.service", "autovibe-node.service"

_HARDENED = (
    "UMask=0077",
    "NoNewPrivileges=yes",
    "LockPersonality=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "SystemCallArchitectures=native",
)
"""What needs no right of the system's, so that it holds for a user's units too."""
_HARDENED_SYSTEM = (
    "ProtectSystem=full",
    "ProtectClock=yes",
    "ProtectControlGroups=yes",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "CapabilityBoundingSet=",
)

Home = Annotated[Path | None, typer.Option(help="Where everything lies (AUTOVIBE_HOME).")]
System = Annotated[bool, typer.Option("--system/--user", help="Of the computer, or of this user (default).")]
Directory = Annotated[Path | None, typer.Option(help="Where the units lie; else where systemd looks.")]


@app.command()
def install(
    system: System = False,
    home: Home = None,
    run_as: Annotated[str | None, typer.Option(help="With --system: the user they run as; else who calls.")] = None,
    directory: Directory = None,
    is_printed: Annotated[bool, typer.Option("--print", help="Show the units and write nothing.")] = False,
    json: Json = False,
) -> None:
    """Write units for the Hub and, where it is used, the embedded node; enable and start them where systemd runs."""
    settings = connection.own_settings(home=home)
    prepare.require_extras(settings)
    texts = units(settings, is_system=system, run_as=run_as)
    if is_printed:
        if json:
            return output.print_json(texts)
        typer.echo("\n".join(f"# {name}\n{text}" for name, text in texts.items()), nl=False)
        return None
    if is_claimed(settings.home):
        raise Conflict(f"'autovibe up' runs the Hub of '{settings.home}'; stop it first: autovibe down")
    place = directory or default_directory(is_system=system)
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, text in texts.items():
        _write(place / name, text)
    commands = [["daemon-reload"], ["enable", "--now", *texts]]
    is_started = directory is None and _is_running()
    if is_started:
        for words in commands:
            _systemctl(words, is_system=system)
    if json:
        return output.print_json({"units": [place / name for name in texts], "is_started": is_started})
    for name in texts:
        output.say(f"Wrote '{place / name}'.")
    if not is_started:
        output.say("systemd was not told; do that with:")
        for words in commands:
            output.say(f"  {' '.join(_argv(words, is_system=system))}")
    if not system:
        output.say("A user's services end with the last login, unless: loginctl enable-linger")
    if settings.uses_embedded_node:
        output.say(f"Machines need the image on the node once: autovibe image upload {settings.image}")
    return None


@app.command()
def uninstall(system: System = False, directory: Directory = None, json: Json = False) -> None:
    """Stop and remove the units that `install` wrote. The home and the virtual machines stay."""
    place = directory or default_directory(is_system=system)
    found = [place / name for name in (HUB, NODE) if _is_ours(place / name)]
    if found and directory is None and _is_running():
        _systemctl(["disable", "--now", *(path.name for path in found)], is_system=system)
    for path in found:
        path.unlink()
    if found and directory is None and _is_running():
        _systemctl(["daemon-reload"], is_system=system)
    if json:
        return output.print_json({"removed": found})
    for path in found:
        output.say(f"Removed '{path}'.")
    if not found:
        output.say(f"There are no units of autovibe in '{place}'.")
    return None


def units(settings: Settings, *, is_system: bool, run_as: str | None = None) -> dict[str, str]:
    """The text of each unit by its file's name: the Hub's, and the node's where the settings use it."""
    user = (run_as or os.environ.get("SUDO_USER") or getpass.getuser()) if is_system else None
    home = str(settings.home)
    texts = {}
    if settings.uses_embedded_node:
        node = _service(settings, program("serve", "node", "--home", home), user, kill_mode="process")
        texts[NODE] = _unit("autovibe: the embedded node", [], node, is_system=is_system)
    needs = [NODE] if settings.uses_embedded_node else []
    hub = _service(settings, program("serve", "hub", "--home", home), user, kill_mode="mixed")
    texts[HUB] = _unit("autovibe: the Hub", needs, hub, is_system=is_system)
    return texts


def _unit(title: str, needs: list[str], service: list[str], *, is_system: bool) -> str:
    online = ["network-online.target"] if is_system else []  # a user's systemd does not know it
    lines = [MARK, "[Unit]", f"Description={title}", "StartLimitIntervalSec=0"]
    if wanted := [*online, *needs]:
        lines += [f"Wants={' '.join(wanted)}", f"After={' '.join(wanted)}"]
    lines += ["", "[Service]", *service]
    lines += ["", "[Install]", f"WantedBy={'multi-user.target' if is_system else 'default.target'}"]
    return "\n".join(lines) + "\n"


def _service(settings: Settings, argv: list[str], user: str | None, *, kill_mode: str) -> list[str]:
    command = " ".join(_quoted(word).replace("$", "$$") for word in argv)
    lines = ["Type=exec", f"ExecStart={command}"]
    if user is not None:
        lines.append(f"User={user}")
    if path := environment().get("PYTHONPATH"):
        lines.append(f"Environment={_quoted(f'PYTHONPATH={path}')}")
    lines += [f"Environment={_quoted(f'PATH={_search_path()}')}"]
    lines += [f"EnvironmentFile=-{_specified(str(settings.home / 'environment'))}"]
    lines += ["Restart=on-failure", "RestartSec=5", f"KillMode={kill_mode}", "TimeoutStopSec=20", "LimitNOFILE=524288"]
    lines += _HARDENED
    if user is not None:
        lines += _HARDENED_SYSTEM
    return lines


def _search_path() -> str:
    """As a service has it, with where this user's programs are."""
    return ":".join(dict.fromkeys([*os.environ.get("PATH", "").split(":"), "/usr/local/bin", "/usr/bin", "/usr/sbin"]))


def _specified(text: str) -> str:
    """`%` begins a specifier in every value."""
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    """One word of a list, as systemd.syntax(7) takes it; a command line has `$` doubled besides."""
    text = _specified(text)
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./$-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def default_directory(*, is_system: bool) -> Path:
    if is_system:
        return Path("/etc/systemd/system")
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "systemd" / "user"


def _is_ours(path: Path) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8").startswith(MARK)


def _write(path: Path, text: str) -> None:
    if path.exists() and not _is_ours(path):
        raise Conflict(f"'{path}' was not written by autovibe; move it away, or choose another --directory.")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.write_text(text, encoding="utf-8")
    draft.chmod(0o644)
    draft.replace(path)


def _is_running() -> bool:
    return Path("/run/systemd/system").is_dir() and shutil.which("systemctl") is not None


def _argv(words: list[str], *, is_system: bool) -> list[str]:
    return ["systemctl", *([] if is_system else ["--user"]), *words]


def _systemctl(words: list[str], *, is_system: bool) -> None:
    argv = _argv(words, is_system=is_system)
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise OperationFailed(f"'{' '.join(argv)}' ended with status {ended.returncode}: {ended.stderr.strip()[-500:]}")
