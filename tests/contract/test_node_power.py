"""Starting, ending, pausing: who may use which option, what is refused before the task, what ends what."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.node_parts import Client, FlagQemu, make_node

N = "/nodes/pvetest"
V = f"{N}/qemu/100"


@pytest.fixture
def client(tmp_path: Path, qemu: FlagQemu) -> Iterator[Client]:
    node = make_node(tmp_path / "node", qemu)
    found = Client(node)
    found.do("POST", f"{N}/qemu", vmid=100, name="one", memory=64, scsi0="local-lvm:1")
    yield found
    node.stop()


def as_root(client: Client) -> dict[str, str]:
    password = (client.node.home / "password").read_text().strip()
    login = {"username": "root@pam", "password": password}
    ticket = client.ask("POST", "/access/ticket", login, headers={}).data
    return {"Cookie": f"PVEAuthCookie={ticket['ticket']}", "CSRFPreventionToken": ticket["CSRFPreventionToken"]}


def test_options_for_root_alone(client: Client, qemu: FlagQemu) -> None:
    for verb, fields in (
        ("start", {"skiplock": 1, "force-cpu": "max", "stateuri": "tcp:1.2.3.4:1"}),
        ("stop", {"skiplock": 1, "keepActive": 1, "migratedfrom": "pvetest"}),
        ("shutdown", {"skiplock": 1, "keepActive": 1}),
    ):
        answer = client.ask("POST", f"{V}/status/{verb}", fields)
        assert answer.status == 400
        assert answer.json["errors"] == dict.fromkeys(fields, "Only root may use this option.")
    headers = as_root(client)
    answer = client.ask("POST", f"{V}/status/start", {"force-cpu": "qemu64", "machine": "q35"}, headers=headers)
    assert client.end_of(answer.data) == "OK"
    assert qemu.given[100][0]["runningcpu"] == "qemu64"
    assert qemu.given[100][0]["machine"] == "q35"
    assert "runningcpu" not in client.get(f"{V}/config")
    answer = client.ask("POST", f"{V}/status/stop", {"keepActive": 1}, headers=headers)
    assert client.end_of(answer.data) == "OK"
    assert client.ask("POST", f"{V}/status/start", {"stateuri": "tcp:1.2.3.4:1"}, headers=headers).status == 501


def test_what_a_stopped_vm_cannot(client: Client) -> None:
    for verb in ("suspend", "resume", "reset", "reboot"):
        answer = client.ask("POST", f"{V}/status/{verb}")
        assert (answer.status, answer.reason) == (500, "VM 100 not running")
    for verb in ("stop", "shutdown"):
        client.do("POST", f"{V}/status/{verb}")


def test_what_a_paused_vm_cannot(client: Client) -> None:
    client.do("POST", f"{V}/status/start")
    client.do("POST", f"{V}/status/suspend")
    for verb in ("shutdown", "reboot"):
        answer = client.ask("POST", f"{V}/status/{verb}")
        assert (answer.status, answer.reason) == (500, "VM is paused - cannot shutdown")
    upid = client.ask("POST", f"{V}/status/shutdown", {"forceStop": 1}).data
    assert client.end_of(upid) == "OK"
    assert "VM is paused - stop instead of shutdown" in client.log(upid)
    assert client.get(f"{V}/status/current")["status"] == "stopped"


def test_a_stop_overrules_a_shutdown(client: Client, qemu: FlagQemu) -> None:
    """A shutdown holds the VM's lock as long as it waits for the guest."""
    client.do("POST", f"{V}/status/start")
    qemu.ignores_power_button = True
    shutdown = client.ask("POST", f"{V}/status/shutdown", {"timeout": 600}).data
    upid = client.ask("POST", f"{V}/status/stop", {"overrule-shutdown": 1}).data
    assert client.end_of(upid) == "OK"
    assert client.end_of(shutdown) == "received interrupt"
    assert f"overruled qmshutdown tasks: {shutdown}" in client.log(upid)
    assert client.get(f"{V}/status/current")["status"] == "stopped"


def test_a_vm_that_ends_by_itself_is_stopped_at_once(client: Client, qemu: FlagQemu) -> None:
    client.do("POST", f"{V}/status/start")
    qemu.started.clear()
    assert client.get(f"{V}/status/current")["status"] == "stopped"
    client.do("POST", f"{V}/status/start")


def test_how_long_a_shutdown_waits(client: Client, qemu: FlagQemu) -> None:
    """The call's timeout, else the `down` of the VM's start-up order."""
    client.ask("PUT", f"{V}/config", {"startup": "order=1,down=0"})
    client.do("POST", f"{V}/status/start")
    qemu.ignores_power_button = True
    began = time.monotonic()
    assert client.run("POST", f"{V}/status/shutdown") == "VM quit/powerdown failed - got timeout"
    assert time.monotonic() - began < 30
    upid = client.ask("POST", f"{V}/status/shutdown", {"forceStop": 1}).data
    assert client.end_of(upid) == "OK"
    assert "VM still running - terminating now with SIGTERM" in client.log(upid)


def test_the_agent_is_asked_only_where_it_is_enabled(client: Client, qemu: FlagQemu) -> None:
    asked: list[bool] = []
    real = qemu.powerdown

    def powerdown(vmid: int, *, by_agent: bool = True) -> None:
        asked.append(by_agent)
        real(vmid)

    qemu.powerdown = powerdown  # type: ignore[method-assign]
    for agent in (0, 1):
        client.ask("PUT", f"{V}/config", {"agent": agent})
        client.do("POST", f"{V}/status/start")
        client.do("POST", f"{V}/status/shutdown")
    assert asked == [False, True]
