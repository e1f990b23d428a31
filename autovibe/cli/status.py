"""autovibe status: where Hub and node of this home are, and how they do."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autovibe.cli import connection, leftovers, output
from autovibe.cli.exits import OK, UNREACHABLE
from autovibe.cli.output import Json
from autovibe.cli.up import Home
from autovibe.errors import AutovibeError

if TYPE_CHECKING:
    from autovibe.settings import Settings


def status(
    home: Home = None,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the exit status: 0 when the Hub answers.")] = False,
) -> None:
    """Show where the Hub and the node are and how they do. Exit status 6 when the Hub does not answer."""
    settings = connection.settings(home=home)
    found = gather(settings)
    if json:
        output.print_json(found)
    elif not quiet:
        _print(found)
    raise typer.Exit(UNREACHABLE if found["hub"]["health"] == "unreachable" else OK)


def gather(settings: Settings) -> dict[str, Any]:
    """home; hub: url, pid, health, version, services, active_machine_count; node: url, pid, health, name, storage."""
    pids = _pids(settings)
    hub: dict[str, Any] = {"url": settings.hub_url, "pid": pids.get("hub"), "health": "unreachable", "message": ""}
    node: dict[str, Any] = {
        "url": settings.hypervisor_url,
        "pid": pids.get("node"),
        "health": "unknown",
        "message": "",
        "name": settings.proxmox_node,
        "storage": settings.proxmox_storage,
        "is_embedded": settings.uses_embedded_node,
    }
    try:
        with connection.client(settings, timeout_seconds=15) as client:
            health = client.health()
        hub["health"] = health.status
        hub["version"] = health.version
        hub["services"] = {name: service.model_dump(mode="json") for name, service in health.services.items()}
        hub["active_machine_count"] = health.active_machine_count
        if proxmox := health.services.get("proxmox"):
            node.update(health=proxmox.status, message=proxmox.message)
    except AutovibeError as error:
        hub["message"] = error.message
    if hub["health"] == "unreachable" and importlib.util.find_spec("proxmoxer"):
        node.update(_ask_node(settings))
    return {
        "home": str(settings.home),
        "hub": hub,
        "node": node,
        "running_vmids": leftovers.running_vms(settings),
    }


def _ask_node(settings: Settings) -> dict[str, str]:
    from autovibe.cli.running import node_version

    try:
        return {"health": "healthy", "message": f"Proxmox VE {node_version(settings)}"}
    except AutovibeError as error:
        return {"health": "unreachable", "message": error.message}


def _pids(settings: Settings) -> dict[str, int]:
    """Of the processes `up` keeps, as far as they live."""
    if importlib.util.find_spec("psutil") is None or not connection.is_own(settings):
        return {}
    from autovibe.cli.processes import PidFile

    return {process.name: process.pid for process in PidFile(settings.home).read()}


def _print(found: dict[str, Any]) -> None:
    hub, node = found["hub"], found["node"]
    output.table(
        ("part", "health", "url", "pid", ""),
        (
            ("hub", hub["health"], hub["url"], hub["pid"], f"version {hub['version']}" if "version" in hub else None),
            ("node", node["health"], node["url"], node["pid"], f"{node['name']}, storage {node['storage']}"),
        ),
        empty="",
    )
    for message in (hub["message"], node["message"]):
        if message:
            output.say(message)
    for name, service in hub.get("services", {}).items():
        if service["status"] != "healthy":
            output.warn(f"{name} is {service['status']}: {service['message']}")
    output.say(f"Home: {found['home']}")
    if vmids := found["running_vmids"]:
        output.say(f"Running virtual machines: {', '.join(map(str, vmids))}")
