"""The options of a VM's configuration, as one table: a later option is one line here.

Options that need hardware this node does not hand out (hostpci, usb, SEV, TDX, hugepages, virtiofs …) are not in it,
so that setting them is refused instead of having no effect.
"""

from __future__ import annotations

from autovibe.node import formats
from autovibe.node.parameters import Param, Table, indexed

FLAG = Param("boolean")
TEXT = Param()
COUNT = Param("integer", minimum=0)
NODE = Param(form=formats.node)
VMID = Param("integer", minimum=100, maximum=999_999_999)
STORAGE = Param(form=formats.storage_id)
DIGEST = Param(max_length=40)
DESCRIPTION = Param(max_length=8192, is_multiline=True)
SNAPSHOT = Param(form=formats.config_id, max_length=40)

_LIMITS = ("bps", "bps_rd", "bps_wr", "iops", "iops_max", "iops_rd", "iops_rd_max", "iops_wr", "iops_wr_max")
_LENGTHS = ("bps_max_length", "bps_rd_max_length", "bps_wr_max_length", "iops_max_length", "iops_rd_max_length")
_RATES = ("mbps", "mbps_max", "mbps_rd", "mbps_rd_max", "mbps_wr", "mbps_wr_max")

DRIVE: Table = {
    "file": Param(form=formats.drive_file, optional=False, default_key=True),
    "volume": Param(alias="file"),
    "import-from": Param(form=formats.volume_id),
    "size": Param(pattern=r"\d+(\.\d+)?[KMGT]?"),
    "format": Param(enum=("raw", "qcow", "qed", "qcow2", "vmdk", "cloop")),
    "media": Param(enum=("cdrom", "disk")),
    "aio": Param(enum=("native", "threads", "io_uring")),
    "cache": Param(enum=("none", "writethrough", "writeback", "unsafe", "directsync")),
    "discard": Param(enum=("ignore", "on")),
    "rerror": Param(enum=("ignore", "report", "stop")),
    "werror": Param(enum=("enospc", "ignore", "report", "stop")),
    "serial": Param(form=formats.url_encoded, max_length=60),
    "wwn": Param(pattern=r"(0x)?[0-9a-fA-F]{16}"),
    "queues": Param("integer", minimum=2),
    **dict.fromkeys(("backup", "detect_zeroes", "iothread", "replicate", "ro", "shared", "snapshot", "ssd"), FLAG),
    **dict.fromkeys((*_LIMITS, *_LENGTHS, "iops_wr_max_length"), COUNT),
    **dict.fromkeys(_RATES, Param("number", minimum=0)),
}

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
    **dict.fromkeys(("firewall", "link_down"), FLAG),
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
    "gw": Param(form=formats.address),
    "ip6": Param(form=formats.network_v6),
    "gw6": Param(form=formats.address),
}

_VOLUME = Param(form=formats.volume_id)
_BASE64 = Param(pattern=r"[A-Za-z0-9+/]+={0,2}")
_VGA_TYPES = (
    "cirrus", "qxl", "qxl2", "qxl3", "qxl4", "none", "serial0", "serial1", "serial2", "serial3", "std", "virtio",
    "virtio-gl", "vmware",
)  # fmt: skip
_OS_TYPES = (
    "other", "wxp", "w2k", "w2k3", "w2k8", "wvista", "win7", "win8", "win10", "win11", "l24", "l26", "solaris",
)  # fmt: skip
_LOCKS = ("backup", "clone", "create", "migrate", "rollback", "snapshot", "snapshot-delete", "suspending", "suspended")

DRIVE_KEYS = tuple(
    f"{bus}{number}"
    for bus, count in (("ide", 4), ("scsi", 31), ("virtio", 16), ("sata", 6))
    for number in range(count)
)
"""Buses a disk may sit on, in the order Proxmox names them."""

CLOUDINIT: Table = {
    "ciuser": TEXT,
    "cipassword": TEXT,
    "citype": Param(enum=("configdrive2", "nocloud", "opennebula")),
    "ciupgrade": FLAG,
    "cicustom": Param(form=dict.fromkeys(("meta", "network", "user", "vendor"), _VOLUME)),
    "sshkeys": Param(form=formats.url_encoded),
    "nameserver": Param(form=formats.addresses),
    "searchdomain": TEXT,
    **indexed("ipconfig", 32, Param(form=IP_CONFIG)),
}

