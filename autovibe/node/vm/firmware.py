"""The firmware a VM starts with: SeaBIOS, which QEMU brings, or OVMF (UEFI) where the host has it installed.

OVMF keeps its variables in `efidisk0`; without one they are lost when the VM stops, as Proxmox warns.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from autovibe.node.disks import qemu_img
from autovibe.node.disks.volume import format_of
from autovibe.node.vm.devices import ConfigError


class Ovmf(NamedTuple):
    """The code, which all VMs share, and the variables as a new VM has them."""

    code: Path
    variables: Path


VARIABLES_BYTES = 528 << 10
"""The size of OVMF's variables in its builds for 4 MiB of flash."""

_FOLDERS = (Path("/usr/share/OVMF"), Path("/usr/share/edk2/x64"), Path("/usr/share/edk2/ovmf"))
_NAMES = (
    ("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"),
    ("OVMF_CODE.4m.fd", "OVMF_VARS.4m.fd"),
    ("OVMF_CODE.fd", "OVMF_VARS.fd"),
)


def find() -> Ovmf | None:
    for folder in _FOLDERS:
        for code, variables in _NAMES:
            if (folder / code).is_file() and (folder / variables).is_file():
                return Ovmf(folder / code, folder / variables)
    return None


def require() -> Ovmf:
    found = find()
    if found is None:
        raise ConfigError("bios: OVMF is not installed on this node; run: apt install ovmf")
    return found


def write_variables(path: Path) -> None:
    """Put the variables of a new VM into its volume."""
    source = require().variables
    qemu_img.run("convert", "-n", "-f", "raw", "-O", format_of(path), str(source), str(path))


def arguments(config: Mapping[str, str], drives: Mapping[str, Path]) -> list[str]:
    """Two flash chips for OVMF, nothing for SeaBIOS."""
    if config.get("bios", "seabios") != "ovmf":
        return []
    ovmf = require()
    found = ["-blockdev", _chip("code", ovmf.code, is_fixed=True), "-machine", "pflash0=code"]
    if "efidisk0" in drives:
        return [*found, "-blockdev", _chip("drive-efidisk0", drives["efidisk0"]), "-machine", "pflash1=drive-efidisk0"]
    return [*found, "-drive", f"if=pflash,unit=1,format=raw,snapshot=on,file={ovmf.variables}"]


def _chip(name: str, path: Path, *, is_fixed: bool = False) -> str:
    file = {"driver": "file", "filename": str(path)}
    return json.dumps({"driver": format_of(path), "node-name": name, "read-only": is_fixed, "file": file})


def decode(text: str) -> str:
    """A base64 value of `smbios1`. Raises ConfigError where it is none, or no text of one line."""
    try:
        plain = base64.b64decode(text, validate=True).decode()
    except ValueError:
        raise ConfigError(f"smbios1: '{text}' is not base64 of a text") from None
    if not plain.isprintable():
        raise ConfigError(f"smbios1: '{text}' has characters that cannot be printed")
    return plain
