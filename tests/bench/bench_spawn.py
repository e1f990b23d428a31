"""A spawn through the Hub against a bare script over proxmoxer and paramiko: same calls, same SSH steps, same polling.

Both run on one stub node whose disks and starts take the seconds that a linked clone, a start and a boot took on real
hardware; the guest is a local sshd. The checkpoint is provisioned already, so neither runs a playbook.
"""

from __future__ import annotations

import shlex
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID, uuid4

import paramiko
import proxmoxer
from sqlmodel import select

from autovibe import app, schemas
from autovibe.assets import asset
from autovibe.domain import Checkpoint
from autovibe.domain.actor import Actor
from autovibe.domain.machine_type import SHELL
from autovibe.durable import Durable
from autovibe.guest import Guests, agent, program
from autovibe.hub import machines, projects
from autovibe.hub.pages import Cut
from autovibe.hypervisor import Proxmox, read
from autovibe.node.vm.qemu import forward_address
from autovibe.types import MachineStatus
from autovibe.workflows.world import digest_of
from tests.bench.figure import Figure
from tests.stub import node
from tests.stub.node import StubNode

ROUNDS = 7
DELAYS = {"clone": 1.0, "start": 0.9, "free": 0.3}
BOOT_SECONDS = 2.0
POLL_SECONDS = 0.25
PROMPT = "true"
ACTOR = Actor("bench")
_SLEEP = time.sleep


def figures() -> Iterator[Figure]:
    stub = node.start(DELAYS, BOOT_SECONDS)
    home = Path(tempfile.mkdtemp(prefix="av-bench-"))
    parts = app.build(stub.settings(home))
    parts.start()
    try:
        project = projects.create(parts.hub, ACTOR, schemas.ProjectOrder(name="bench")).uuid
        _mark_provisioned(parts, project)
        ours, own, peers = [], [], []
        with _Elsewhere() as elsewhere:
            for number in range(ROUNDS + 1):
                elsewhere.spans.clear()
                began, ended = _hub_spawn(parts, project)
                waited = elsewhere.seconds(began, ended)
                _remove(parts, project)
                bare = _bare_spawn(stub, home, 9800 + number)
                if number:  # the first round warms both
                    ours.append(ended - began)
                    own.append(ended - began - waited)
                    peers.append(bare)
        yield Figure(
            "spawn through the Hub / bare proxmoxer script",
            statistics.median(ours),
            statistics.median(peers),
            "s",
            1.15,
        )
        yield Figure("spawn: the Hub's own time", statistics.median(own) * 1000, 0, "ms", 150)
    finally:
        parts.close()
        stub.stop()
        shutil.rmtree(home, ignore_errors=True)


def _mark_provisioned(parts: app.Parts, project: UUID) -> None:
    with parts.hub.store.transaction() as session:
        genesis = session.exec(select(Checkpoint).where(Checkpoint.project_uuid == project)).one()
        genesis.provisioned_for = f"shell:{digest_of(asset('playbooks'))}"
        session.add(genesis)


