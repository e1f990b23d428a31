"""autovibe up and down: one home's Hub and node, in the foreground or behind a supervisor in the background."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autovibe.cli import config, connection, leftovers, output, prepare, progress
from autovibe.cli.exits import OK
from autovibe.cli.output import Json
from autovibe.cli.processes import Claim, PidFile, Process, is_claimed, tail
from autovibe.cli.supervise import environment, program
from autovibe.errors import OperationFailed, Unavailable

if TYPE_CHECKING:
    from autovibe.settings import Settings

Home = Annotated[Path | None, typer.Option(help="Where everything lies (AUTOVIBE_HOME).")]


def up(
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Run in the background; see 'autovibe down'.")] = False,
    home: Home = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The Hub's port; kept in config.toml.")] = None,
    node_port: Annotated[
        int | None, typer.Option(min=1, max=65534, help="The node's port; kept in config.toml.")
    ] = None,
    claim_descriptor: Annotated[int | None, typer.Option(hidden=True)] = None,
    json: Json = False,
) -> None:
    """Start the Hub and the embedded node, and whatever they need first: the guest image and its template."""
    settings = connection.own_settings(home=home, hub_port=port, node_port=node_port)
    prepare.require_extras(settings)
    claim = Claim(settings.home, claim_descriptor)
    if not claim.take():
        return _already_up(settings, json)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    _sign(settings)
    given = {"hub_port": port, "node_port": node_port}
    config.remember(settings.home, **{name: value for name, value in given.items() if value is not None})
    try:
        if detach:
            _in_background(settings, claim)
            _tell_where(settings, json, is_detached=True)
        else:
            _in_foreground(settings, claim, json)
    finally:
        claim.let_go()
    return None


def _in_foreground(settings: Settings, claim: Claim, json: bool) -> None:
    from autovibe.cli.running import Running

    running = Running(settings, claim)
    started = False
    try:
        running.start()
        started = True
        _tell_where(settings, json, is_detached=False)
        threading.Event().wait()
    except KeyboardInterrupt:
        output.say("\nStopping the Hub and the node …" if started else "\nInterrupted; stopping what was started …")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # one is enough: stopping is bounded
        running.stop()
    leftovers.tell(settings)
    raise typer.Exit(OK if started else 130)


def _sign(settings: Settings) -> None:
    """Write this process into the pid file before anything slow, and keep what a killed `up` has left in it."""
    file = PidFile(settings.home)
    left = [process for process in file.read() if process.name != "up"]
    file.write([Process.of("up", os.getpid()), *left])


def _interrupt(number: int, frame: Any) -> None:  # noqa: ARG001
    raise KeyboardInterrupt


def _in_background(settings: Settings, claim: Claim) -> None:
    """Build the image here, where its progress can be seen; then hand the home's lock to a process of its own."""
    if settings.uses_embedded_node:
        prepare.require_programs(prepare.QEMU_PROGRAMS, "The embedded node")
        if prepare.built_image(settings) is None:
            with progress.shown(f"Image '{settings.image}'") as step:
                prepare.build_image(settings, step)
    assert claim.descriptor is not None  # noqa: S101 - it was taken
    log = settings.home / "up.log"
    if log.exists() and log.stat().st_size > 1_000_000:
        log.replace(log.with_name("up.log.1"))
    words = ["up", "--home", str(settings.home), "--port", str(settings.hub_port)]
    words += ["--node-port", str(settings.node_port), "--claim-descriptor", str(claim.descriptor)]
    with log.open("ab") as file:
        start = file.tell()
        supervisor = subprocess.Popen(
            program(*words),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(claim.descriptor,),
            env=environment(),
        )
    try:
        _await_start(supervisor, log, start)
    except KeyboardInterrupt:
        supervisor.terminate()
        supervisor.wait()
        raise


def _await_start(supervisor: subprocess.Popen[bytes], log: Path, start: int) -> None:
    with progress.shown("Starting") as step:
        while "autovibe is up" not in (said := _since(log, start)):
            if supervisor.poll() is not None:
                raise OperationFailed(f"It did not start; '{log}' says:\n{said.strip() or tail(log)}")
            last = said.strip().splitlines()[-1] if said.strip() else "the supervisor"
            step(re.sub(r" \([^()]*\)$", "", last), None)
            time.sleep(0.2)


def _since(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode("utf-8", "replace")


def _tell_where(settings: Settings, json: bool, *, is_detached: bool) -> None:
    if json:
        return output.print_json(_where(settings))
    node = settings.hypervisor_url + ("" if settings.uses_embedded_node else " (Proxmox)")
    output.say("autovibe is up.", "bold green")
    output.say(f"  Hub     {settings.hub_url}   log {settings.hub_home / 'hub.log'}")
    output.say(f"  Node    {node}")
    output.say(f"  Key     {settings.credentials}")
    output.say("Next:")
    output.say("  autovibe project create hello")
    output.say("  autovibe machine spawn --project hello --prompt 'uname -a' --follow")
    output.say("  autovibe down" if is_detached else "  Ctrl-C stops the Hub and the node; machines stay.")
    return None


def _where(settings: Settings) -> dict[str, Any]:
    recorded = {process.name: process.pid for process in PidFile(settings.home).read()}
    return {
        "home": settings.home,
        "url": settings.hub_url,
        "node_url": settings.hypervisor_url,
        "credentials": settings.credentials,
        "pid": recorded.get("up"),
    }


def _already_up(settings: Settings, json: bool) -> None:
    recorded = {process.name: process.pid for process in PidFile(settings.home).read()}
    output.say(f"autovibe is already running in '{settings.home}' (pid {recorded.get('up', 'unknown')}).")
    _tell_where(connection.own_settings(home=settings.home), json, is_detached=True)


def down(
    machines: Annotated[bool, typer.Option("--machines", help="Terminate every machine first.")] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Stop the Hub and the node of this home. Virtual machines stay, unless --machines."""
    settings = connection.own_settings(home=home)
    ended = _terminate_all(settings) if machines else []
    recorded = PidFile(settings.home).read()
    was_running = is_claimed(settings.home) or bool(recorded)
    with progress.shown("Stopping", is_brief=True) as step:
        # The supervisor stops its children in order; whatever it leaves is ended here.
        for process in sorted(recorded, key=lambda each: ("up", "hub", "node").index(each.name)):
            step(process.name, None)
            process.end(14 if process.name == "up" else 8)
    PidFile(settings.home).delete()
    vms = leftovers.running_vms(settings)
    if json:
        return output.print_json({"was_running": was_running, "terminated": ended, "running_vmids": vms})
    output.say("Stopped." if was_running else f"Nothing was running in '{settings.home}'.")
    leftovers.tell(settings)
    return None


def _terminate_all(settings: Settings) -> list[str]:
    """Terminate every machine that lives, all at once; returns their names."""
    with connection.client(settings) as client:
        try:
            living = [machine for machine in client.machines.each() if not machine.status.is_final]
        except Unavailable as error:
            raise Unavailable(
                f"Machines are terminated by the Hub, which does not run; start it first. {error}"
            ) from error
        for machine in living:
            client.machines.terminate(machine.uuid, reason="autovibe down --machines")
        for machine in living:
            title = f"Terminating '{machine.name}'"
            with progress.waiting(title, resume="autovibe down --machines") as watch:
                client.machines.terminate(machine.uuid, reason="autovibe down --machines", wait=True, watch=watch)
        return [machine.name for machine in living]
