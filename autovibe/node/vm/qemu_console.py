"""A VM's display and serial ports, as QEMU gives them out.

The display is a VNC server on a unix socket, closed to everybody until a password is set, and that only for a moment.

Behind each serial port is a ring buffer, which keeps what the guest writes however long nobody looks, in bounded
memory, also while no node runs. For a terminal it is exchanged for a socket, and put back when the terminal is closed
(`chardev-change`, which the guest does not notice).
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from autovibe.node.vm.monitor import Monitor, MonitorError

RING_BYTES = 256 << 10
_PASSWORD_SECONDS = 30
_CONNECT_SECONDS = 5.0
_VGA = ("std", "cirrus", "vmware", "qxl", "virtio")
_VGA_MEMORY = {"std": "VGA", "cirrus": "cirrus-vga", "vmware": "vmware-svga", "qxl": "qxl-vga"}


def chardev(port: str) -> str:
    """The name QEMU knows a serial port by; the first is the console whose output the node keeps."""
    return "console" if port == "serial0" else port


def arguments(config: Mapping[str, str], vnc: str) -> Iterator[str]:
    """QEMU's arguments for display and serial ports; `vnc` is the path of the display's socket, commas doubled."""
    kind, memory = _vga(config.get("vga", ""))
    yield from ("-display", "none", "-vga", kind, "-vnc", f"unix:{vnc},password=on")
    if memory and kind in _VGA_MEMORY:
        yield from ("-global", f"{_VGA_MEMORY[kind]}.vgamem_mb={memory}")
    for index in range(4):
        port = f"serial{index}"
        if index == 0 or config.get(port) == "socket":
            yield from ("-chardev", f"ringbuf,id={chardev(port)},size={RING_BYTES}")
            yield from ("-device", f"isa-serial,id={port},chardev={chardev(port)},index={index}")


def _vga(text: str) -> tuple[str, int]:
    """The kind of display adapter and its memory in MiB (0: as QEMU has it). A serial terminal needs none."""
    parts = [part for part in text.split(",") if part]
    words = {key: value for key, equals, value in (part.partition("=") for part in parts) if equals}
    kind = words.get("type") or next((part for part in parts if "=" not in part), "std")
    if kind == "none" or kind.startswith("serial"):
        return "none", 0
    kind = "qxl" if kind.startswith("qxl") else kind
    if kind not in _VGA:  # virtio-gl needs a display of the host's, which a server does not have
        kind = "virtio" if kind.startswith("virtio") else "std"
    memory = words.get("memory", "0")
    return kind, int(memory) if memory.isdecimal() else 0


def open_display(monitor: Monitor, path: Path, password: str) -> socket.socket:
    """A connection to the VM's VNC server, which asks for the first 8 characters of `password`.

    Raises MonitorError.
    """
    monitor.execute("set_password", protocol="vnc", password=password[:8])
    monitor.execute("expire_password", protocol="vnc", time=f"+{_PASSWORD_SECONDS}")
    return _connect(path)


def open_serial(monitor: Monitor, port: str, path: Path) -> socket.socket:
    """A connection to a serial port, instead of its ring buffer. Raises MonitorError."""
    path.unlink(missing_ok=True)
    address = {"type": "unix", "data": {"path": str(path)}}
    backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    monitor.execute("chardev-change", id=chardev(port), backend=backend)
    try:
        return _connect(path)
    except MonitorError:
        close_serial(monitor, port, path)
        raise


def close_serial(monitor: Monitor, port: str, path: Path) -> None:
    """Back to the ring buffer; a VM that has stopped has none."""
    backend = {"type": "ringbuf", "data": {"size": RING_BYTES}}
    with contextlib.suppress(MonitorError):
        monitor.execute("chardev-change", id=chardev(port), backend=backend)
    path.unlink(missing_ok=True)


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_CONNECT_SECONDS)
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        raise MonitorError(f"unable to connect to '{path.name}': {error}") from error
    return connection
