"""Bringing a home up and down: the same functions for `up`, its background form, and the demo."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from autovibe.cli import connection, output, prepare, progress
from autovibe.cli.processes import Claim, PidFile, Process, tail
from autovibe.cli.supervise import Child, Supervisor, program
from autovibe.errors import AutovibeError, HypervisorUnavailable, OperationFailed

if TYPE_CHECKING:
    from autovibe.settings import Settings

NODE_SECONDS = 60.0
HUB_SECONDS = 90.0


class Running:
    """The Hub and, without a real Proxmox, the node of one home, supervised by this process."""

    def __init__(self, settings: Settings, claim: Claim, tell: Callable[[str], None] = output.say) -> None:
        self._settings = settings
        self._claim = claim
        self._pid_file = PidFile(settings.home)
        self._supervisor = Supervisor(tell, self._record)
        self._tell = tell

    def start(self) -> None:
        """Prepare and start everything; returns when the Hub answers. `stop` belongs to it, also when it fails."""
        settings = self._settings
        self._end_leftovers()
        prepare.require_ports(settings)
        if settings.uses_embedded_node:
            self._start_node()
        with progress.shown(f"Image '{settings.image}'") as step:
            prepare.ensure_template(settings, step)
        self._start_hub()
        self._supervisor.watch()

    def stop(self) -> None:
        self._supervisor.stop()
        self._pid_file.delete()
        self._claim.let_go()

    def _record(self, children: list[Process]) -> None:
        import os

        self._pid_file.write([Process.of("up", os.getpid()), *children])

    def _end_leftovers(self) -> None:
        """A killed `up` leaves its children; this one has the home's lock, so they are nobody's."""
        leftovers = [process for process in self._pid_file.read() if process.name != "up"]
        for process in sorted(leftovers, key=lambda each: each.name):  # the hub before the node
            self._tell(f"An earlier 'up' left its {process.name} (pid {process.pid}) behind; it is stopped.")
            process.end(8)

    def _start_node(self) -> None:
        settings = self._settings
        prepare.require_programs(prepare.QEMU_PROGRAMS, "The embedded node")
        words = ("serve", "node", "--home", str(settings.home), "--port", str(settings.node_port))
        node = Child("node", program(*words), settings.node_home / "console.log")
        with progress.shown("Node") as step:
            step("starting", None)
            self._supervisor.start(node)
            self._await(node, settings.node_home / "node.log", lambda: node_version(settings), NODE_SECONDS)

    def _start_hub(self) -> None:
        settings = self._settings
        words = ("serve", "hub", "--home", str(settings.home), "--port", str(settings.hub_port))
        hub = Child(
            "hub", [*program(*words), "--node-port", str(settings.node_port)], settings.hub_home / "console.log"
        )
        with progress.shown("Hub") as step:
            step("starting", None)
            self._supervisor.start(hub)
            self._await(hub, settings.hub_home / "hub.log", lambda: hub_answers(settings), HUB_SECONDS)

    def _await(self, child: Child, log: Path, ask: Callable[[], object], seconds: float) -> None:
        """Until `ask` raises nothing. A child that ends meanwhile, or answers too late, explains itself by its log."""
        deadline = time.monotonic() + seconds
        while True:
            if child.exit_status is not None:
                words = child.last_words() or tail(log)
                raise OperationFailed(f"The {child.name} ended with exit status {child.exit_status}:\n{words}")
            try:
                ask()
            except AutovibeError as error:
                if time.monotonic() > deadline:
                    late = f"The {child.name} does not answer after {seconds:g} s ({error})."
                    raise OperationFailed(f"{late} Its log '{log}' ends:\n{tail(log)}") from error
                time.sleep(0.2)
            else:
                return


def node_version(settings: Settings) -> str:
    """The version of the Proxmox API of these settings. Raises HypervisorUnavailable, also before its token exists."""
    from autovibe.hypervisor import read

    if settings.uses_embedded_node and not (settings.node_home / "fingerprint").exists():
        raise HypervisorUnavailable(f"The embedded node has never run in '{settings.home}'.")
    return read.version(prepare.connect(settings))


def hub_answers(settings: Settings) -> str:
    """The Hub's health in a word. Raises Unavailable."""
    with connection.client(settings, timeout_seconds=10) as client:
        return client.health().status
