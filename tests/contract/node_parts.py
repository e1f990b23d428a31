"""A node under test: the real server, tasks and disks around a hypervisor that only keeps flags."""

from __future__ import annotations

import http.client
import json
import ssl
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from autovibe.node import serve
from autovibe.node.disks import Disks
from autovibe.node.serve import Node
from autovibe.node.vm.agent import NotRunning
from autovibe.node.vm.qemu import QemuError
from autovibe.node.vm.qemu_state import Watch


class FlagAgent:
    """An agent that answers the given commands, or nobody when there are none."""

    def __init__(self, answers: dict[str, Any] | None, calls: list[str]) -> None:
        self._answers, self.calls = answers, calls

    def ping(self) -> None:
        self.call("ping")

    def call(self, command: str, /, **_arguments: Any) -> Any:
        self.calls.append(command)
        if self._answers is None:
            raise NotRunning
        return self._answers.get(command, {})

    def exec(self, argv: list[str], *, input_data: bytes | None = None) -> int:
        self.calls.append(f"exec {argv} {input_data!r}")
        return 145

    def exec_status(self, pid: int) -> dict[str, Any]:
        return {"exited": 1, "exitcode": 0, "out-data": "hi\n", "out-truncated": 0, "pid-asked": pid}

    def read_file(self, path: str, *, limit: int, offset: int = 0) -> dict[str, Any]:
        return {"content": f"{path} {limit} {offset}", "bytes-read": 3}

    def write_file(self, path: str, content: bytes) -> None:
        self.calls.append(f"write {path} {content!r}")


class FlagQemu:
    """VMs that run because somebody said so. `fails_with` makes the next start fail."""

    def __init__(self) -> None:
        self.started: dict[int, float] = {}
        self.paused: set[int] = set()
        self.given: dict[int, tuple[dict[str, str], dict[str, Path]]] = {}
        self.answers: dict[str, Any] | None = None
        self.agent_calls: list[str] = []
        self.fails_with = ""
        self.ignores_power_button = False
        self.saves_for = threading.Event()  # a saving of RAM lasts until it is set
        self.saves_for.set()

    def start(
        self, vmid: int, config: Any, drives: Any, *, state: Path | None = None, timeout: float | None = None
    ) -> None:
        if self.fails_with:
            raise QemuError(self.fails_with)
        if state is not None:
            with state.open("rb") as file:
                assert file.read(4) == b"RAM "
            self.paused.add(vmid)
        self.given[vmid] = (dict(config), dict(drives))
        self.started[vmid] = time.time()

    def stop(self, vmid: int) -> None:
        self.started.pop(vmid, None)
        self.paused.discard(vmid)

    def running(self) -> list[int]:
        return sorted(self.started)

    def running_as(self, vmid: int) -> dict[str, str]:
        return {"runningmachine": "pc-i440fx-7.2", "runningcpu": "max"}

    def save_state(self, vmid: int, path: Path, *, watch: Watch) -> None:
        self.suspend(vmid)
        with path.open("rb+") as file:
            file.write(b"RAM of the VM")
        watch(1 << 20, 0.5)
        while not self.saves_for.wait(0.01):
            watch(2 << 20, 0.9)

    def settle(self, vmid: int, *, goes_on: bool) -> list[str]:
        if goes_on:
            self.resume(vmid)
        return []

    def powerdown(self, vmid: int, *, by_agent: bool = True) -> None:
        if not self.ignores_power_button:
            self.stop(vmid)

    def is_running(self, vmid: int) -> bool:
        return vmid in self.started

    def pid(self, vmid: int) -> int | None:
        return 4194301 if vmid in self.started else None

    def started_at(self, vmid: int) -> float | None:
        return self.started.get(vmid)

    def status(self, vmid: int) -> dict[str, Any]:
        return {"qmpstatus": "paused" if vmid in self.paused else "running", "running-qemu": "7.2.22"}

    def reset(self, vmid: int) -> None: ...

    def suspend(self, vmid: int) -> None:
        self.paused.add(vmid)

    def resume(self, vmid: int) -> None:
        self.paused.discard(vmid)

    def tell(self, vmid: int, line: str) -> str:
        assert line == "info status"
        return f"VM status: {self.status(vmid)['qmpstatus']}\r\n"

    def press(self, vmid: int, keys: list[dict[str, Any]]) -> None:
        self.agent_calls.append(f"press {vmid} {keys}")

    def monitor(self, _vmid: int) -> None:
        """None makes the disks work on the files: nothing here has them open."""

    def agent(self, _vmid: int) -> FlagAgent:
        return FlagAgent(self.answers, self.agent_calls)


def make_node(home: Path, qemu: FlagQemu, name: str = "pvetest") -> Node:
    return serve(home, "127.0.0.1", 0, name=name, qemu=qemu, disks=Disks(home / "storage")).start()


class Answer:
    """One HTTP answer as it came."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.reason = response.status, response.reason
        self.headers = {key.lower(): value for key, value in response.getheaders()}
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def data(self) -> Any:
        assert self.status == 200, (self.status, self.reason, self.body)
        return self.json["data"]


class Client:
    """Bare HTTP to a node: what it sends is what the test says, what comes back is untouched."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.authorization = f"PVEAPIToken={node.token}"
        self.context = ssl.create_default_context()
        self.context.check_hostname = False
        self.context.verify_mode = ssl.CERT_NONE

    def connect(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("127.0.0.1", self.node.port, context=self.context, timeout=60)

    def ask(
        self,
        method: str,
        path: str,
        fields: dict[str, Any] | list[tuple[str, Any]] | None = None,
        *,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        sent = {"Authorization": self.authorization} if headers is None else dict(headers)
        if fields is not None and method in ("POST", "PUT"):
            body = urlencode(fields, doseq=True).encode()
            sent["Content-Type"] = "application/x-www-form-urlencoded"
        elif fields is not None:
            path += "?" + urlencode(fields, doseq=True)
        connection = self.connect()
        try:
            path = path if path.startswith("/api2") else f"/api2/json{path}"
            connection.request(method, path, body=body, headers=sent)
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def get(self, path: str, **fields: Any) -> Any:
        return self.ask("GET", path, fields or None).data

    def run(self, method: str, path: str, **fields: Any) -> str:
        """Call, await the task, and give its exit status."""
        return self.end_of(self.ask(method, path, fields).data)

    def do(self, method: str, path: str, **fields: Any) -> None:
        status = self.run(method, path, **fields)
        assert status == "OK", (method, path, status)

    def end_of(self, upid: str) -> str:
        self.node.state.tasks.find(upid).over.wait(60)
        status = self.get(f"/nodes/{self.node.name}/tasks/{upid}/status")
        assert status["status"] == "stopped", status
        return str(status["exitstatus"])

    def log(self, upid: str) -> list[str]:
        return [line["t"] for line in self.get(f"/nodes/{self.node.name}/tasks/{upid}/log", limit=500)]


def serve_until_killed(home: Path) -> None:
    """A node in a process of its own, for tests that kill it."""
    print(make_node(home, FlagQemu()).port, flush=True)
    time.sleep(600)


if __name__ == "__main__":
    serve_until_killed(Path(sys.argv[1]))
