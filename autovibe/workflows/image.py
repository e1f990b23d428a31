"""Bring a guest image to a Proxmox node and make the template of it that machines are cloned from.

    upload to the import storage -> create a VM whose disk is imported from there -> template

Not a durable workflow: the CLI waits for it, and what a killed one left (named and owned by the image's hash) is
removed by the next, which begins anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from uuid import NAMESPACE_URL, UUID, uuid5

from autovibe.errors import (
    ConfigurationError,
    DeadlineExceeded,
    LimitExceeded,
    NotFound,
    NotYet,
)
from autovibe.hypervisor import Proxmox, VmidTaken, change, read

DEADLINE_SECONDS = 1800.0
CREATION_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.25

Step = Callable[[str, float | None], None]


def upload(
    px: Proxmox,
    *,
    storage: str,
    import_storage: str,
    bridge: str,
    image: str,
    path: Path,
    vmid_first: int,
    vmid_last: int,
    progress: Step = lambda _phase, _fraction: None,
) -> int:
    """The vmid of the template of exactly this image file; made unless it is there.

    `path` is `<image>-<hash>.qcow2` as `images.build` names it; of another name, the hash is that of its content.
    `progress` is told the phase and how much of it is done (None: unknown). Raises NotFound for a missing file,
    ConfigurationError for storages that cannot do it, and what `hypervisor` raises; a failure leaves nothing behind.
    """
    if not path.is_file():
        raise NotFound(f"There is no image file '{path}'; build it with: autovibe image build {image}")
    name = f"av-image-{image}-{_hash(image, path)[:8]}"
    owner = uuid5(NAMESPACE_URL, f"autovibe:{name}")
    with _lock(path.with_name(f".{name}.upload.lock"), progress):
        if (found := _find(px, name)) is not None:
            return found
        _check_storages(px, storage, import_storage)
        _remove_half_made(px, name, owner)
        vmids = _free_vmids(px, vmid_first, vmid_last)
        volid = f"{import_storage}:import/{path.name}"
        _settle(px, lambda: change.delete_volume(px, import_storage, volid), "the removal of an earlier upload")
        try:
            _send(px, import_storage, path, progress)
            progress("importing the disk", None)
            vmid = _create(px, name, owner, storage, bridge, volid, vmids)
            progress("making the template", None)
            _settle(px, lambda: change.template(px, vmid), f"the template {vmid}")
        except BaseException:
            _remove_half_made(px, name, owner)
            raise
        finally:
            _settle(px, lambda: change.delete_volume(px, import_storage, volid), "the removal of the upload")
    progress("ready", 1.0)
    return vmid


def _hash(image: str, path: Path) -> str:
    if match := re.fullmatch(rf"{re.escape(image)}-([0-9a-f]{{12}})", path.stem):
        return match[1]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


@contextmanager
def _lock(path: Path, progress: Step) -> Iterator[None]:
    """One upload of an image at a time from this host."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress("waiting for another upload of this image", None)
                time.sleep(0.5)
        yield


def _find(px: Proxmox, name: str) -> int | None:
    for vm in read.vms(px):
        if vm.name == name and vm.is_template and not vm.lock and read.IMAGE_TAG in vm.tags:
            return vm.vmid
    return None


def _check_storages(px: Proxmox, storage: str, import_storage: str) -> None:
    for wanted, content in ((storage, "images"), (import_storage, "import")):
        found = read.storage(px, wanted)
        if not found.active:
            raise ConfigurationError(f"Storage '{wanted}' of node '{px.node}' is not active.")
        if content not in found.content:
            contents = ",".join([*found.content, content])
            raise ConfigurationError(
                f"Storage '{wanted}' does not take content '{content}'; on the node run: "
                f"pvesm set {wanted} --content {contents}"
            )


def _send(px: Proxmox, import_storage: str, path: Path, progress: Step) -> None:
    size = max(1, path.stat().st_size)

    def told(sent: int) -> None:
        progress("uploading the image", min(1.0, sent / size))

    upid = change.upload(px, import_storage, path, told)
    _settle(px, lambda: upid, "the upload")


def _free_vmids(px: Proxmox, first: int, last: int) -> list[int]:
    """From the top: machines take theirs from the bottom. Raises LimitExceeded when there is none."""
    taken = read.taken_vmids(px)
    free = [vmid for vmid in range(last, first - 1, -1) if vmid not in taken]
    if not free:
        raise LimitExceeded(
            f"Every vmid from {first} to {last} is taken; widen vmid_first and vmid_last or remove VMs."
        )
    return free


def _create(px: Proxmox, name: str, owner: UUID, storage: str, bridge: str, volid: str, vmids: list[int]) -> int:
    for vmid in vmids:
        try:
            _settle(px, partial(_begin_create, px, vmid, name, owner, storage, bridge, volid), f"VM {vmid}")
        except VmidTaken:
            continue
        return vmid
    raise LimitExceeded(f"The vmids that were free were taken in the meantime ({len(vmids)} tried); try again.")


def _begin_create(px: Proxmox, vmid: int, name: str, owner: UUID, storage: str, bridge: str, volid: str) -> str | None:
    return change.create(
        px,
        vmid,
        owner=owner,
        name=name,
        description=f"Guest image of autovibe. Machines are cloned from it; it is made of {volid.rsplit('/', 1)[-1]}.",
        ostype="l26",
        cores=1,
        memory=1024,
        agent="1",
        serial0="socket",
        scsihw="virtio-scsi-pci",
        scsi0=f"{storage}:0,import-from={volid}",
        ide2=f"{storage}:cloudinit",
        net0=f"virtio,bridge={bridge}",
        boot="order=scsi0",
        tags=read.IMAGE_TAG,
    )


def _remove_half_made(px: Proxmox, name: str, owner: UUID) -> None:
    """Destroy VMs of this image that are not its finished template.

    While Proxmox still creates one for a killed predecessor, it has neither name nor owner: that is waited for.
    """
    patience = time.monotonic() + CREATION_PATIENCE_SECONDS
    while any(vm.lock == "create" for vm in read.vms(px)) and time.monotonic() < patience:
        time.sleep(_POLL_SECONDS)
    for vm in read.vms(px):
        if not (vm.is_template and vm.name == name) and read.owner(px, vm.vmid) == owner:
            _settle(px, partial(change.destroy, px, vm.vmid, owner=owner), f"the removal of VM {vm.vmid}")


def _settle(px: Proxmox, begin: Callable[[], str | None], what: str) -> None:
    """Begin and wait until it is done. Raises DeadlineExceeded naming `what`."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    upid: str | None = None
    while True:
        try:
            upid = upid or begin()
            if upid is not None:
                read.await_task(px, upid)
        except NotYet as waiting:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"Waited {DEADLINE_SECONDS:.0f} s for {what}: {waiting}.") from waiting
            time.sleep(_POLL_SECONDS)
        else:
            return
