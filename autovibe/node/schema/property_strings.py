"""The property strings of a VM's options (`k=v,k=v`): what a drive, a network card, a display … may say."""

from __future__ import annotations

from autovibe.node.schema import formats
from autovibe.node.schema.parameters import Param, Table

FLAG = Param("boolean")
COUNT = Param("integer", minimum=0)
VOLUME = Param(form=formats.volume_id)

_LIMITS = ("bps", "bps_rd", "bps_wr", "iops", "iops_max", "iops_rd", "iops_rd_max", "iops_wr", "iops_wr_max")
_LENGTHS = (
    "bps_max_length", "bps_rd_max_length", "bps_wr_max_length", "iops_max_length", "iops_rd_max_length",
    "iops_wr_max_length",
)  # fmt: skip
_RATES = ("mbps", "mbps_max", "mbps_rd", "mbps_rd_max", "mbps_wr", "mbps_wr_max")
THROTTLES = (*_LIMITS, *_LENGTHS, *_RATES)
"""Limits of a drive's throughput, which a running VM takes at once."""

_SIZE = Param(form=formats.disk_size)
_FILE = Param(form=formats.drive_file, optional=False, default_key=True)

DRIVE: Table = {
    "file": _FILE,
    "volume": Param(alias="file"),
    "import-from": VOLUME,
    "size": _SIZE,
    "format": Param(enum=("raw", "qcow", "qed", "qcow2", "vmdk", "cloop")),
    "media": Param(enum=("cdrom", "disk")),
    "aio": Param(enum=("native", "threads", "io_uring")),
    "cache": Param(enum=("none", "writethrough", "writeback", "unsafe", "directsync")),
    "discard": Param(enum=("ignore", "on")),
    "rerror": Param(enum=("ignore", "report", "stop")),
    "werror": Param(enum=("enospc", "ignore", "report", "stop")),
    "serial": Param(form=formats.url_encoded, max_length=60),
    "wwn": Param(pattern=r"0x[0-9a-fA-F]{16}"),
    "queues": Param("integer", minimum=2),
    "model": Param(form=formats.url_encoded, max_length=120),
    "product": Param(pattern=r"[A-Za-z0-9\-_\s]{,16}"),
    "vendor": Param(pattern=r"[A-Za-z0-9\-_\s]{,8}"),
    **dict.fromkeys(
        ("backup", "detect_zeroes", "iothread", "replicate", "ro", "scsiblock", "shared", "snapshot", "ssd"), FLAG
    ),
    **dict.fromkeys(_LIMITS, Param("integer")),
    **dict.fromkeys(_LENGTHS, Param("integer", minimum=1)),
    **{name.replace("_max_length", "_length"): Param(alias=name) for name in _LENGTHS if name.count("_") == 3},
    **dict.fromkeys(_RATES, Param("number")),
}
"""What a drive string may hold; each bus lacks some of it."""

_BUS_LACKS = {
    "ide": {"iothread", "product", "queues", "ro", "scsiblock", "vendor"},
    "sata": {"iothread", "model", "product", "queues", "ro", "scsiblock", "vendor"},
    "scsi": {"model"},
    "virtio": {"model", "product", "queues", "scsiblock", "ssd", "vendor", "wwn"},
}
ON_BUS = {
    bus: Param(form={name: param for name, param in DRIVE.items() if name not in lacks})
    for bus, lacks in _BUS_LACKS.items()
}
EFI_DISK: Table = {
    **{name: DRIVE[name] for name in ("file", "volume", "import-from", "size", "format")},
    "efitype": Param(enum=("2m", "4m")),
    "ms-cert": Param(enum=("2011", "2023", "2023w", "2023k")),
    "pre-enrolled-keys": FLAG,
}
TPM_STATE: Table = {
    **{name: DRIVE[name] for name in ("file", "volume", "import-from", "size")},
    "format": Param(enum=("raw", "qcow2", "vmdk")),
    "version": Param(enum=("v1.2", "v2.0")),
}
UNUSED: Table = {
    "file": Param(form=formats.volume_id, default_key=True, optional=False),
    "volume": Param(alias="file"),
}
ANY_DRIVE: Table = {**DRIVE, **EFI_DISK, **TPM_STATE}
"""For reading a stored drive, whatever its key."""

_MODELS = (
    "e1000", "e1000-82540em", "e1000-82544gc", "e1000-82545em", "e1000e", "i82551", "i82557b", "i82559er", "ne2k_isa",
    "ne2k_pci", "pcnet", "rtl8139", "virtio", "vmxnet3",
)  # fmt: skip
NET: Table = {
    "model": Param(enum=_MODELS, optional=False, default_key=True),
    "macaddr": Param(form=formats.mac_address),
    **dict.fromkeys(_MODELS, Param(alias="macaddr", key_alias="model")),
    "bridge": Param(form=formats.bridge_id),
    "queues": Param("integer", minimum=0, maximum=64),
    "rate": Param("number", minimum=0),
    "tag": Param("integer", minimum=1, maximum=4094),
    "trunks": Param(pattern=r"\d+(-\d+)?(;\d+(-\d+)?)*"),
    "mtu": Param("integer", minimum=1, maximum=65520),
    **dict.fromkeys(("firewall", "host-tunnel", "link_down"), FLAG),
}

AGENT: Table = {
    "enabled": Param("boolean", optional=False, default_key=True),
    "freeze-fs": FLAG,
    "freeze-fs-on-backup": Param(alias="freeze-fs"),
    "guest-fsfreeze": Param(alias="freeze-fs"),
    "fstrim_cloned_disks": FLAG,
    "type": Param(enum=("virtio", "isa")),
}

