"""A spawn through the Hub against a bare script over proxmoxer and paramiko: same calls, same SSH steps, same polling.

Both run on one stub node whose disks and starts take the seconds that a linked clone, a start and a boot took on real
hardware; the guest is a local sshd. The checkpoint is provisioned already, so neither runs a playbook.
"""

from __future__ import annotations

import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
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
from autovibe.guest import agent, command, program
from autovibe.hub import machines, projects
from autovibe.node.qemu import forward_address
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


def figures() -> Iterator[Figure]:
    stub = node.start(DELAYS, BOOT_SECONDS)
    home = Path(tempfile.mkdtemp(prefix="av-bench-"))
    parts = app.build(stub.settings(home))
    parts.start()
    try:
        project = projects.create(parts.hub, Actor("bench"), schemas.ProjectOrder(name="bench")).uuid
        _mark_provisioned(parts, project)
        ours, peers = [], []
        for number in range(ROUNDS + 1):
            hub_seconds, bare_seconds = _hub_spawn(parts, project), _bare_spawn(stub, home, 9800 + number)
            if number:  # the first round warms both
                ours.append(hub_seconds)
                peers.append(bare_seconds)
        hub, bare = statistics.median(ours), statistics.median(peers)
        yield Figure("spawn through the Hub / bare proxmoxer script", hub, bare, "s", 1.15)
        yield Figure("spawn: the Hub's own time (difference of medians)", max(0.0, hub - bare) * 1000, 0, "ms", 150)
    finally:
        parts.close()
        stub.stop()
        shutil.rmtree(home, ignore_errors=True)


def _mark_provisioned(parts: app.Parts, project: UUID) -> None:
    with parts.hub.store.transaction() as session:
        genesis = session.exec(select(Checkpoint).where(Checkpoint.project_uuid == project)).one()
        genesis.provisioned_for = f"shell:{digest_of(asset('playbooks'))}"
        session.add(genesis)


def _hub_spawn(parts: app.Parts, project: UUID) -> float:
    actor = Actor("bench")
    began = time.perf_counter()
    machine = machines.spawn(parts.hub, actor, schemas.MachineOrder(project_uuid=project, prompt=PROMPT)).uuid
    while True:
        found = machines.show(parts.hub, machine)
        if found.status in (MachineStatus.active, MachineStatus.working):
            break
        assert found.status == MachineStatus.spawning, found.error_message
        time.sleep(0.01)
    took = time.perf_counter() - began
    machines.terminate(parts.hub, actor, machine, schemas.TerminateOrder())
    while machines.show(parts.hub, machine).status != MachineStatus.terminated:
        time.sleep(0.05)
    return took


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
        argv = program.argv(name)
        channel.exec_command(command.line(argv, login=user, user="root", cwd=None, env=None, timeout_seconds=60))
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
