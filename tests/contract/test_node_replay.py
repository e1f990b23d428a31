"""What a real Proxmox VE 9.2 answered, asked of the node again: the recorded exchanges, in the states they assume.

The recordings lie beside the project, at ../shared/pve. Status, reason and error bodies must be equal; of a success,
the shape: the same keys with values of the same types. Every exchange is asked but those of `NOT_REPLAYED`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autovibe.node.access import auth
from autovibe.node.host import networks
from tests.contract.node_parts import Answer, Client, FlagAgent, FlagQemu, make_node
from tests.contract.pve_reference import exchanges

N = "/nodes/pvetest"
UPID = re.compile(r"UPID:pvetest:[0-9A-F]{8}:[0-9A-F]{8}:[0-9A-F]{8}:(\w+):([^:]*):root@pam(!\w+)?:")

NOT_REPLAYED = dict.fromkeys(
    (137, 138, 156), "status 596: the real daemon broke off at a character its status line cannot carry"
)
"""Numbers of exchanges and why they are not asked."""

# Keys that may be missing from an answer, or be more than was recorded, and why.
OPTIONAL = {
    "tags", "lock", "parent", "description", "pid", "cgroup-mode", "serial", "agent",  # where a VM has them
    "tokenid", "endtime",  # of tasks of root's own, of finished ones
    "pressurecpufull", "pressurecpusome", "pressureiofull", "pressureiosome", "pressurememoryfull",
    "pressurememorysome", "saved",
}  # fmt: skip


class RecordedAgent(FlagAgent):
    """An agent whose commands end, and whose files read, as those of the recordings did."""

    rows: list[dict[str, Any]]

    def exec_status(self, pid: int) -> dict[str, Any]:
        number = next(number for number in (132, 134, 136) if self.rows[number]["path"].endswith(f"pid={pid}"))
        found: dict[str, Any] = self.rows[number]["response"]["data"]
        return found

    def read_file(self, path: str, *, limit: int, offset: int = 0) -> dict[str, Any]:
        return {"content": "hello", "bytes-read": 5}


class RecordedQemu(FlagQemu):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__()
        self._rows = rows

    def agent(self, _vmid: int) -> FlagAgent:
        agent = RecordedAgent(self.answers, self.agent_calls)
        agent.rows = self._rows
        return agent


class Replay:
    """Asks recorded requests and collects how the answers differ."""

    def __init__(self, client: Client, qemu: FlagQemu, rows: list[dict[str, Any]]) -> None:
        self.client, self.qemu, self.rows = client, qemu, rows
        self.faults: list[str] = []
        self.asked: set[int] = set()
        self._upids: dict[str, str] = {}
        self.password = (client.node.home / "password").read_text().strip()
        login = client.ask("POST", "/access/ticket", {"username": "root@pam", "password": self.password}, headers={})
        self.ticket = login.data

    def ask(self, *numbers: int, authorization: str | None = None) -> None:
        for number in numbers:
            row = self.rows[number]
            answer = self._send(row, authorization)
            self.asked.add(number)
            for fault in compare(row, answer):
                self.faults.append(f"{number} {row['method']} {row['path']}: {fault}")
            data = answer.json.get("data") if answer.body else None
            if isinstance(data, str) and UPID.fullmatch(data):
                self._upids[str((row["response"] or {}).get("data"))] = data
                self.client.node.state.tasks.find(data).over.wait(60)

    def _send(self, row: dict[str, Any], authorization: str | None) -> Answer:
        headers = {}
        if row["auth"] == "token":
            headers["Authorization"] = authorization or self.client.authorization
        elif row["auth"] == "ticket":
            headers["Cookie"] = f"PVEAuthCookie={self.ticket['ticket']}"
            if row["status"] != 401:
                headers["CSRFPreventionToken"] = self.ticket["CSRFPreventionToken"]
        path = row["path"]
        for recorded, ours in self._upids.items():
            path = path.replace(recorded, ours)
        body = row["body"]
        data = None if body is None else (body if isinstance(body, str) else json.dumps(body)).encode()
        if data is not None:
            data = data.replace(b"REDACTED", self.password.encode() if path.endswith("/access/ticket") else b"1")
            if row["content_type"]:
                headers["Content-Type"] = row["content_type"]
        if data is not None and data.startswith(b"--"):
            data += b"\r\n" + data.split(b"\r\n", 1)[0] + b"--\r\n"  # the recordings are cut off
        return self.client.ask(row["method"], path, body=data, headers=headers)

    def do(self, method: str, path: str, **fields: Any) -> None:
        self.client.do(method, path, **fields)

    def set(self, vmid: int, key: str, value: str | None) -> None:
        """Put an option into a configuration, past all rules, or take it out."""
        configs = self.client.node.state.configs
        config = configs.load(vmid)
        config.values.pop(key, None)
        if value:
            config.values[key] = value
        configs.save(vmid, config)


def compare(row: dict[str, Any], answer: Answer) -> Iterator[str]:
    if (row["status"], row["reason"]) != (answer.status, answer.reason):
        yield f"answered {answer.status} '{answer.reason}', not {row['status']} '{row['reason']}'"
        return
    if (row["response_type"] or None) != answer.headers.get("content-type"):
        yield f"content type '{answer.headers.get('content-type')}', not '{row['response_type']}'"
    recorded = row["response"]
    if not recorded:
        if answer.body:
            yield f"has the body {answer.body!r}"
    elif row["status"] >= 400 or recorded.get("success") == 0:
        if recorded != answer.json:
            yield f"answered {answer.json}, not {recorded}"
    else:
        yield from differences("", recorded, answer.json)


def differences(where: str, recorded: Any, got: Any) -> Iterator[str]:
    if isinstance(recorded, dict) and isinstance(got, dict):
        for key in recorded.keys() ^ got.keys():
            if key not in OPTIONAL and not re.search(r"^/vms|^/storage/|^/nodes/|/", key):
                yield f"{where}.{key} is {'missing' if key in recorded else 'more than was recorded'}"
        for key in recorded.keys() & got.keys():
            yield from differences(f"{where}.{key}", recorded[key], got[key])
    elif isinstance(recorded, list) and isinstance(got, list):
        if recorded and got and all(isinstance(item, dict) and "key" not in item for item in (*recorded, *got)):
            for item in got:
                options = [list(differences(f"{where}[]", other, item)) for other in recorded]
                yield from min(options, key=len)
        elif bool(recorded) != bool(got):
            yield f"{where} has {len(got)} entries, not {len(recorded)}"
    elif isinstance(recorded, str) and UPID.fullmatch(recorded):
        theirs, ours = UPID.fullmatch(recorded), UPID.fullmatch(str(got))
        if where == ".data" and (not theirs or not ours or theirs.groups()[:2] != ours.groups()[:2]):
            yield f"{where} is {got}, not like {recorded}"
    elif not _is_same_type(recorded, got):
        yield f"{where} is {got!r}, not of the type of {recorded!r}"


def _is_same_type(recorded: Any, got: Any) -> bool:
    numbers = (int, float)
    if isinstance(recorded, numbers) and isinstance(got, numbers):
        return isinstance(recorded, bool) == isinstance(got, bool)
    return type(recorded) is type(got) or (recorded is None and isinstance(got, str))


@pytest.fixture
def replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replay]:
    rows = exchanges()
    monkeypatch.setattr(auth, "FAILED_LOGIN_DELAY_SECONDS", 0.05)
    monkeypatch.setattr(networks, "interfaces", dict)  # the host of the recordings had none configured
    qemu = RecordedQemu(rows)
    node = make_node(tmp_path / "node", qemu)
    yield Replay(Client(node), qemu, rows)
    node.stop()


def test_the_recorded_exchanges(replay: Replay) -> None:
    _life_of_one_vm(replay)
    _clones_and_refusals(replay)
    _storage(replay)
    _pools_and_access(replay)
    _guest(replay)
    _http(replay)
    _last(replay)
    missed = set(range(len(replay.rows))) - replay.asked - NOT_REPLAYED.keys()
    print(f"{len(replay.asked)} of {len(replay.rows)} recorded exchanges were replayed; the others:")
    for number, reason in NOT_REPLAYED.items():
        print(f"  {number} {replay.rows[number]['method']} {replay.rows[number]['path']}: {reason}")
    faults = [*replay.faults, *(f"{number} was not asked" for number in sorted(missed))]
    assert not faults, "\n" + "\n".join(faults)


def _life_of_one_vm(replay: Replay) -> None:
    qemu, client = replay.qemu, replay.client
    replay.ask(0, 1, 2, 3, 4, 5)
    upid = client.get(f"{N}/tasks")[0]["upid"]
    assert client.log(upid)[-1] == "TASK OK"
    replay.ask(6, 7, 8, 9, 10, 11)
    qemu.fails_with = "start failed: QEMU exited with code 1"
    replay.ask(12, 13, 14, 15, 16, 17, 18, 19, 20)
    assert client.get(f"{N}/tasks")[0]["status"] == "start failed: QEMU exited with code 1"
    qemu.fails_with = ""
    replay.do("POST", f"{N}/qemu/100/status/start")
    replay.ask(21, 22, 23, 24, 25, 26, 27)
    replay.do("POST", f"{N}/qemu/100/status/stop")
    replay.ask(28)
    replay.do("POST", f"{N}/qemu/100/status/start")
    replay.ask(*range(29, 47))
    replay.set(100, "serial0", None)  # the terminal of the recordings never came up
    replay.ask(47)
    replay.set(100, "serial0", "socket")
    qemu.ignores_power_button = True
    replay.ask(48, 49)
    qemu.ignores_power_button = False
    replay.ask(*range(50, 59))


def _clones_and_refusals(replay: Replay) -> None:
    replay.ask(*range(59, 69))
    replay.do("POST", f"{N}/qemu/100/clone", newid=302, full=1)
    replay.ask(*range(69, 78))
    replay.do("POST", f"{N}/qemu/302/status/start")
    replay.ask(78, 79)
    replay.do("POST", f"{N}/qemu/302/status/start")
    replay.set(302, "lock", "suspended")
    replay.ask(80, 81, 82)
    replay.set(302, "lock", "backup")
    replay.ask(*range(83, 95))
    replay.set(302, "lock", None)
    replay.do("POST", f"{N}/qemu/302/status/stop")


def _storage(replay: Replay) -> None:
    client = replay.client
    replay.ask(*range(95, 101))
    disks = client.node.state.disks  # the recording's file lost its binary bytes
    made = disks.path(disks.allocate("local", 999, size=32 << 20))
    made.replace(disks.path("local:import/t.qcow2", must_exist=False))
    replay.ask(101, 102, 103, 104, 105, 106)


def _pools_and_access(replay: Replay) -> None:
    replay.ask(107)
    assert replay.client.ask("PUT", "/pools", {"poolid": "lab1", "vms": "400"}).status == 200
    replay.ask(*range(108, 122))
    replay.do("DELETE", f"{N}/qemu/400")
    replay.ask(122, 123, 124, 125, 126)


def _guest(replay: Replay) -> None:
    rows, qemu = replay.rows, replay.qemu
    replay.ask(127, 128)
    replay.do("POST", f"{N}/qemu/500/status/start")
    names = {143: "network-get-interfaces", 144: "get-osinfo", 145: "get-host-name", 146: "get-fsinfo"}
    names |= {147: "get-time", 148: "get-users", 149: "info", 150: "fsfreeze-status"}
    names |= {151: "fsfreeze-freeze", 152: "fsfreeze-thaw"}
    qemu.answers = {name: rows[number]["response"]["data"]["result"] for number, name in names.items()}
    replay.ask(*range(129, 137), *range(139, 156))


def _http(replay: Replay) -> None:
    replay.ask(*range(157, 167))
    replay.client.ask("PUT", f"{N}/qemu/500/config", {"onboot": 1})
    replay.ask(167, *range(169, 176))
    replay.ask(168, authorization="PVEAPIToken=root@pam!autovibe=00000000-0000-0000-0000-000000000000")


def _last(replay: Replay) -> None:
    client = replay.client
    replay.do("POST", f"{N}/qemu/302/status/start")
    replay.set(302, "vga", None)
    replay.ask(176, 177)
    replay.do("POST", f"{N}/qemu/302/status/stop")
    replay.ask(*range(178, 183))
    for vmid in sorted((vm["vmid"] for vm in client.get(f"{N}/qemu")), reverse=True):
        client.run("POST", f"{N}/qemu/{vmid}/status/stop")
        replay.do("DELETE", f"{N}/qemu/{vmid}")
    replay.do("POST", f"{N}/qemu", vmid=100)
    replay.ask(183, 184, 185)
    for vmid in (101, 102):
        replay.do("POST", f"{N}/qemu", vmid=vmid, name=f"n{vmid}")
    replay.ask(*range(186, len(replay.rows)))
