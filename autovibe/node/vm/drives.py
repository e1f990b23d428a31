"""Drive strings of a configuration (`local-lvm:vm-100-disk-0,size=8G`): read, written, and which volumes they name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from autovibe.node.refusal import Refusal
from autovibe.node.schema.options import DISK_KEYS
from autovibe.node.schema.parameters import split_properties
from autovibe.node.schema.property_strings import ANY_DRIVE

Drive = dict[str, str]

_NEW_DISK = re.compile(r"(?:([^:\s]+):)?(\d+(?:\.\d+)?)")
_NEW_CLOUDINIT = re.compile(r"(?:([^:\s]+):)cloudinit")
_CLOUDINIT_VOLUME = re.compile(r".*[/:]vm-\d+-cloudinit(\.\w+)?")
_UNUSED = re.compile(r"unused\d+")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse(text: str) -> Drive:
    """The properties of a drive string; the volume is under `file`."""
    try:
        return split_properties(ANY_DRIVE, text)
    except ValueError as error:
        raise Refusal(f"unable to parse drive options - {error}") from None


def render(drive: Mapping[str, str]) -> str:
    rest = [f"{key}={value}" for key, value in sorted(drive.items()) if key not in ("file", "import-from", "format")]
    return ",".join([drive["file"], *rest])


def is_cdrom(drive: Mapping[str, str]) -> bool:
    return drive.get("media") == "cdrom"


def is_cloudinit(drive: Mapping[str, str]) -> bool:
    return _CLOUDINIT_VOLUME.fullmatch(drive["file"]) is not None


def has_volume(drive: Mapping[str, str]) -> bool:
    return ":" in drive["file"]


def is_owned(drive: Mapping[str, str]) -> bool:
    """Whether the volume belongs to the VM and goes with it: an ISO image does not."""
    return has_volume(drive) and (not is_cdrom(drive) or is_cloudinit(drive))


def new_disk(drive: Mapping[str, str]) -> tuple[str | None, int] | None:
    """Storage (None: the call's default) and bytes of `<storage>:<GiB>`; None when the drive names a volume."""
    match = _NEW_DISK.fullmatch(drive["file"])
    return (match[1], int(float(match[2]) * (1 << 30))) if match else None


def new_cloudinit(drive: Mapping[str, str]) -> str | None:
    """The storage of `<storage>:cloudinit`."""
    match = _NEW_CLOUDINIT.fullmatch(drive["file"])
    return match[1] if match else None


def attached(values: Mapping[str, str]) -> Iterator[tuple[str, Drive]]:
    """The drives of a configuration, by bus and number."""
    for key in DISK_KEYS:
        if key in values:
            yield key, parse(values[key])


def disks(values: Mapping[str, str]) -> Iterator[tuple[str, Drive]]:
    """The attached drives that hold a disk: what snapshots, clones and templates are made of."""
    return ((key, drive) for key, drive in attached(values) if has_volume(drive) and not is_cdrom(drive))


def owned_volumes(values: Mapping[str, str]) -> list[str]:
    """Volumes that belong to the configuration, unused ones and a saved RAM too; each once."""
    found = [drive["file"] for _, drive in attached(values) if is_owned(drive)]
    found += [parse(text)["file"] for key, text in values.items() if _UNUSED.fullmatch(key)]
    found += [values["vmstate"]] if values.get("vmstate") else []
    return list(dict.fromkeys(found))


def add_unused(values: dict[str, str], volid: str) -> None:
    """Keep a detached volume as the first free `unusedN`."""
    if volid in owned_volumes(values):
        return
    number = next(number for number in range(256) if f"unused{number}" not in values)
    values[f"unused{number}"] = volid


def parse_size(text: str) -> int:
    """Bytes of `32G`, `1088M`, `4096`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)", text)
    if match is None:
        raise Refusal(f"unable to parse size '{text}'")
    return int(float(match[1]) * _UNITS[match[2]])


def render_size(size: int) -> str:
    """The largest unit that divides: 1G, 1088M; as in a drive's `size=`."""
    for unit in ("T", "G", "M", "K"):
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)


def boot_disk_size(values: Mapping[str, str]) -> int:
    """`maxdisk` of a VM: the size of its boot disk, 0 without one."""
    order = values.get("boot", "").removeprefix("order=").split(";")
    sizes = {key: drive.get("size", "0") for key, drive in disks(values)}
    first = next((key for key in order if key in sizes), None) or values.get("bootdisk") or next(iter(sizes), "")
    return parse_size(sizes.get(first, "0"))
