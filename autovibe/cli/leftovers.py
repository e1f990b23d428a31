"""Virtual machines of the embedded node that run on without Hub and node."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from autovibe.cli import output
from autovibe.errors import OperationFailed

if TYPE_CHECKING:
    from autovibe.node.vm.qemu import Qemu
    from autovibe.settings import Settings


def running_vms(settings: Settings) -> list[int]:
    """The vmids of the home's virtual machines that run now; none for a real Proxmox, which is not ours to ask."""
    if not settings.uses_embedded_node or importlib.util.find_spec("psutil") is None:
        return []
    if not settings.node_home.is_dir():
        return []
    return _qemu(settings).running()


def stop(settings: Settings, vmids: list[int]) -> None:
    """End virtual machines without the node, as pulling a plug does. Raises OperationFailed."""
    from autovibe.node.vm.qemu import QemuError

    for vmid in vmids:
        try:
            _qemu(settings).stop(vmid)
        except QemuError as error:
            raise OperationFailed(f"The virtual machine {vmid} does not end: {error}.") from error


def _qemu(settings: Settings) -> Qemu:
    """The node's own view of its processes; it needs no node that runs."""
    from autovibe.node.serve import run_directory
    from autovibe.node.vm.qemu import Qemu

    home = settings.node_home
    return Qemu(home, run_directory(home), accel="tcg", forward_port=settings.node_port + 1)


def tell(settings: Settings) -> None:
    """Say which virtual machines go on, and how to end them."""
    if vmids := running_vms(settings):
        listed = ", ".join(map(str, vmids))
        output.say(
            f"{len(vmids)} virtual machine(s) run on (vmid {listed}); 'autovibe up' takes them up again, "
            "and then 'autovibe down --machines' terminates them."
        )
