"""The node as a program with real QEMU: it ends on SIGTERM, its VMs outlive it, and the next one finds them."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil

from autovibe.node.serve import run_directory
from tests.contract.node_parts import Client
from tests.stub.node import free_port

N = "/nodes/autovibe"
_PROGRAM = """
import sys
from pathlib import Path
from autovibe.node import run

faults = Path(sys.argv[3]) if len(sys.argv) > 3 else None
run(Path(sys.argv[1]), "127.0.0.1", int(sys.argv[2]), accel="tcg", log_level="debug", faults=faults)
"""


PROGRAMS: list[Program] = []


class Program:
    def __init__(self, home: Path, port: int, *words: str) -> None:
        argv = [sys.executable, "-c", _PROGRAM, str(home), str(port), *words]
        PROGRAMS.append(self)
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.first_lines = [self.process.stdout.readline() for _ in range(2)]
        token = (home / "token").read_text().strip()
        self.client = Client(SimpleNamespace(token=token, port=port, name="autovibe"))  # type: ignore[arg-type]

    def run(self, method: str, path: str, **fields: object) -> str:
        upid = self.client.ask(method, path, fields).data
        while (status := self.client.get(f"{N}/tasks/{upid}/status"))["status"] == "running":
            time.sleep(0.05)
        return str(status["exitstatus"])

    def stop(self) -> float:
        before = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(15) == 0
        return time.monotonic() - before


def test_vms_outlive_the_node(tmp_path: Path) -> None:
    home, port = tmp_path / "node", free_port()
    pid = None
    try:
        first = Program(home, port)
        assert first.first_lines[0].startswith("Node 'autovibe' serves https://127.0.0.1:")
        assert first.first_lines[1].split()[1] == (home / "fingerprint").read_text().strip()
        assert (
            first.run("POST", f"{N}/qemu", vmid=100, memory=64, scsi0="local-lvm:1", scsihw="virtio-scsi-pci") == "OK"
        )
        assert first.run("POST", f"{N}/qemu/100/status/start") == "OK"
        pid = first.client.get(f"{N}/qemu/100/status/current")["pid"]
        assert first.run("POST", f"{N}/qemu/100/snapshot", snapname="s1") == "OK"
        first.client.ask("POST", f"{N}/qemu/100/status/shutdown", {"timeout": 60})  # nobody listens in this VM
        assert first.stop() < 10
        assert psutil.pid_exists(pid)
        second = Program(home, port)
        status = second.client.get(f"{N}/qemu/100/status/current")
        assert (status["pid"], status["qmpstatus"]) == (pid, "running")
        assert second.client.get(f"{N}/tasks")[0]["status"] == "unexpected status"
        second.process.kill()
        second.process.wait()
        third = Program(home, port)
        assert third.client.get(f"{N}/qemu/100/status/current")["pid"] == pid
        assert third.run("POST", f"{N}/qemu/100/status/stop") == "OK"
        assert third.run("DELETE", f"{N}/qemu/100") == "OK"
        assert third.stop() < 3
        log = (home / "node.log").read_text()
        for name in ("token", "password"):
            assert (home / name).read_text().strip().rpartition("=")[2] not in log
        assert list((home / "storage" / "local-lvm").rglob("*disk*")) == []
    finally:
        for program in PROGRAMS:
            program.process.kill()
            program.process.wait()
        shutil.rmtree(run_directory(home))
        if pid:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()


def test_faults_on_demand_are_announced(tmp_path: Path) -> None:
    home, faults = tmp_path / "node", tmp_path / "faults.json"
    faults.write_text('{"rules": [{"match": {"path": "/version"}, "then": {"status": 503, "reason": "as asked"}}]}')
    program = Program(home, free_port(), str(faults))
    try:
        assert program.process.stdout
        assert program.process.stdout.readline().startswith("FAULTS ON DEMAND from '")
        assert program.client.ask("GET", "/version").reason == "as asked"
        assert program.stop() < 10
        assert "FAULTS ON DEMAND: 1 rules" in (home / "node.log").read_text()
    finally:
        program.process.kill()
        program.process.wait()
        shutil.rmtree(run_directory(home))
