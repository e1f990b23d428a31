"""What must be there before Hub and node can run: programs, ports, the guest image, its template."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from autovibe.cli.progress import Step
from autovibe.errors import ConfigurationError

if TYPE_CHECKING:
    from autovibe.hypervisor import Proxmox
    from autovibe.settings import Settings

QEMU_PROGRAMS = {"qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils"}
"""Programs the embedded node needs, and the Debian package of each."""


def missing_packages(programs: dict[str, str]) -> list[str]:
    """Debian packages of the programs that are not on PATH (or in sbin, which users have not on theirs)."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    return sorted({package for name, package in programs.items() if shutil.which(name, path=path) is None})


def apt_line(packages: list[str]) -> str:
    return f"sudo apt-get install -y --no-install-recommends {' '.join(packages)}"


def require_programs(programs: dict[str, str], purpose: str) -> None:
    if packages := missing_packages(programs):
        raise ConfigurationError(f"{purpose} needs packages that are missing; install them with: {apt_line(packages)}")


def require_extras(settings: Settings) -> None:
    """The Hub and the node are extras of the package."""
    wanted = {"hub": "dbos", **({"node": "h11"} if settings.uses_embedded_node else {})}
    if missing := [extra for extra, module in wanted.items() if importlib.util.find_spec(module) is None]:
        raise ConfigurationError(
            "This installation holds the client alone; install the rest with: "
            f"pip install 'autovibe[{','.join(missing)}]'"
        )


def require_ports(settings: Settings) -> None:
    """Raises ConfigurationError naming the port that another program has, and the flag that picks another."""
    wanted = [("--port", settings.hub_host, settings.hub_port)]
    if settings.uses_embedded_node:
        wanted += [
            ("--node-port", settings.node_host, settings.node_port),
            ("--node-port", "127.1.0.1", settings.node_port + 1),
        ]
    for flag, host, port in wanted:
        if not is_free(host, port):
            raise ConfigurationError(
                f"Port {port} of {host} is in use by another program; choose another with {flag}, "
                f"or see whose it is with: ss -ltnp 'sport = :{port}'"
            )


def is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def built_image(settings: Settings, name: str | None = None) -> Path | None:
    from autovibe import images

    return images.built(images.recipe(name or settings.image), settings.images_home)


def build_image(settings: Settings, step: Step, name: str | None = None, *, force: bool = False) -> Path:
    """The image of that recipe; built when it is missing (or `force`), which takes a minute or two."""
    from autovibe import images

    recipe = images.recipe(name or settings.image)
    if not force and (path := images.built(recipe, settings.images_home)) is not None:
        return path

    def show(progress: images.Progress) -> None:
        step(progress.phase, progress.fraction)

    return images.build(
        recipe,
        settings.images_home,
        ca_bundle=settings.ca_bundle,
        apt_sources=settings.apt_sources,
        progress=show,
        force=force,
    )


def connect(settings: Settings) -> Proxmox:
    """The Proxmox API of these settings. Raises ConfigurationError without a token."""
    from autovibe.hypervisor import Proxmox

    token = settings.read_proxmox_token()
    if token is None:
        raise ConfigurationError(
            "There is no token for the Proxmox API; set proxmox_token_file to a 0600 file with user@realm!id=uuid."
            if settings.proxmox_url
            else f"The embedded node has not run in '{settings.home}' yet; start it with: autovibe up"
        )
    fingerprint = settings.proxmox_fingerprint
    if settings.uses_embedded_node:
        fingerprint = (settings.node_home / "fingerprint").read_text(encoding="ascii").strip()
    return Proxmox(
        settings.hypervisor_url,
        token,
        node=settings.proxmox_node,
        fingerprint=fingerprint,
        ca_file=settings.proxmox_ca_file,
    )


def ensure_template(settings: Settings, step: Step, name: str | None = None, *, is_latest: bool = False) -> int:
    """The vmid of the image's template on the node; built and uploaded when it is missing.

    On a real Proxmox any template of the image will do, unless `is_latest`; on the embedded node it is always that of
    the recipe as it is now.
    """
    from autovibe.hypervisor import read
    from autovibe.workflows.image import upload

    px = connect(settings)
    image = name or settings.image
    step("looking for the template", None)
    if not (is_latest or settings.uses_embedded_node) and (found := read.find_image(px, image)) is not None:
        return found.vmid
    path = build_image(settings, step, image)
    return upload(
        px,
        storage=settings.proxmox_storage,
        import_storage=settings.proxmox_import_storage,
        bridge=settings.proxmox_bridge,
        image=image,
        path=path,
        vmid_first=settings.vmid_first,
        vmid_last=settings.vmid_last,
        progress=step,
    )
