"""The checks of `doctor` on a real Proxmox: reachable, the token's privileges, storage, bridge, image.

What the Hub needs where, by the permissions that Proxmox VE 9's own API description names for the calls it makes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from autovibe.cli import prepare
from autovibe.cli.checks import Check
from autovibe.errors import AutovibeError

if TYPE_CHECKING:
    from autovibe.hypervisor import Proxmox
    from autovibe.settings import Settings

VM_PRIVILEGES = (
    "VM.Allocate",
    "VM.Audit",
    "VM.Clone",
    "VM.Config.CDROM",
    "VM.Config.CPU",
    "VM.Config.Cloudinit",
    "VM.Config.Disk",
    "VM.Config.HWType",
    "VM.Config.Memory",
    "VM.Config.Network",
    "VM.Config.Options",
    "VM.GuestAgent.Audit",
    "VM.PowerMgmt",
    "VM.Snapshot",
)
STORAGE_PRIVILEGES = ("Datastore.AllocateSpace", "Datastore.Audit")
IMPORT_PRIVILEGES = ("Datastore.Allocate", "Datastore.AllocateTemplate", "Datastore.Audit")
"""Allocate: the uploaded image is deleted once it has become a template."""


def needed(settings: Settings) -> dict[str, tuple[str, ...]]:
    """ACL path -> the privileges the Hub's token needs there."""
    paths = {
        "/vms": VM_PRIVILEGES,
        f"/storage/{settings.proxmox_storage}": STORAGE_PRIVILEGES,
        f"/sdn/zones/localnetwork/{settings.proxmox_bridge}": ("SDN.Use",),
        f"/nodes/{settings.proxmox_node}": ("Sys.Audit",),
    }
    both = {*paths.get(f"/storage/{settings.proxmox_import_storage}", ()), *IMPORT_PRIVILEGES}
    paths[f"/storage/{settings.proxmox_import_storage}"] = tuple(sorted(both))
    if settings.proxmox_pool:
        paths[f"/pool/{settings.proxmox_pool}"] = ("Pool.Audit", "VM.Allocate")
    return paths


def grant_line(path: str, privileges: list[str], token_id: str) -> str:
    """One line for a root shell on the node; typing it twice does no harm.

    A token with privilege separation holds what both it and its user hold, one without what its user holds: so both
    are granted.
    """
    user = token_id.partition("!")[0]
    role = "Autovibe" + "".join(part.capitalize() for part in path.split("/")[1:2])
    return (
        f"pveum role add {role} 2>/dev/null; pveum role modify {role} --append 1 --privs '{','.join(privileges)}' "
        f"&& pveum acl modify {path} --users '{user}' --tokens '{token_id}' --roles {role}"
    )


def proxmox(settings: Settings) -> list[Check]:
    from autovibe.hypervisor import read

    try:
        px = prepare.connect(settings)
        version = read.version(px)
    except AutovibeError as error:
        remedy = "Check proxmox_url, proxmox_token_file and proxmox_fingerprint: autovibe config show"
        return [Check("proxmox", "fail", error.message, remedy)]
    found = [Check("proxmox", "ok", f"Proxmox VE {version} at {settings.hypervisor_url}")]
    if settings.ssh_via != "address":
        remedy = 'ssh_via = "address" in config.toml'
        found.append(Check("ssh_via", "fail", "'forward' reaches only guests of the embedded node", remedy))
    for check in (_node, _privileges, _storages, _bridge, _template):
        try:
            found += check(px, settings)
        except AutovibeError as error:
            found.append(Check(check.__name__.strip("_"), "fail", error.message))
    return found


def _node(px: Proxmox, settings: Settings) -> list[Check]:
    from autovibe.hypervisor import read

    read.check_node(px)
    return [Check("node", "ok", settings.proxmox_node)]


def _privileges(px: Proxmox, settings: Settings) -> list[Check]:
    from autovibe.hypervisor import read

    token_id = (settings.read_proxmox_token() or "").partition("=")[0]
    everything = read.permissions(px)
    found = []
    for path, privileges in needed(settings).items():
        held = held_on(path, everything)
        if missing := [privilege for privilege in privileges if privilege not in held]:
            finding = f"the token lacks {', '.join(missing)}"
            found.append(Check(f"rights on {path}", "fail", finding, grant_line(path, missing, token_id)))
        else:
            found.append(Check(f"rights on {path}", "ok", f"all {len(privileges)} privileges"))
    return found


def held_on(path: str, permissions: dict[str, dict[str, int]]) -> set[str]:
    """Privileges on a path: Proxmox lists paths with rules of their own; others inherit what propagates (1) to them."""
    if path in permissions:
        return set(permissions[path])
    while path != "/":
        path = path.rsplit("/", 1)[0] or "/"
        if path in permissions:
            return {privilege for privilege, propagates in permissions[path].items() if int(propagates)}
    return set()


def _storages(px: Proxmox, settings: Settings) -> list[Check]:
    from autovibe.hypervisor import read

    wanted = ((settings.proxmox_storage, "images"), (settings.proxmox_import_storage, "import"))
    found = []
    for name, content in wanted:
        status = read.storage(px, name)
        finding = f"{status.type}, {status.avail / 1e9:.0f} GB free"
        if not status.active:
            found.append(Check(f"storage {name}", "fail", "it is not active", f"pvesm status --storage {name}"))
        elif content not in status.content:
            joined = ",".join((*status.content, content))
            remedy = f"pvesm set {name} --content {joined}"
            found.append(Check(f"storage {name}", "fail", f"it does not take '{content}'", remedy))
        elif status.avail < settings.min_free_gb * 1e9:
            found.append(Check(f"storage {name}", "fail", finding, "Free some space; nothing new is started."))
        else:
            found.append(Check(f"storage {name}", "ok", finding))
    return found


def _bridge(px: Proxmox, settings: Settings) -> list[Check]:
    bridges = sorted(str(one["iface"]) for one in px.get(f"nodes/{px.node}/network", type="any_bridge"))
    if settings.proxmox_bridge in bridges:
        return [Check("bridge", "ok", settings.proxmox_bridge)]
    finding = f"there is no '{settings.proxmox_bridge}'; the token sees: {', '.join(bridges) or 'none'}"
    return [Check("bridge", "fail", finding, "Set proxmox_bridge in config.toml")]


def _template(px: Proxmox, settings: Settings) -> list[Check]:
    from autovibe.hypervisor import read

    template = read.find_image(px, settings.image)
    if template is None:
        return [Check("template", "warn", f"no template of '{settings.image}' yet", "autovibe image upload")]
    return [Check("template", "ok", f"{template.name} (vmid {template.vmid})")]
