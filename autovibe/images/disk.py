"""The disk of an image: MBR, a FAT partition with loader, kernel and initramfs, and the tree as ext4.

Partitions are written at their offsets in one sparse file, so neither loop devices nor mounts are needed.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from autovibe.errors import OperationFailed
from autovibe.images.commands import Log
from autovibe.images.recipe import Recipe

SECTOR = 512
BOOT_START = 2**20
MBR_CODE = tuple(
    Path(path) for path in ("/usr/lib/syslinux/mbr/mbr.bin", "/usr/lib/SYSLINUX/mbr.bin", "/usr/share/syslinux/mbr.bin")
)


def make(recipe: Recipe, mode: str, tree: Path, disk: Path, log: Log) -> None:
    root_start = BOOT_START + recipe.boot_size_bytes
    with disk.open("wb") as file:
        file.truncate(recipe.size_bytes)
    disk.chmod(0o666)  # in a user namespace mapped ids write it
    _write_partition_table(recipe, root_start, disk, log)
    root_uuid = str(uuid.uuid4())
    as_root = (
        ["mmdebstrap", "--unshare-helper"] if mode != "root" else []
    )  # the tree's files are root's, as it sees them
    _fill_boot_partition(recipe, as_root, tree, disk, root_uuid, log)
    log.run(
        [
            *as_root,
            *("mke2fs", "-q", "-F", "-t", "ext4", "-L", "autovibe-root", "-U", root_uuid, "-m", "1", "-J", "size=64"),
            *("-E", f"offset={root_start},assume_storage_prezeroed=1", "-d", str(tree)),
            str(disk),
            f"{(recipe.size_bytes - root_start) // 1024}k",
        ]
    )


def _write_partition_table(recipe: Recipe, root_start: int, disk: Path, log: Log) -> None:
    table = [
        "label: dos",
        f"start={BOOT_START // SECTOR}, size={recipe.boot_size_bytes // SECTOR}, type=e, bootable",
        f"start={root_start // SECTOR}, type=83",
    ]
    log.run(["sfdisk", "--quiet", str(disk)], input="\n".join(table) + "\n")
    with disk.open("r+b") as file:
        file.write(next(path for path in MBR_CODE if path.exists()).read_bytes()[:440])


def _fill_boot_partition(recipe: Recipe, as_root: list[str], tree: Path, disk: Path, root_uuid: str, log: Log) -> None:
    kernels = sorted(tree.glob("boot/vmlinuz-*"))
    if len(kernels) != 1:
        raise OperationFailed(
            f"The image '{recipe.name}' has {len(kernels)} kernels; its recipe must install exactly one."
        )
    initramfs = tree / "boot" / kernels[0].name.replace("vmlinuz-", "initrd.img-")
    arguments = [f"root=UUID={root_uuid}", "rootfstype=ext4", "rootflags=noatime", "rw", *recipe.kernel_arguments]
    config = disk.with_name("syslinux.cfg")
    config.write_text(
        "DEFAULT linux\nPROMPT 0\nTIMEOUT 0\nLABEL linux\nKERNEL vmlinuz\nINITRD initrd\n"
        f"APPEND {' '.join(arguments)}\n",
        encoding="ascii",
    )
    config.chmod(0o644)
    partition = ["-i", f"{disk}@@{BOOT_START}"]
    geometry = ["-h", "64", "-s", "32", "-H", str(BOOT_START // SECTOR), "-T", str(recipe.boot_size_bytes // SECTOR)]
    log.run(["mformat", *partition, "-v", "AVBOOT", *geometry, "::"])
    for source, target in ((kernels[0], "vmlinuz"), (initramfs, "initrd"), (config, "syslinux.cfg")):
        log.run([*as_root, "mcopy", *partition, str(source), f"::{target}"])
    log.run(["syslinux", "--install", "--offset", str(BOOT_START), str(disk)])
