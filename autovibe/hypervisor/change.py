"""Everything the Hub changes in Proxmox.

Each function may be called again after a crash and then finds its earlier effect: it answers None where what was asked
for is so already, the UPID of the task that does it now, or the UPID of a new task. NotYet means that a lock is in the
way; the caller comes back. Only a VM whose description begins with our owner line is destroyed.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

from autovibe.errors import HypervisorRefused, NotYet
from autovibe.hypervisor import Proxmox, VmidTaken, once_more, says
from autovibe.hypervisor import read as facts


def clone(
    px: Proxmox,
    *,
    source: int,
    vmid: int,
    owner: UUID,
    name: str,
    snapshot: str | None = None,
    full: bool = False,
    storage: str | None = None,
    pool: str = "",
    description: str = "",
) -> str | None:
    """Clone `source` (its `snapshot`, where given) to `vmid`; `storage` counts for full clones only.

    The description gets the owner line before whatever is given. Raises VmidTaken when somebody else's VM has the id.
    """

    def attempt() -> str | None:
        if _is_made(px, vmid, owner):
            return None
        return _make(
            px,
            vmid,
            f"{source}/clone",
            newid=vmid,
            name=name,
            full=full,
            snapname=snapshot,
            storage=storage if full else None,
            pool=pool or None,
            description=_owned(description, owner),
        )

    return once_more(attempt)


def create(px: Proxmox, vmid: int, *, owner: UUID | None = None, **values: Any) -> str | None:
    """Make a VM from nothing; `values` are Proxmox's own (`import-from` inside a drive imports an image)."""

    def attempt() -> str | None:
        if owner is not None and _is_made(px, vmid, owner):
            return None
        given = dict(values)
        if owner is not None:
            given["description"] = _owned(str(values.get("description", "")), owner)
        return _make(px, vmid, "", vmid=vmid, **_encoded(given))

    return once_more(attempt)


def configure(px: Proxmox, vmid: int, **values: Any) -> None:
    """One PUT of the configuration: `sshkeys` as plain lines, booleans as such; `delete` may be a list of keys."""
    once_more(lambda: px.change("put", _path(px, vmid, "config"), **_encoded(values)))


def resize(px: Proxmox, vmid: int, disk: str, size: str) -> str | None:
    """Grow a disk to `size`, absolute ("20G"), so that asking twice does no harm. Shrinking makes the task fail."""
    if size.startswith("+"):
        raise ValueError("A relative size would grow the disk twice when it is asked for twice.")
    return once_more(lambda: _upid(px.change("put", _path(px, vmid, "resize"), disk=disk, size=size)))


def start(px: Proxmox, vmid: int) -> str | None:
    return _switch(px, vmid, "start", "qmstart", is_done=lambda vm: vm.is_running)


def stop(px: Proxmox, vmid: int) -> str | None:
    """Pull the plug."""
    return _switch(px, vmid, "stop", "qmstop", is_done=lambda vm: not vm.is_running)


def shutdown(px: Proxmox, vmid: int, *, timeout_seconds: int = 60, force: bool = True) -> str | None:
    """Ask the guest to power off; with `force` the plug is pulled after `timeout_seconds`."""
    return _switch(
        px,
        vmid,
        "shutdown",
        "qmshutdown",
        is_done=lambda vm: not vm.is_running,
        timeout=timeout_seconds,
        forceStop=force,
    )


def pause(px: Proxmox, vmid: int) -> str | None:
    """Hold the VM's processors still; one that is not running is left alone."""

    def attempt() -> str | None:
        if not _existing(px, vmid).is_running:
            return None
        return _upid(px.change("post", _path(px, vmid, "status/suspend")))

    return once_more(attempt)


def snapshot(px: Proxmox, vmid: int, name: str, description: str = "", *, with_ram: bool = False) -> str | None:
    """Snapshot the disks, and the RAM of a running VM where asked.

    A finished snapshot of that name counts as ours: names hold a uuid.
    """

    def attempt() -> str | None:
        vm = _existing(px, vmid)
        is_listed = any(found.name == name for found in facts.snapshots(px, vmid))
        if vm.lock.startswith("snapshot"):
            running = facts.running_tasks(px, vmid, "qmsnapshot") if is_listed else []
            if running:
                return running[0]
            raise NotYet(f"VM {vmid} is locked ({vm.lock})")
        if is_listed:
            return None
        options = {"snapname": name, "description": description or None, "vmstate": with_ram or None}
        return _upid(px.change("post", _path(px, vmid, "snapshot"), **options))

    return once_more(attempt)


def delete_snapshot(px: Proxmox, vmid: int, name: str) -> str | None:
    def attempt() -> str | None:
        if facts.find_vm(px, vmid) is None:
            return None
        if running := facts.running_tasks(px, vmid, "qmdelsnapshot"):
            return running[0]
        if not any(found.name == name for found in facts.snapshots(px, vmid)):
            return None
        return _upid(px.change("delete", _path(px, vmid, f"snapshot/{name}")))

    return once_more(attempt)


def rollback(px: Proxmox, vmid: int, name: str) -> str | None:
    """Back to the snapshot; the VM is stopped before, and stays so."""

    def attempt() -> str | None:
        if running := facts.running_tasks(px, vmid, "qmrollback"):
            return running[0]
        return _upid(px.change("post", _path(px, vmid, f"snapshot/{name}/rollback")))

    return once_more(attempt)


def template(px: Proxmox, vmid: int) -> str | None:
    def attempt() -> str | None:
        if _existing(px, vmid).is_template:
            return None
        if running := facts.running_tasks(px, vmid, "qmtemplate"):
            return running[0]
        return _upid(px.change("post", _path(px, vmid, "template")))

    return once_more(attempt)


