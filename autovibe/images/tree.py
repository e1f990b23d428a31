"""The tree of an image: packages by mmdebstrap, the recipe's files before they are configured, its steps after."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from autovibe.errors import ConfigurationError
from autovibe.images.commands import Log
from autovibe.images.recipe import Recipe

TRUST_PROGRAM = "/usr/local/lib/autovibe/trust.py"
HOST_CERTIFICATES = "/usr/local/lib/autovibe/host-certificates.pem"
LEFT_OUT = ("doc/*", "man/*", "info/*", "locale/*", "lintian/*", "bash-completion/*")
TYPICAL_LINES = 600
"""Lines of apt and dpkg that count, for the time before apt has said how many packages there are."""


@dataclass(frozen=True)
class Progress:
    """How far a build is: the phase in words, and the fraction (0-1) of the whole."""

    phase: str
    fraction: float


Report = Callable[[Progress], None]


def mode() -> str:
    """mmdebstrap's mode: "root" for root, else "unshare".

    Raises ConfigurationError where this user cannot make a user namespace with mapped ids.
    """
    if os.geteuid() == 0:
        return "root"
    probe = subprocess.run(["mmdebstrap", "--unshare-helper", "true"], capture_output=True, text=True, check=False)
    if probe.returncode == 0:
        return "unshare"
    reason = (probe.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise ConfigurationError(
        f"Building an image without root needs a user namespace with mapped ids; this user can make none ({reason}). "
        "Install the package 'uidmap', give the user a range in /etc/subuid and /etc/subgid, or build as root."
    )


def make(
    recipe: Recipe, mode: str, work: Path, tree: Path, *, sources: str, certificates: str, log: Log, progress: Report
) -> None:
    """Fill `tree`, telling how far it is (to 0.8) by what apt and dpkg say. `work` takes files of the build."""
    (work / "debian.sources").write_text(sources, encoding="utf-8")  # "": mmdebstrap knows Debian's mirror itself
    (work / "debian.sources").chmod(0o644)  # mapped ids read what lies here, whatever the umask
    _write_overlay(work / "overlay.tar", recipe, certificates)
    options = ["force-unsafe-io", "force-confold", "force-confdef"]
    options += [f"path-exclude=/usr/share/{each}" for each in LEFT_OUT]
    options += ["path-include=/usr/share/doc/*/copyright"]
    log.run(
        [
            "mmdebstrap",
            f"--mode={mode}",
            "--variant=apt",
            "--format=directory",
            "--verbose",
            f"--architectures={recipe.architecture}",
            f"--include={','.join(recipe.packages)}",
            '--aptopt=Acquire::Languages "none"',
            *(f"--dpkgopt={option}" for option in options),
            f"--essential-hook=tar-in {shlex.quote(str(work / 'overlay.tar'))} /",
            *(f'--customize-hook={shlex.quote(str(hook))} "$1"' for hook in _write_hooks(work, recipe, certificates)),
            recipe.suite,
            str(tree),
            *([str(work / "debian.sources")] if sources else []),
        ],
        environment={"TMPDIR": str(work), **_proxies()},
        on_line=_Meter(progress),
    )


def _write_overlay(path: Path, recipe: Recipe, certificates: str) -> None:
    """The recipe's files as one tar, all owned by root; tar makes the directories that are missing."""
    overlay = [(file.path, file.content.encode(), int(file.mode, 8)) for file in recipe.files]
    if certificates:
        program = (files("autovibe.images") / "programs/trust.py").read_bytes()
        overlay += [(TRUST_PROGRAM, program, 0o644), (HOST_CERTIFICATES, certificates.encode(), 0o644)]
    with tarfile.open(path, "w") as tar:
        for name, content, permissions in overlay:
            entry = tarfile.TarInfo(f".{name}")
            entry.size, entry.mode, entry.mtime = len(content), permissions, int(time.time())
            tar.addfile(entry, io.BytesIO(content))
    path.chmod(0o644)


def _write_hooks(work: Path, recipe: Recipe, certificates: str) -> list[Path]:
    """A file a step, since mmdebstrap's hooks are shell lines; each is called with the tree as its first argument."""
    commands = [["python3", TRUST_PROGRAM, HOST_CERTIFICATES], ["rm", TRUST_PROGRAM]] if certificates else []
    commands += [list(step.argv) or ["/bin/sh", "-euc", step.script] for step in recipe.steps]
    hooks = []
    for number, argv in enumerate(commands):
        path = work / f"step-{number:02}"
        path.write_text(f'#!/bin/sh\nexec chroot "$1" {shlex.join(argv)}\n', encoding="utf-8")
        path.chmod(0o755)
        hooks.append(path)
    return hooks


def _proxies() -> dict[str, str]:
    """The host's apt proxies as environment, where that names none: they serve the build, not the guest."""
    found = {}
    for scheme in ("http", "https"):
        if not os.environ.get(f"{scheme}_proxy"):
            command = ["apt-config", "shell", "PROXY", f"Acquire::{scheme}::Proxy"]
            said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            if match := re.fullmatch(r"PROXY='(.+)'\s*", said):
                found[f"{scheme}_proxy"] = match[1]
    return found


class _Meter:
    """Turns mmdebstrap's lines into progress: each package is fetched, unpacked and set up once."""

    def __init__(self, progress: Report) -> None:
        self.progress = progress
        self.expected = 0
        self.seen = 0

    def __call__(self, line: str) -> None:
        if match := re.search(r"(\d+) newly installed", line):
            self.expected += 3 * int(match[1])
        elif line.startswith(("Get:", "Unpacking ", "Setting up ")):
            self.seen += 1
            done = self.seen / max(self.expected, TYPICAL_LINES)
            self.progress(Progress("installing packages", 0.8 * min(done, 1.0)))