class _Elsewhere:
    """Notes when the Hub's workflow waits: for Proxmox, for the guest, for its next poll. The rest is its own time."""

    _WAITS = ((Proxmox, "_call"), (Guests, "exec"), (Guests, "reach"), (Durable, "wait"), (read.time, "sleep"))

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []
        self._originals: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> _Elsewhere:
        for owner, name in self._WAITS:
            self._originals.append((owner, name, getattr(owner, name)))
            setattr(owner, name, self._noting(getattr(owner, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)

    def _noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*args, **options)
            finally:
                if threading.current_thread() is not threading.main_thread():
                    self.spans.append((began, time.perf_counter()))

        return call

    def seconds(self, began: float, ended: float) -> float:
        """How much of that time is covered by the spans; they may nest."""
        total, reached = 0.0, began
        for start, end in sorted(self.spans):
            start, end = max(start, reached), min(end, ended)
            if end > start:
                total += end - start
                reached = end
        return total


def _hub_spawn(parts: app.Parts, project: UUID) -> tuple[float, float]:
    """When it was asked for and when its events said that it is there."""
    began = time.perf_counter()
    order = schemas.MachineOrder(project_uuid=project, prompt=PROMPT)
    machine = machines.spawn(parts.hub, ACTOR, order).uuid
    while True:
        found = machines.show(parts.hub, machine)
        if found.status in (MachineStatus.active, MachineStatus.working):
            return began, time.perf_counter()
        assert found.status == MachineStatus.spawning, found.error_message
        _SLEEP(0.005)


def _remove(parts: app.Parts, project: UUID) -> None:
    """Terminate the project's machines, outside of what is measured."""
    for machine in machines.index(parts.hub, ACTOR, Cut(), project=project).machines:
        if not machine.status.is_final:
            machines.terminate(parts.hub, ACTOR, machine.uuid, schemas.TerminateOrder())
        while machines.show(parts.hub, machine.uuid).status != MachineStatus.terminated:
            _SLEEP(0.05)


def _bare_spawn(stub: StubNode, home: Path, vmid: int) -> float:
    """What a careful script does, with nothing remembered and no second try."""
    user, _, rest = stub.token.partition("!")
    name, _, value = rest.partition("=")
    began = time.perf_counter()
    api = proxmoxer.ProxmoxAPI(
        f"127.0.0.1:{stub.port}",
        user=user,
        token_name=name,
        token_value=value,
        verify_ssl=str(stub.home / "cert.pem"),
        timeout=30,
    )
    vm = api.nodes("autovibe").qemu

    def wait(upid: str) -> None:
        while (task := api.nodes("autovibe").tasks(upid).status.get())["status"] != "stopped":
            time.sleep(POLL_SECONDS)
        assert task["exitstatus"] == "OK", task

    wait(vm(stub.template).clone.post(newid=vmid, name=f"bare-{vmid}", description="bench"))
    key = paramiko.Ed25519Key.from_private_key_file(str(home / "hub/ssh/id_ed25519"))
    vm(vmid).config.put(
        ciuser=stub.settings(home).guest_user,
        sshkeys=quote(f"{key.get_name()} {key.get_base64()}", safe=""),
        ipconfig0="ip=dhcp",
        ciupgrade=0,
        agent=1,
        cores=1,
        memory=512,
        tags="autovibe",
    )
    wait(vm(vmid).status.start.post())
    transport = _connect(forward_address(vmid), stub.forward_port, stub.settings(home).guest_user, key)
    user = stub.settings(home).guest_user
    for name, order in _guest_steps(f"bare-{vmid}", user):
        channel = transport.open_session()
        channel.exec_command("exec " + shlex.join(["timeout", "60", *program.argv(name)]))
        channel.sendall(program.input_of(name, order))
        channel.shutdown_write()
        assert channel.recv_exit_status() == 0, channel.recv_stderr(4000)
        channel.close()
    took = time.perf_counter() - began
    transport.close()
    wait(vm(vmid).status.stop.post())
    wait(vm(vmid).delete(purge=1))
    return took


def _connect(host: str, port: int, user: str, key: paramiko.PKey) -> paramiko.Transport:
    while True:
        try:
            link = socket.create_connection((host, port), timeout=10)
        except OSError:
            time.sleep(POLL_SECONDS)
            continue
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport = paramiko.Transport(link)
        transport.connect(username=user, pkey=key)
        return transport


def _guest_steps(hostname: str, user: str) -> Iterator[tuple[str, dict[str, object]]]:
    """The programs the Hub's steps identify and start_agent run, with their orders."""
    yield "identify", {"instance": str(uuid4()), "hostname": hostname, "host_key": "", "now": time.time()}
    yield (
        "agent",
        {
            "machine": str(uuid4()),
            "command": list(SHELL.command),
            "prompt": PROMPT,
            "env": {},
            "user": user,
            "cwd": "/workspace",
            "unit": agent.UNIT,
            "slice": agent.SLICE,
            "log": agent.LOG,
            "state": agent.STATE,
        },
    )