_RNG: Table = {
    "source": Param(default_key=True, enum=("/dev/urandom", "/dev/random")),
    "max_bytes": COUNT,
    "period": COUNT,
}
_FLAGS = (
    "acpi", "autostart", "freeze", "kvm", "localtime", "numa", "onboot", "protection", "reboot", "tablet", "tdf",
    "template",
)  # fmt: skip

OPTIONS: Table = {
    "name": Param(form=formats.dns_name),
    "description": DESCRIPTION,
    "tags": Param(form=formats.tags),
    "lock": Param(enum=_LOCKS),
    "agent": Param(form=AGENT),
    "arch": Param(enum=("x86_64",)),
    "args": TEXT,
    "balloon": COUNT,
    "bios": Param(enum=("seabios",)),
    "boot": Param(form=formats.boot),
    "bootdisk": Param(pattern=r"(ide|sata|scsi|virtio)\d+"),
    "cores": Param("integer", minimum=1),
    "cpu": Param(form=formats.cpu_model),
    "cpulimit": Param("number", minimum=0, maximum=128),
    "cpuunits": Param("integer", minimum=1, maximum=262144),
    "hookscript": _VOLUME,
    "hotplug": Param(form=formats.hotplug),
    "machine": Param(
        form={
            "type": Param(
                max_length=40,
                default_key=True,
                pattern=r"pc|pc(-i440fx)?-\d+(\.\d+)+(\+pve\d+)?(\.pxe)?|q35|pc-q35-\d+(\.\d+)+(\+pve\d+)?(\.pxe)?",
            )
        }
    ),
    "memory": Param(form={"current": Param("integer", minimum=16, optional=False, default_key=True)}),
    "ostype": Param(enum=_OS_TYPES),
    "rng0": Param(form=_RNG),
    "scsihw": Param(enum=("lsi", "lsi53c810", "virtio-scsi-pci", "virtio-scsi-single", "megasas", "pvscsi")),
    "shares": Param("integer", minimum=0, maximum=50000),
    "smbios1": Param(
        max_length=512,
        form={
            "uuid": Param(pattern=r"[a-fA-F0-9]{8}(?:-[a-fA-F0-9]{4}){3}-[a-fA-F0-9]{12}"),
            "base64": FLAG,
            **dict.fromkeys(("family", "manufacturer", "product", "serial", "sku", "version"), _BASE64),
        },
    ),
    "smp": Param("integer", minimum=1),
    "sockets": Param("integer", minimum=1),
    "startdate": Param(pattern=r"now|\d{4}-\d{1,2}-\d{1,2}(T\d{1,2}:\d{1,2}:\d{1,2})?"),
    "startup": Param(form=formats.startup_order),
    "vcpus": Param("integer", minimum=1),
    "vga": Param(
        form={
            "type": Param(enum=_VGA_TYPES, default_key=True),
            "memory": Param("integer", minimum=4, maximum=512),
            "clipboard": Param(enum=("vnc",)),
        }
    ),
    "vmgenid": Param(pattern=formats.UUID_OR_BIT),
    "vmstatestorage": STORAGE,
    "watchdog": Param(pattern=r"(model=)?(i6300esb|ib700)(,action=[a-z]+)?"),
    **dict.fromkeys(_FLAGS, FLAG),
    **CLOUDINIT,
    **dict.fromkeys(DRIVE_KEYS, Param(form=DRIVE)),
    **indexed("net", 32, Param(form=NET)),
    **indexed("serial", 4, Param(pattern=r"socket")),
    **indexed("unused", 256, Param(form={"file": Param(form=formats.volume_id, default_key=True, optional=False)})),
}

ROOT_ONLY = ("args", "hookscript", "lock")
"""Options only root@pam itself may set: a token of root's is refused."""

APPLIED_AT_ONCE = frozenset(
    ("description", "hookscript", "lock", "name", "onboot", "protection", "shares", "startup", "tags", "vmstatestorage")
)
"""Options a running VM takes at once (QemuServer.pm fast_plug_option); all others wait for its next start."""


def typed(key: str, text: str) -> str | int | float:
    """A stored value as the API gives it: numbers and flags are numbers, everything else is a string."""
    param = OPTIONS.get(key)
    kind = param.kind if param is not None else "integer" if key == "snaptime" else "string"
    try:
        if kind in ("integer", "boolean"):
            return int(text)
        if kind == "number":
            number = float(text)
            return int(number) if number.is_integer() else number
    except ValueError:  # a file edited by hand
        return text
    return text
