"""The parameters of a storage's configuration, with their formats.

All that Proxmox knows are here, so that a call is judged as there; which of them a type takes says `storage_config`.
"""

from __future__ import annotations

import re

from autovibe.node.schema import formats
from autovibe.node.schema.options import FLAG, TEXT
from autovibe.node.schema.parameters import Param, Table

TYPES = (
    "btrfs", "cephfs", "cifs", "dir", "esxi", "iscsi", "iscsidirect", "lvm", "lvmthin", "nfs", "pbs", "rbd", "zfs",
    "zfspool",
)  # fmt: skip
_HOST = re.compile(r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[?[0-9a-fA-F:.]+\]?)")
_LIMIT = Param("number", minimum=0)
_KEPT = Param("integer", minimum=0)


def _path(text: str) -> None:
    if not re.fullmatch(r"/[^;()]+", text):
        raise ValueError("value does not look like a valid absolute path")


def _server(text: str) -> None:
    if not _HOST.fullmatch(text):
        raise ValueError("value does not look like a valid server name or IP address")


def _portal(text: str) -> None:
    host, colon, port = text.rpartition(":") if re.search(r"[\w\]]:\d+$", text) else (text, "", "")
    if not _HOST.fullmatch(host) or (colon and not 0 < int(port) < 65536):
        raise ValueError(f"unable to parse portal '{text}'")


def _portals(text: str) -> None:
    for portal in filter(None, re.split(r"[,;\s]+", text)):
        _portal(portal)


def _volume_group(text: str) -> None:
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9._-]*[a-zA-Z0-9]", text):
        raise ValueError(f"lvm volume group name '{text}' contains illegal characters")


def _block_size(text: str) -> None:
    if not re.fullmatch(r"[1-9]\d*[kKmMgG]?", text):
        raise ValueError("value does not look like a valid block size")


def _mount_options(text: str) -> None:
    if not re.fullmatch(r"\S+", text):
        raise ValueError("invalid mount options")


def _folders(text: str) -> None:
    for item in filter(None, re.split(r"[,;\s]+", text)):
        kind, _, folder = item.partition("=")
        if kind not in formats.CONTENTS or not folder or ".." in folder.split("/"):
            raise ValueError(f"unable to parse folder override '{item}'")


_PRUNING: Table = {
    "keep-all": FLAG,
    **{f"keep-{which}": _KEPT for which in ("last", "hourly", "daily", "weekly", "monthly", "yearly")},
}

UPDATE: Table = {
    "blocksize": Param(form=_block_size),
    "bwlimit": Param(form=dict.fromkeys(("clone", "default", "migration", "move", "restore"), _LIMIT)),
    "content": Param(form=formats.contents),
    "content-dirs": Param(form=_folders),
    "domain": Param(max_length=256),
    "fingerprint": Param(pattern=r"([A-Fa-f0-9]{2}:){31}[A-Fa-f0-9]{2}"),
    "format": Param(enum=("raw", "qcow2", "subvol", "vmdk")),
    "fs-name": Param(form=formats.config_id),
    "max-protected-backups": Param("integer", minimum=-1),
    "monhost": Param(form=_portals),
    "mountpoint": Param(form=_path),
    "nodes": Param(form=formats.nodes),
    "options": Param(form=_mount_options),
    "password": Param(max_length=256),
    "port": Param("integer", minimum=1, maximum=65535),
    "preallocation": Param(enum=("off", "metadata", "falloc", "full")),
    "prune-backups": Param(form=_PRUNING),
    "saferemove-stepsize": Param("integer", enum=("1", "2", "4", "8", "16", "32")),
    "server": Param(form=_server),
    "smbversion": Param(enum=("default", "2.0", "2.1", "3", "3.0", "3.11")),
    "subdir": Param(form=_path),
    "zfs-base-path": Param(form=_path),
    **dict.fromkeys(
        (
            "comstar_hg", "comstar_tg", "data-pool", "encryption-key", "is_mountpoint", "keyring", "lio_tpg",
            "master-pubkey", "namespace", "pool", "saferemove_throughput", "username",
        ),
        TEXT,
    ),
    **dict.fromkeys(
        (
            "create-base-path", "create-subdirs", "disable", "fuse", "krbd", "mkdir", "nocow", "nowritecache",
            "saferemove", "shared", "skip-cert-verification", "snapshot-as-volume-chain", "sparse", "tagged_only",
        ),
        FLAG,
    ),
}  # fmt: skip

CREATE: Table = {
    **UPDATE,
    "type": Param(optional=False, enum=TYPES),
    "base": Param(form=formats.volume_id),
    "export": Param(form=_path),
    "path": Param(form=_path),
    "portal": Param(form=_portal),
    "thinpool": Param(form=_volume_group),
    "vgname": Param(form=_volume_group),
    **dict.fromkeys(("authsupported", "datastore", "iscsiprovider", "share", "target"), TEXT),
}
