"""The options of a VM's configuration, as one table: a later option is one line here.

It is Proxmox's whole table. What needs hardware or programs this node does not hand out (hostpci, SEV, virtiofs …) is
held like everything else, and refused when the VM is started (`command_line`), as on a host that lacks them.
"""

from __future__ import annotations

from autovibe.node.schema import formats
from autovibe.node.schema.parameters import Param, Table, indexed
from autovibe.node.schema.property_strings import (
    AGENT,
    AUDIO,
    COUNT,
    CPU,
    CUSTOM_DATA,
    EFI_DISK,
    FLAG,
    HOST_PCI,
    IP_CONFIG,
    MACHINE,
    MEMORY,
    NET,
    NUMA_NODE,
    ON_BUS,
    RANDOM,
    SEV,
    SHARED_FOLDER,
    SHARED_MEMORY,
    SMBIOS,
    SPICE,
    TDX,
    TPM_STATE,
    UNUSED,
    USB,
    VGA,
    VOLUME,
    WATCHDOG,
)

__all__ = [
    "APPLIED_AT_ONCE", "CLOUDINIT", "DESCRIPTION", "DIGEST", "DISK_KEYS", "DRIVE_KEYS", "FLAG", "NODE", "OPTIONS",
    "ROOT_ONLY", "SNAPSHOT", "STORAGE", "TEXT", "UNUSED_KEYS", "VMID", "typed",
]  # fmt: skip

TEXT = Param()
NODE = Param(form=formats.node)
VMID = Param("integer", minimum=100, maximum=999_999_999)
STORAGE = Param(form=formats.storage_id)
DIGEST = Param(max_length=40)
DESCRIPTION = Param(max_length=8192, is_multiline=True)
SNAPSHOT = Param(form=formats.config_id, max_length=40)

_OS_TYPES = (
    "other", "wxp", "w2k", "w2k3", "w2k8", "wvista", "win7", "win8", "win10", "win11", "l24", "l26", "solaris",
)  # fmt: skip
_LOCKS = ("backup", "clone", "create", "migrate", "rollback", "snapshot", "snapshot-delete", "suspending", "suspended")
_KEYBOARDS = (
    "de", "de-ch", "da", "en-gb", "en-us", "es", "fi", "fr", "fr-be", "fr-ca", "fr-ch", "hu", "is", "it", "ja", "lt",
    "mk", "nl", "no", "pl", "pt", "pt-br", "sv", "sl", "tr",
)  # fmt: skip

DRIVE_KEYS = tuple(
    f"{bus}{number}"
    for bus, count in (("ide", 4), ("scsi", 31), ("virtio", 16), ("sata", 6))
    for number in range(count)
)
"""Buses a disk may sit on, in the order Proxmox names them."""

DISK_KEYS = (*DRIVE_KEYS, "efidisk0", "tpmstate0")
"""Every option that holds a volume the VM uses."""

UNUSED_KEYS = tuple(f"unused{number}" for number in range(256))

CLOUDINIT: Table = {
    "ciuser": TEXT,
    "cipassword": TEXT,
    "citype": Param(enum=("configdrive2", "nocloud", "opennebula")),
    "ciupgrade": FLAG,
    "cicustom": Param(form=CUSTOM_DATA),
    "sshkeys": Param(form=formats.url_encoded),
    "nameserver": Param(form=formats.hosts),
    "searchdomain": TEXT,
    **indexed("ipconfig", 32, Param(form=IP_CONFIG, rule=formats.ip_config)),
}

_FLAGS = (
    "acpi", "allow-ksm", "autostart", "freeze", "keephugepages", "kvm", "localtime", "numa", "onboot", "protection",
    "reboot", "tablet", "tdf", "template",
)  # fmt: skip

OPTIONS: Table = {
    "name": Param(form=formats.dns_name),
    "description": DESCRIPTION,
    "tags": Param(form=formats.tags),
    "lock": Param(enum=_LOCKS),
    "affinity": Param(form=formats.cpu_set),
    "agent": Param(form=AGENT),
    "amd-sev": Param(form=SEV),
    "arch": Param(enum=("x86_64", "aarch64")),
    "args": TEXT,
    "audio0": Param(form=AUDIO),
    "balloon": COUNT,
    "bios": Param(enum=("seabios", "ovmf")),
    "boot": Param(form=formats.boot),
    "bootdisk": Param(pattern=r"(ide|sata|scsi|virtio)\d+"),
    "cdrom": ON_BUS["ide"],
    "cores": Param("integer", minimum=1),
    "cpu": Param(form=CPU, rule=formats.not_empty),
    "cpulimit": Param("number", minimum=0, maximum=128),
    "cpuunits": Param("integer", minimum=1, maximum=262144),
    "efidisk0": Param(form=EFI_DISK),
    "hookscript": VOLUME,
    "hotplug": Param(form=formats.hotplug),
    "hugepages": Param(enum=("any", "2", "1024")),
    "intel-tdx": Param(form=TDX),
    "ivshmem": Param(form=SHARED_MEMORY),
    "keyboard": Param(enum=_KEYBOARDS),
    "machine": Param(form=MACHINE),
    "memory": Param(form=MEMORY),
    "migrate_downtime": Param("number", minimum=0),
    "migrate_speed": COUNT,
    "ostype": Param(enum=_OS_TYPES),
    "rng0": Param(form=RANDOM),
    "scsihw": Param(enum=("lsi", "lsi53c810", "virtio-scsi-pci", "virtio-scsi-single", "megasas", "pvscsi")),
    "shares": Param("integer", minimum=0, maximum=50000),
    "smbios1": Param(max_length=512, form=SMBIOS),
    "smp": Param("integer", minimum=1),
    "sockets": Param("integer", minimum=1),
    "spice_enhancements": Param(form=SPICE),
    "startdate": Param(pattern=r"now|\d{4}-\d{1,2}-\d{1,2}(T\d{1,2}:\d{1,2}:\d{1,2})?"),
    "startup": Param(form=formats.startup_order),
    "tpmstate0": Param(form=TPM_STATE),
    "vcpus": Param("integer", minimum=1),
    "vga": Param(form=VGA),
    "vmgenid": Param(pattern=formats.UUID_OR_BIT),
    "vmstatestorage": STORAGE,
    "watchdog": Param(form=WATCHDOG),
    **dict.fromkeys(_FLAGS, FLAG),
    **CLOUDINIT,
    **{key: ON_BUS[key.rstrip("0123456789")] for key in DRIVE_KEYS},
    **indexed("hostpci", 16, Param(form=HOST_PCI)),
    **indexed("net", 32, Param(form=NET)),
    **indexed("numa", 8, Param(form=NUMA_NODE)),
    **indexed("parallel", 3, Param(pattern=r"/dev/parport\d+|/dev/usb/lp\d+")),
    **indexed("serial", 4, Param(pattern=r"(/dev/[^,]+|socket)")),
    **dict.fromkeys(UNUSED_KEYS, Param(form=UNUSED)),
    **indexed("usb", 14, Param(form=USB)),
    **indexed("virtiofs", 10, Param(form=SHARED_FOLDER)),
}

ROOT_ONLY = ("args", "hookscript", "lock")
"""Options only root@pam itself may set: a token of root's is refused."""

APPLIED_AT_ONCE = frozenset(
    (
        "description", "hookscript", "lock", "migrate_downtime", "migrate_speed", "name", "onboot", "protection",
        "shares", "startup", "tags", "vmstatestorage",
    )
)  # fmt: skip
"""Options a running VM takes at once (QemuServer.pm fast_plug_option); of others some can be plugged in (`hotplug`)."""


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