IP_CONFIG: Table = {
    "ip": Param(form=formats.network_v4),
    "gw": Param(form=formats.address_v4, requires="ip"),
    "ip6": Param(form=formats.network_v6),
    "gw6": Param(form=formats.address_v6, requires="ip6"),
}
CUSTOM_DATA: Table = dict.fromkeys(("meta", "network", "user", "vendor"), VOLUME)

AUDIO: Table = {
    "device": Param(enum=("ich9-intel-hda", "intel-hda", "AC97"), optional=False),
    "driver": Param(enum=("spice", "none")),
}
CPU: Table = {
    "cputype": Param(form=formats.cpu_type, default_key=True),
    "flags": Param(form=formats.cpu_flags),
    "guest-phys-bits": Param("integer", minimum=32, maximum=64),
    "hidden": FLAG,
    "hv-vendor-id": Param(pattern=r"[a-zA-Z0-9]{1,12}"),
    "phys-bits": Param(pattern=r"\d+|host"),
    "reported-model": Param(form=formats.cpu_type),
}
HOST_PCI: Table = {
    "host": Param(form=formats.pci_addresses, default_key=True),
    "mapping": Param(form=formats.config_id),
    "mdev": Param(pattern=r"[^/.:]+"),
    "romfile": Param(pattern=r"[^,;/]+"),
    **dict.fromkeys(("device-id", "vendor-id", "sub-device-id", "sub-vendor-id"), Param(pattern=r"0x[0-9a-fA-F]{4}")),
    **dict.fromkeys(("legacy-igd", "pcie", "rombar", "x-vga"), FLAG),
}
SHARED_MEMORY: Table = {
    "size": Param("integer", minimum=1, optional=False),
    "name": Param(pattern=r"[a-zA-Z0-9\-]+"),
}
MACHINE: Table = {
    "type": Param(
        max_length=40,
        default_key=True,
        pattern=r"pc|pc(-i440fx)?-\d+(\.\d+)+(\+pve\d+)?(\.pxe)?|q35|pc-q35-\d+(\.\d+)+(\+pve\d+)?(\.pxe)?"
        r"|virt(?:-\d+(\.\d+)+)?(\+pve\d+)?",
    ),
    "aw-bits": Param("number", minimum=32, maximum=64),
    "enable-s3": FLAG,
    "enable-s4": FLAG,
    "viommu": Param(enum=("intel", "virtio")),
}
MEMORY: Table = {"current": Param("integer", minimum=16, optional=False, default_key=True)}
_RANGES = r"\d+(?:-\d+)?(?:;\d+(?:-\d+)?)*"
NUMA_NODE: Table = {
    "cpus": Param(pattern=_RANGES, optional=False),
    "hostnodes": Param(pattern=_RANGES),
    "memory": Param("number"),
    "policy": Param(enum=("preferred", "bind", "interleave")),
}
RANDOM: Table = {
    "source": Param(default_key=True, enum=("/dev/urandom", "/dev/random", "/dev/hwrng"), optional=False),
    "max_bytes": COUNT,
    "period": COUNT,
}
SEV: Table = {
    "type": Param(default_key=True, enum=("std", "es", "snp"), optional=False),
    **dict.fromkeys(("allow-smt", "kernel-hashes", "no-debug", "no-key-sharing"), FLAG),
}
SMBIOS: Table = {
    "uuid": Param(pattern=r"[a-fA-F0-9]{8}(?:-[a-fA-F0-9]{4}){3}-[a-fA-F0-9]{12}"),
    "base64": FLAG,
    **dict.fromkeys(
        ("family", "manufacturer", "product", "serial", "sku", "version"), Param(pattern=r"[A-Za-z0-9+/]+={0,2}")
    ),
}
SPICE: Table = {"foldersharing": FLAG, "videostreaming": Param(enum=("off", "all", "filter"))}
TDX: Table = {
    "type": Param(default_key=True, enum=("tdx",), optional=False),
    "attestation": FLAG,
    "vsock-cid": Param("integer", minimum=2),
    "vsock-port": COUNT,
}
USB: Table = {
    "host": Param(
        default_key=True,
        pattern=r"(0x)?[0-9A-Fa-f]{4}:(0x)?[0-9A-Fa-f]{4}|\d+-\d+(\.\d+)*|[Ss][Pp][Ii][Cc][Ee]",
    ),
    "mapping": Param(form=formats.config_id),
    "usb3": FLAG,
}
_VGA_TYPES = (
    "cirrus", "qxl", "qxl2", "qxl3", "qxl4", "none", "serial0", "serial1", "serial2", "serial3", "std", "virtio",
    "virtio-gl", "vmware",
)  # fmt: skip
VGA: Table = {
    "type": Param(enum=_VGA_TYPES, default_key=True),
    "memory": Param("integer", minimum=4, maximum=512),
    "clipboard": Param(enum=("vnc",)),
}
SHARED_FOLDER: Table = {
    "dirid": Param(form=formats.config_id, default_key=True, optional=False),
    "cache": Param(enum=("auto", "always", "metadata", "never")),
    **dict.fromkeys(("direct-io", "expose-acl", "expose-xattr"), FLAG),
}
WATCHDOG: Table = {
    "model": Param(default_key=True, enum=("i6300esb", "ib700")),
    "action": Param(enum=("reset", "shutdown", "poweroff", "pause", "debug", "none")),
}
