"""Devices put into a running VM, taken out of it and changed, through QMP."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autovibe.node.vm import devices
from autovibe.node.vm.devices import options
from autovibe.node.vm.monitor import Monitor, MonitorError

UNPLUG_SECONDS = 20.0
"""How long a guest may take to let a device go: it is asked, and must answer."""

_POLL_SECONDS = 0.05
_CLOSE_SECONDS = 5.0
_BRIDGES = ("pci.1", "pci.2", "pci.3")


def present(monitor: Monitor) -> set[str]:
    """The ids of the VM's devices."""
    return {str(each["name"]) for each in monitor.execute("qom-list", path="/machine/peripheral")}


def has_bus(monitor: Monitor, properties: Mapping[str, Any]) -> bool:
    """Whether the PCI bus a device belongs on is there: those beyond the first are made at a start that needs them."""
    bus = properties.get("bus", "")
    return bus not in _BRIDGES or bus in present(monitor)


# Network cards


def add_card(
    monitor: Monitor, key: str, config: Mapping[str, str], forward: tuple[str, int], *, is_restricted: bool = False
) -> None:
    device = devices.nic_device(key, config, {})
    monitor.execute("netdev_add", **devices.netdev(key, config, forward, is_restricted=is_restricted))
    try:
        monitor.send("device_add", device)
    except MonitorError:
        monitor.execute("netdev_del", id=key)
        raise
    set_link(monitor, key, config[key])


def remove_card(monitor: Monitor, key: str) -> None:
    remove_device(monitor, key)
    monitor.execute("netdev_del", id=key)


def set_link(monitor: Monitor, key: str, text: str) -> None:
    monitor.execute("set_link", name=key, up=options(text).get("link_down") != "1")


# Drives


def add_drive(monitor: Monitor, key: str, path: Path, config: Mapping[str, str]) -> None:
    """Give the VM a drive, with the controller it sits on where that is not there. On failure nothing is left."""
    controller, device = devices.controller(key, config), devices.drive_device(key, config, {}, has_medium=True)
    node = devices.drive_node(key, path, options(config[key]))
    monitor.execute("blockdev-add", **node)
    try:
        for each in (controller, device):
            if each is not None and "iothread" in each:
                _add_thread(monitor, each["iothread"])
        if controller is not None and controller["id"] not in present(monitor):
            monitor.send("device_add", controller)
        monitor.send("device_add", device)
    except MonitorError:
        monitor.execute("blockdev-del", node_name=node["node-name"])
        raise
    set_throttle(monitor, key, config[key])


def _add_thread(monitor: Monitor, name: str) -> None:
    threads = {str(each["id"]) for each in monitor.execute("query-iothreads")}
    if name not in threads:
        monitor.execute("object-add", qom_type="iothread", id=name)


def remove_drive(monitor: Monitor, key: str, config: Mapping[str, str]) -> None:
    """Take a drive out; its files are closed when this returns. A controller that was its alone goes too."""
    nodes = _nodes_of(monitor, key)
    remove_device(monitor, key)
    close_nodes(monitor, nodes)
    controller = devices.controller(key, config)
    if controller is not None and str(controller["id"]).startswith("virtioscsi"):
        with contextlib.suppress(MonitorError):  # an empty controller that stays is taken by the next drive
            monitor.execute("device_del", id=controller["id"])


def close_nodes(monitor: Monitor, names: list[str]) -> None:
    """Close block nodes, a top before what it lies on; those another drive uses stay.

    QEMU lets go of a removed device's node some moments after the device, so the top is tried again.
    """
    deadline = time.monotonic() + _CLOSE_SECONDS
    for position, name in enumerate(name for name in names if not name.startswith("#")):
        while not _close(monitor, name) and position == 0 and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)


def _close(monitor: Monitor, name: str) -> bool:
    try:
        monitor.execute("blockdev-del", node_name=name)
    except MonitorError as error:
        return "in use" not in str(error)
    return True


def _nodes_of(monitor: Monitor, key: str) -> list[str]:
    """The block nodes of a drive, top first."""
    return _nodes_of_image(monitor, (_block(monitor, key).get("inserted") or {}).get("image"))


def nodes_below(monitor: Monitor, node: str) -> list[str]:
    """A block node and those it lies on."""
    for each in monitor.execute("query-named-block-nodes"):
        if each["node-name"] == node:
            return _nodes_of_image(monitor, each["image"])
    return []


def _nodes_of_image(monitor: Monitor, image: dict[str, Any] | None) -> list[str]:
    files: list[str] = []
    while image:
        files.append(str(image["filename"]))
        image = image.get("backing-image")
    nodes = monitor.execute("query-named-block-nodes", flat=True)
    return [str(node["node-name"]) for file in files for node in nodes if str(node["file"]) == file]


def _block(monitor: Monitor, key: str) -> dict[str, Any]:
    for block in monitor.execute("query-block"):
        qdev = str(block.get("qdev", ""))
        if qdev == key or key in qdev.split("/"):
            return dict(block)
    return {}


def change_medium(monitor: Monitor, key: str, path: Path | None) -> None:
    """Put another disc into a drive, or none. A guest that has locked its drive is not asked."""
    nodes = _nodes_of(monitor, key)
    monitor.execute("blockdev-open-tray", id=key, force=True)
    monitor.execute("blockdev-remove-medium", id=key)
    close_nodes(monitor, nodes)
    if path is not None:
        name = f"disc-{secrets.token_hex(4)}"
        node = devices.drive_node(key, path, {"media": "cdrom"}) | {"node-name": name}
        monitor.execute("blockdev-add", **node)
        monitor.execute("blockdev-insert-medium", id=key, node_name=name)
    monitor.execute("blockdev-close-tray", id=key)


def set_throttle(monitor: Monitor, key: str, text: str) -> None:
    """Limit a drive's throughput; without a limit before and after there is nothing to be told."""
    limits = devices.throttle(options(text))
    if any(limits.values()) or _is_limited(monitor, key):
        monitor.send("block_set_io_throttle", {"id": key, **limits})


def _is_limited(monitor: Monitor, key: str) -> bool:
    inserted = _block(monitor, key).get("inserted") or {}
    return any(inserted.get(name) for name in ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"))


# Everything


def remove_device(monitor: Monitor, name: str) -> None:
    """Ask the guest to let a device go, and wait until it has. Raises MonitorError when it does not."""
    if name not in present(monitor):
        return
    monitor.execute("device_del", id=name)
    deadline = time.monotonic() + UNPLUG_SECONDS
    while name in present(monitor):
        if time.monotonic() > deadline:
            raise MonitorError(f"error on hot-unplugging device '{name}'")
        time.sleep(_POLL_SECONDS)


def set_balloon(monitor: Monitor, megabytes: int) -> None:
    monitor.execute("balloon", value=megabytes << 20)


def set_processors(monitor: Monitor, wanted: int) -> None:
    """Plug processors in, or those plugged in out again, until there are so many."""
    slots = sorted(monitor.execute("query-hotpluggable-cpus"), key=lambda slot: sorted(slot["props"].items()))
    free = [slot for slot in slots if "qom-path" not in slot]
    count = len(slots) - len(free)
    for slot in free[: max(wanted - count, 0)]:
        name = f"cpu{slots.index(slot) + 1}"
        monitor.send("device_add", {"driver": slot["type"], "id": name, **slot["props"]})
    plugged = [name for name in present(monitor) if name.startswith("cpu")]
    for name in sorted(plugged, key=lambda name: int(name[3:]), reverse=True)[: max(count - wanted, 0)]:
        remove_device(monitor, name)
