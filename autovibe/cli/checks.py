"""The checks of `doctor` on this machine. Each answers in a moment and raises nothing.

Nothing is changed, but that the node's home remembers which accelerator works.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from autovibe.cli import prepare
from autovibe.errors import AutovibeError

if TYPE_CHECKING:
    from autovibe.settings import Settings

COMFORTABLE_FREE_BYTES = 10_000_000_000
OPEN_FILES_WANTED = 1024
OPEN_FILES_NEEDED = 256


class Check(NamedTuple):
    """`remedy` is a line to type where there is one; "" when nothing needs to be done."""

    name: str
    status: Literal["ok", "warn", "fail"]
    finding: str
    remedy: str = ""


def of(settings: Settings) -> Iterator[tuple[str, Callable[[Settings], list[Check]]]]:
    """The checks that these settings call for, in the order they are shown."""
    yield "installation", installation
    yield "home", home
    yield "disk", disk
    yield "open files", open_files
    yield "ports", ports
    yield "image", image
    yield "ssh", ssh
    if settings.uses_embedded_node:
        yield "qemu", qemu
        yield "accelerator", accelerator
        yield "memory", memory
    else:
        from autovibe.cli import checks_proxmox

        yield "proxmox", checks_proxmox.proxmox
    yield "hub", hub


def installation(settings: Settings) -> list[Check]:
    try:
        prepare.require_extras(settings)
    except AutovibeError as error:
        return [Check("installation", "fail", "the client alone", error.message)]
    return [Check("installation", "ok", "client, hub" + (" and node" if settings.uses_embedded_node else ""))]


def home(settings: Settings) -> list[Check]:
    place = settings.home
    existing = place if place.exists() else next(parent for parent in place.parents if parent.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return [Check("home", "fail", f"'{existing}' cannot be written to", "Choose another one: AUTOVIBE_HOME=DIR")]
    try:
        has_key = settings.read_api_key() is not None
    except AutovibeError as error:
        return [Check("home", "fail", f"{place}", error.message)]
    return [Check("home", "ok", f"{place}" + ("" if has_key else " (no key yet; the first 'up' writes one)"))]


def disk(settings: Settings) -> list[Check]:
    place = settings.home
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    finding = f"{free / 1e9:.1f} GB free below {place}"
    if free < settings.min_free_gb * 1e9:
        return [Check("disk", "fail", finding, f"Nothing is started below {settings.min_free_gb:g} GB (min_free_gb).")]
    if free < COMFORTABLE_FREE_BYTES:
        return [Check("disk", "warn", finding, "An image takes about 1 GB, a machine what it writes.")]
    return [Check("disk", "ok", finding)]


def open_files(settings: Settings) -> list[Check]:  # noqa: ARG001
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = hard if hard != resource.RLIM_INFINITY else 1 << 20  # the Hub raises its own limit to the hard one
    finding = f"{soft} (at most {hard if hard != resource.RLIM_INFINITY else 'unlimited'})"
    if highest < OPEN_FILES_WANTED:
        status: Literal["warn", "fail"] = "fail" if highest < OPEN_FILES_NEEDED else "warn"
        return [Check("open files", status, finding, "Each machine needs a few: ulimit -Hn 4096")]
    return [Check("open files", "ok", finding)]


def ports(settings: Settings) -> list[Check]:
    wanted = [("hub", settings.hub_host, settings.hub_port)]
    if settings.uses_embedded_node:
        wanted.append(("node", settings.node_host, settings.node_port))
    ours = _own_pids(settings)
    found = []
    for name, host, port in wanted:
        if prepare.is_free(host, port):
            found.append(Check(f"port {port}", "ok", f"free for the {name}"))
        elif name in ours:
            found.append(Check(f"port {port}", "ok", f"our own {name} (pid {ours[name]})"))
        else:
            flag = "--port" if name == "hub" else "--node-port"
            remedy = f"Use another: autovibe up {flag} N   Whose it is: ss -ltnp 'sport = :{port}'"
            found.append(Check(f"port {port}", "fail", "another program listens there", remedy))
    return found


def _own_pids(settings: Settings) -> dict[str, int]:
    if importlib.util.find_spec("psutil") is None:
        return {}
    from autovibe.cli.processes import PidFile

    return {process.name: process.pid for process in PidFile(settings.home).read()}


def image(settings: Settings) -> list[Check]:
    if importlib.util.find_spec("yaml") is None:
        return []
    from autovibe.images.build import TOOLS

    try:
        built = prepare.built_image(settings)
    except AutovibeError as error:
        return [Check("image", "fail", error.message)]
    missing = prepare.missing_packages(TOOLS)
    if built is not None:
        found = [Check("image", "ok", f"{settings.image} is built ({built.stat().st_size / 1e6:.0f} MB)")]
    else:
        found = [
            Check("image", "warn", f"{settings.image} is not built yet", "'up' builds it, or: autovibe image build")
        ]
    if missing:
        status: Literal["warn", "fail"] = "warn" if built is not None else "fail"
        found.append(Check("image tools", status, f"missing: {', '.join(missing)}", prepare.apt_line(missing)))
    else:
        found.append(Check("image tools", "ok", "all there"))
    return found


def ssh(settings: Settings) -> list[Check]:  # noqa: ARG001
    if shutil.which("ssh") is None:
        return [
            Check(
                "ssh",
                "warn",
                "no OpenSSH client; 'machine ssh' uses one of its own",
                prepare.apt_line(["openssh-client"]),
            )
        ]
    return [Check("ssh", "ok", "OpenSSH client for 'machine ssh'")]


def qemu(settings: Settings) -> list[Check]:  # noqa: ARG001
    if packages := prepare.missing_packages(prepare.QEMU_PROGRAMS):
        return [Check("qemu", "fail", f"missing: {', '.join(packages)}", prepare.apt_line(packages))]
    done = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=False)
    return [Check("qemu", "ok", (done.stdout.splitlines() or ["?"])[0])]


def accelerator(settings: Settings) -> list[Check]:
    """KVM is tried by a boot, as the node does: /dev/kvm alone says little."""
    if settings.node_accel == "tcg":
        return [Check("accelerator", "ok", "TCG, by the setting node_accel")]
    if prepare.missing_packages(prepare.QEMU_PROGRAMS) or importlib.util.find_spec("psutil") is None:
        return []
    from autovibe.node.vm import accel

    settings.node_home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if accel.probe(settings.node_home) == "kvm":
        return [Check("accelerator", "ok", "KVM: a probe boot works")]
    device = Path("/dev/kvm")
    status: Literal["warn", "fail"] = "fail" if settings.node_accel == "kvm" else "warn"
    if not device.exists():
        reason, remedy = "there is no /dev/kvm", "Turn on virtualisation in the firmware, or nested virtualisation."
    elif not os.access(device, os.R_OK | os.W_OK):
        reason, remedy = "/dev/kvm is not open to this user", 'sudo usermod -aG kvm "$USER", then log in again'
    else:
        reason, remedy = (
            "a probe boot under KVM fails",
            "Nested virtualisation may be off: see 'kvm' in the kernel's log.",
        )
    return [Check("accelerator", status, f"TCG, which works and is slow: {reason}", remedy)]


def memory(settings: Settings) -> list[Check]:
    if importlib.util.find_spec("psutil") is None:
        return []
    import psutil

    available = psutil.virtual_memory().available
    wanted = (settings.guest_memory_mb or 1024) * 1_048_576
    finding = f"{available / 1e9:.1f} GB available, {wanted / 1e9:.1f} GB a machine"
    if available < 1.5 * wanted:
        return [Check("memory", "warn", finding, "Fewer MB a machine: guest_memory_mb = 512 in config.toml")]
    return [Check("memory", "ok", finding)]


def hub(settings: Settings) -> list[Check]:
    from autovibe.cli import connection

    if "hub" not in _own_pids(settings) and not settings.url:
        return [Check("hub", "ok", "not running; start it with: autovibe up")]
    try:
        with connection.client(settings, timeout_seconds=15) as client:
            health = client.health()
    except AutovibeError as error:
        return [Check("hub", "fail", "it does not answer", error.message)]
    if health.status == "healthy":
        return [Check("hub", "ok", f"healthy at {settings.hub_url}")]
    troubles = [
        f"{name}: {service.message}" for name, service in health.services.items() if service.status != "healthy"
    ]
    return [Check("hub", "warn", f"{health.status} at {settings.hub_url}", "; ".join(troubles))]