def destroy(px: Proxmox, vmid: int, *, owner: UUID | None) -> str | None:
    """Destroy the VM with its disks and snapshots; a running one is stopped first (NotYet until it is).

    Raises HypervisorRefused for a VM whose description does not begin with the owner line of `owner`. Without an owner
    the line is not asked for: only for a VM that the caller itself has made a moment ago.
    """

    def attempt() -> str | None:
        vm = facts.find_vm(px, vmid)
        if vm is None:
            return None
        if running := facts.running_tasks(px, vmid, "qmdestroy"):
            return running[0]
        if owner is not None:
            _check_owner(px, vm, owner)
        if vm.is_running:
            stop(px, vmid)
            raise NotYet(f"VM {vmid} is being stopped")
        options = {"purge": True, "destroy-unreferenced-disks": True}
        try:
            return _upid(px.change("delete", _path(px, vmid, ""), **options))
        except HypervisorRefused as error:
            if says(error, "is running"):
                raise NotYet(f"VM {vmid} is being stopped") from error
            raise

    return once_more(attempt)


def upload(px: Proxmox, storage: str, path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Send a disk image (or an .iso) to a storage; `progress` is told the bytes sent so far. Returns the UPID."""
    content = "iso" if path.suffix.lower() == ".iso" else "import"
    with _Watched(path, progress) as file:
        return str(px.upload(f"nodes/{px.node}/storage/{storage}/upload", content=content, filename=file))


def delete_volume(px: Proxmox, storage: str, volid: str) -> str | None:
    """Delete a volume, such as an uploaded image that was imported; None where there is none."""
    path = f"nodes/{px.node}/storage/{storage}/content"
    if not any(found.get("volid") == volid for found in px.get(path)):
        return None
    return _upid(once_more(lambda: px.change("delete", f"{path}/{volid}")))


# What the changes share


def _path(px: Proxmox, vmid: int, rest: str) -> str:
    return f"nodes/{px.node}/qemu/{vmid}/{rest}".rstrip("/")


def _upid(answer: Any) -> str | None:
    return str(answer) if answer else None


def _existing(px: Proxmox, vmid: int) -> facts.VM:
    vm = facts.find_vm(px, vmid)
    if vm is None:
        raise HypervisorRefused(
            f"Proxmox node '{px.node}' has no VM {vmid}.",
            details={"status": 500, "reason": f"VM {vmid} does not exist"},
        )
    return vm


def _is_made(px: Proxmox, vmid: int, owner: UUID) -> bool:
    """Whether our VM is there and finished. Raises VmidTaken for somebody else's, NotYet for one still in the making.

    While Proxmox makes a VM its configuration is a lock and nothing else, so that whose it is shows at the end only.
    """
    vm = facts.find_vm(px, vmid)
    if vm is None:
        return False
    found = facts.owner(px, vmid)
    if vm.lock in ("clone", "create") and found in (None, owner):
        raise NotYet(f"VM {vmid} is locked ({vm.lock})")
    if found != owner:
        raise VmidTaken(vmid)
    return True


def _make(px: Proxmox, vmid: int, rest: str, /, **values: Any) -> str | None:
    try:
        return _upid(px.change("post", f"nodes/{px.node}/qemu/{rest}".rstrip("/"), **values))
    except HypervisorRefused as error:
        if says(error, f"{vmid} already exists", f"unable to create VM {vmid}: config file already exists"):
            raise VmidTaken(vmid) from error
        raise


def _owned(description: str, owner: UUID) -> str:
    line = facts.owner_line(owner)
    return description if description.split("\n", 1)[0].strip() == line else f"{line}\n{description}".rstrip()


def _check_owner(px: Proxmox, vm: facts.VM, owner: UUID) -> None:
    found = facts.owner(px, vm.vmid)
    if found == owner:
        return
    if found is None and vm.lock in ("clone", "create"):
        raise NotYet(f"VM {vm.vmid} is locked ({vm.lock})")
    if facts.find_vm(px, vm.vmid) is None:
        return
    whose = f"belongs to '{found}'" if found else "is not one of autovibe's"
    raise HypervisorRefused(
        f"VM {vm.vmid} ('{vm.name}') is not destroyed: by its description it {whose}, not to '{owner}'.",
        details={"status": 0, "reason": "owner mismatch", "vmid": vm.vmid},
    )


def _switch(
    px: Proxmox, vmid: int, verb: str, kind: str, *, is_done: Callable[[facts.VM], bool], **options: Any
) -> str | None:
    def attempt() -> str | None:
        if is_done(_existing(px, vmid)):
            return None
        if running := facts.running_tasks(px, vmid, kind):
            return running[0]
        return _upid(px.change("post", _path(px, vmid, f"status/{verb}"), **options))

    return once_more(attempt)


def _encoded(values: dict[str, Any]) -> dict[str, Any]:
    """Proxmox wants `sshkeys` percent-encoded inside the form's own encoding, and lists of keys or tags as one text."""
    given = dict(values)
    if isinstance(given.get("sshkeys"), str):
        given["sshkeys"] = quote(given["sshkeys"].strip() + "\n", safe="")
    if isinstance(given.get("delete"), (list, tuple)):
        given["delete"] = ",".join(given["delete"])
    if isinstance(given.get("tags"), (list, tuple)):
        given["tags"] = ";".join(given["tags"])
    return given


class _Watched(io.FileIO):
    """A file that tells how far it was read; proxmoxer streams whatever is an IOBase."""

    def __init__(self, path: Path, progress: Callable[[int], None] | None) -> None:
        super().__init__(str(path), "rb")  # a name of another type travels as no name
        self._progress = progress

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size)
        if self._progress is not None:
            self._progress(self.tell())
        return data or b""
