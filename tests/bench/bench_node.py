"""The embedded node with 200 VMs against the same node with 2: reads, a linked clone, and the memory of its process.

Two node programs on the same code, asked by turns over kept connections; every VM is a linked clone of one template.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil

from autovibe.node.serve import run_directory
from tests.bench.figure import Figure
from tests.stub.node import free_port

MANY, FEW = 200, 2
BLOCKS, BLOCK, CLONES = 20, 20, 9
TARGET = 1.5
TEMPLATE, PROBE = 100, 101
_N = "/nodes/autovibe"
_PROGRAM = """
import sys
from pathlib import Path
from autovibe.node import run

run(Path(sys.argv[1]), "127.0.0.1", int(sys.argv[2]))
"""


def figures() -> Iterator[Figure]:
    with _node() as many, _node() as few:
        for node, count in ((many, MANY), (few, FEW)):
            node.fill(count)
        reads = {
            "GET config": f"{_N}/qemu/{PROBE}/config",
            "GET status/current": f"{_N}/qemu/{PROBE}/status/current",
        }
        for name, path in reads.items():
            ours, peer = _by_turns(many, few, path)
            yield Figure(f"node: {name}, p50, {MANY} VMs against {FEW}", ours, peer, "ms", TARGET)
        ours, peer = _clones(many, few)
        yield Figure(f"node: linked clone, {MANY} VMs against {FEW}", ours, peer, "ms", TARGET)
        ours, peer = _by_turns(many, few, f"{_N}/qemu", blocks=3)
        yield Figure(f"node: GET the list of all VMs, p50, {MANY} VMs against {FEW}", ours, peer, "ms")
        yield Figure(
            f"node: memory of the process, {MANY} stopped VMs against {FEW}", many.memory(), few.memory(), "MiB"
        )


class _Node:
    """A node program and a kept connection to it."""

    def __init__(self, home: Path) -> None:
        self.home, port = home, free_port()
        argv = [sys.executable, "-c", _PROGRAM, str(home), str(port)]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self._headers = {"Authorization": f"PVEAPIToken={(home / 'token').read_text().strip()}"}
        context = ssl.create_default_context(cafile=str(home / "cert.pem"))
        context.check_hostname = False
        self._connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=60)

    def ask(self, method: str, path: str, **fields: Any) -> Any:
        headers, body = dict(self._headers), None
        if fields:
            body = urlencode(fields)
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        self._connection.request(method, f"/api2/json{path}", body=body, headers=headers)
        response = self._connection.getresponse()
        data = response.read()
        if response.status != 200:
            raise AssertionError(f"{method} {path}: {response.status} {response.reason}")
        return json.loads(data)["data"]

    def run(self, method: str, path: str, **fields: Any) -> None:
        upid = self.ask(method, path, **fields)
        while (status := self.ask("GET", f"{_N}/tasks/{upid}/status"))["status"] == "running":
            time.sleep(0.002)
        if status["exitstatus"] != "OK":
            raise AssertionError(f"{method} {path}: {status['exitstatus']}")

    def fill(self, count: int) -> None:
        """A template, and linked clones of it until there are `count` VMs."""
        disk, net = "local-lvm:1", "virtio,bridge=vmbr0"
        self.run("POST", f"{_N}/qemu", vmid=TEMPLATE, name="base", memory=512, scsi0=disk, net0=net, agent=1)
        self.run("POST", f"{_N}/qemu/{TEMPLATE}/template")
        for vmid in range(PROBE, TEMPLATE + count):
            self.clone(vmid)

    def clone(self, vmid: int) -> None:
        self.run("POST", f"{_N}/qemu/{TEMPLATE}/clone", newid=vmid, name=f"vm-{vmid}")

    def memory(self) -> float:
        """MiB the process holds."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / (1 << 20)

    def close(self) -> None:
        self._connection.close()
        self.process.terminate()
        self.process.wait(30)
        shutil.rmtree(run_directory(self.home), ignore_errors=True)


@contextlib.contextmanager
def _node() -> Iterator[_Node]:
    with tempfile.TemporaryDirectory(prefix="av-bench-") as home:
        node = _Node(Path(home) / "node")
        try:
            yield node
        finally:
            node.close()


def _by_turns(many: _Node, few: _Node, path: str, blocks: int = BLOCKS) -> tuple[float, float]:
    """Median milliseconds of a read on each; the first block of each warms up."""
    times: dict[_Node, list[float]] = {many: [], few: []}
    for number in range(blocks + 1):
        for node, found in times.items():
            for _ in range(BLOCK):
                began = time.perf_counter()
                node.ask("GET", path)
                if number:
                    found.append((time.perf_counter() - began) * 1000)
    return statistics.median(times[many]), statistics.median(times[few])


def _clones(many: _Node, few: _Node) -> tuple[float, float]:
    """Median milliseconds from the call to the task's end; each clone is gone before the next."""
    times: dict[_Node, list[float]] = {many: [], few: []}
    for number in range(CLONES + 1):
        for node, found in times.items():
            began = time.perf_counter()
            node.clone(900)
            if number:
                found.append((time.perf_counter() - began) * 1000)
            node.run("DELETE", f"{_N}/qemu/900")
    return statistics.median(times[many]), statistics.median(times[few])
