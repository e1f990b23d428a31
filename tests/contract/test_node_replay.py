"""What a real Proxmox VE 9.2 answered, asked of the node again: the recorded exchanges, in the states they assume.

The recordings lie beside the project, at ../shared/pve. Status, reason and error bodies must be equal; of a success,
the shape: the same keys with values of the same types. Exchanges of routes the node does not have are not asked.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest

from autovibe.node import auth
from tests.contract.node_parts import Answer, Client, FlagQemu, make_node

RECORDED = Path(__file__).parents[3] / "shared" / "pve" / "exchanges.jsonl"
N = "/nodes/pvetest"
UPID = re.compile(r"UPID:pvetest:[0-9A-F]{8}:[0-9A-F]{8}:[0-9A-F]{8}:(\w+):([^:]*):root@pam(!\w+)?:")

# Keys that may be missing from an answer, or be more than was recorded, and why.
OPTIONAL = {
    "tags", "lock", "parent", "description", "pid", "cgroup-mode", "serial", "agent",  # where a VM has them
    "tokenid", "endtime",  # of tasks of root's own, of finished ones
    "pressurecpufull", "pressurecpusome", "pressureiofull", "pressureiosome", "pressurememoryfull",
    "pressurememorysome", "saved",
}  # fmt: skip


class Replay:
    """Asks recorded requests and collects how the answers differ."""

    def __init__(self, client: Client, qemu: FlagQemu) -> None:
        self.client, self.qemu = client, qemu
        self.rows = [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]
        self.faults: list[str] = []
        self.password = (client.node.home / "password").read_text().strip()
        login = client.ask("POST", "/access/ticket", {"username": "root@pam", "password": self.password}, headers={})
        self.ticket = login.data

    def ask(self, *numbers: int, authorization: str | None = None) -> None:
        for number in numbers:
            row = self.rows[number]
            answer = self._send(row, authorization)
            for fault in compare(row, answer):
                self.faults.append(f"{number} {row['method']} {row['path']}: {fault}")
            data = answer.json.get("data") if answer.body else None
            if isinstance(data, str) and UPID.fullmatch(data):
                self.client.node.state.tasks.find(data).over.wait(60)

    def _send(self, row: dict[str, Any], authorization: str | None) -> Answer:
        headers = {}
        if row["auth"] == "token":
            headers["Authorization"] = authorization or self.client.authorization
        elif row["auth"] == "ticket":
            headers["Cookie"] = f"PVEAuthCookie={self.ticket['ticket']}"
            if row["status"] != 401:
                headers["CSRFPreventionToken"] = self.ticket["CSRFPreventionToken"]
        body = row["body"]
        data = None if body is None else (body if isinstance(body, str) else json.dumps(body)).encode()
        if data is not None and row["path"].endswith("/access/ticket"):
            data = data.replace(b"REDACTED", self.password.encode())
        if data is not None and row["content_type"]:
            headers["Content-Type"] = row["content_type"]
        if data is not None and data.startswith(b"--"):
            data += b"\r\n" + data.split(b"\r\n", 1)[0] + b"--\r\n"  # the recordings are cut off
        return self.client.ask(row["method"], row["path"], body=data, headers=headers)

    def do(self, method: str, path: str, **fields: Any) -> None:
        self.client.do(method, path, **fields)

    def lock(self, vmid: int, lock: str | None) -> None:
        configs = self.client.node.state.configs
        config = configs.load(vmid)
        config.values.pop("lock", None)
        if lock:
            config.values["lock"] = lock
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
    if not RECORDED.exists():
        reason = f"the recorded exchanges are not at '{RECORDED}': nothing was compared with a real Proxmox"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    monkeypatch.setattr(auth, "FAILED_LOGIN_DELAY_SECONDS", 0.05)
    qemu = FlagQemu()
    node = make_node(tmp_path / "node", qemu)
    yield Replay(Client(node), qemu)
    node.stop()


def test_the_recorded_exchanges(replay: Replay) -> None:
    _life_of_one_vm(replay)
    _clones_and_refusals(replay)
    _storage(replay)
    _guest_and_http(replay)
    assert not replay.faults, "\n" + "\n".join(replay.faults)


def _life_of_one_vm(replay: Replay) -> None:
    qemu, client = replay.qemu, replay.client
    replay.ask(0, 1, 2, 3, 4)
    upid = client.get(f"{N}/tasks")[0]["upid"]
    assert client.log(upid)[-1] == "TASK OK"
    replay.ask(6, 7, 8, 9, 10, 11)
    qemu.fails_with = "start failed: QEMU exited with code 1"
    replay.ask(12, 14, 15, 17, 18, 19, 20)
    assert client.get(f"{N}/tasks")[0]["status"] == "start failed: QEMU exited with code 1"
    qemu.fails_with = ""
    replay.do("POST", f"{N}/qemu/100/status/start")
    replay.ask(21, 22, 23, 24, 25, 26, 27)
    replay.do("POST", f"{N}/qemu/100/status/stop")
    replay.ask(28)
    replay.do("POST", f"{N}/qemu/100/status/start")
    replay.ask(29, 30)
    replay.do("POST", f"{N}/qemu/100/snapshot", snapname="s4")
    replay.ask(32, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45)
    qemu.ignores_power_button = True
    replay.ask(48)
    replay.ask(49)
    qemu.ignores_power_button = False
    replay.ask(50, 51, 52, 53, 54, 55, 56, 57, 58)


def _clones_and_refusals(replay: Replay) -> None:
    replay.ask(59, 60, 61, 62, 63, 64, 65, 66, 67, 68)
    replay.do("POST", f"{N}/qemu/100/clone", newid=302, full=1)
    replay.ask(69, 70, 71, 72, 73, 74, 75, 76, 77)
    replay.lock(302, "suspended")
    replay.qemu.start(302, {}, {})
    replay.ask(79, 80, 81, 82)
    replay.lock(302, "backup")
    replay.ask(83, 85, 86, 87, 88, 89, 90, 91, 92, 94)
    replay.lock(302, None)
    replay.do("POST", f"{N}/qemu/302/status/stop")


def _storage(replay: Replay) -> None:
    client = replay.client
    replay.ask(95, 96, 97, 98, 100)
    disks = client.node.state.disks  # the recording's file lost its binary bytes
    made = disks.path(disks.allocate("local", 999, size=32 << 20))
    made.replace(disks.path("local:import/t.qcow2", must_exist=False))
    replay.ask(101)
    assert client.ask("PUT", f"{N}/qemu/400/config", {"delete": "scsi0"}).status == 200
    replay.ask(104, 105, 106, 114)
    replay.do("DELETE", f"{N}/qemu/400")
    replay.ask(123, 124, 125, 126)


def _guest_and_http(replay: Replay) -> None:
    rows, qemu = replay.rows, replay.qemu
    replay.ask(127, 128)
    replay.do("POST", f"{N}/qemu/500/status/start")
    names = {143: "network-get-interfaces", 144: "get-osinfo", 145: "get-host-name", 146: "get-fsinfo"}
    names |= {147: "get-time", 148: "get-users", 149: "info", 150: "fsfreeze-status"}
    names |= {151: "fsfreeze-freeze", 152: "fsfreeze-thaw"}
    qemu.answers = {name: rows[number]["response"]["data"]["result"] for number, name in names.items()}
    replay.ask(129, 130, 131, 139, 141, *names, 153, 154, 155, 157, 158, 159, 160, 161, 162, 163, 164, 165, 166)
    for number in (132, 133, 134, 135, 136):  # what the agent itself says is the end-to-end tests' business
        assert dict(parse_qsl(rows[number]["body"] or "")).get("command") or "exec-status" in rows[number]["path"]
    replay.client.ask("PUT", f"{N}/qemu/500/config", {"onboot": 1})
    replay.ask(167, 169, 170, 171, 172, 173)
    replay.ask(168, authorization="PVEAPIToken=root@pam!autovibe=00000000-0000-0000-0000-000000000000")
    replay.ask(180, 184, 191, 200)
