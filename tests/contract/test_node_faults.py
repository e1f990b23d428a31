"""Faults on demand: each does what its file says, a wrong file is refused clearly, and only loopback may have one."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autovibe.errors import ConfigurationError
from autovibe.node import serve
from autovibe.node.disks import Disks
from autovibe.node.http import faults
from tests.contract.node_parts import Client, FlagQemu
from tests.stub.node import free_port

N = "/nodes/pvetest"
V = f"{N}/qemu/100"
Put = Callable[..., None]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "faults.json"
    found.write_text("{}")
    return found


@pytest.fixture
def put(file: Path) -> Put:
    """Write rules, at once and whole."""

    def write(*rules: dict[str, Any], seed: int = 0) -> None:
        new = file.with_suffix(".new")
        new.write_text(json.dumps({"seed": seed, "rules": rules}))
        new.replace(file)

    return write


@pytest.fixture
def client(tmp_path: Path, file: Path) -> Iterator[Client]:
    home = tmp_path / "node"
    disks = Disks(home / "storage")
    node = serve(home, "127.0.0.1", 0, name="pvetest", qemu=FlagQemu(), disks=disks, faults=file).start()  # type: ignore[arg-type]
    found = Client(node)
    found.do("POST", f"{N}/qemu", vmid=100, scsi0="local-lvm:1", name="tpl")
    yield found
    node.stop()


def rule(then: dict[str, Any], **match: Any) -> dict[str, Any]:
    return {"match": match, "then": then}


def test_statuses_reasons_and_errors(client: Client, put: Put) -> None:
    put(
        rule(
            {"status": 500, "reason": "got no worker upid - start worker failed"},
            method="POST",
            path=f"{N}/qemu/*/status/*",
        ),
        rule({"status": 400, "reason": "bad", "errors": {"x": "is bad"}}, path="/version"),
        rule({"status": 596, "reason": "Broken pipe"}, path="/cluster/**", times=1),
    )
    answer = client.ask("POST", f"{V}/status/start", {})
    assert (answer.status, answer.reason) == (500, "got no worker upid - start worker failed")
    assert client.ask("GET", "/version").json["errors"] == {"x": "is bad"}
    assert [client.ask("GET", "/cluster/nextid").status for _ in range(2)] == [596, 200]
    assert client.ask("GET", f"{V}/status/current").status == 200
    put()
    assert client.ask("GET", "/version").status == 200, "the file is read again"


def test_dropped_before_and_after(client: Client, put: Put) -> None:
    put(
        rule({"drop": "before"}, method="POST", path=f"{V}/status/start", times=1),
        rule({"drop": "after"}, method="PUT", path=f"{V}/config", times=1),
    )
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError, ssl.SSLError)):
        client.ask("POST", f"{V}/status/start", {})
    assert client.get(f"{V}/status/current")["status"] == "stopped"
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError, ssl.SSLError)):
        client.ask("PUT", f"{V}/config", {"name": "other"})
    assert client.get(f"{V}/config")["name"] == "other"


def test_truncated(client: Client, put: Put) -> None:
    put(rule({"truncate": 20}, path="/version"))
    with pytest.raises(http.client.IncompleteRead) as caught:
        client.ask("GET", "/version")
    assert len(caught.value.partial) == 20


def test_slow(client: Client, put: Put) -> None:
    put(rule({"delay_seconds": 0.4}, path="/version"), rule({"task_delay_seconds": 0.4}, path=f"{V}/status/start"))
    before = time.monotonic()
    client.get("/version")
    assert time.monotonic() - before >= 0.4
    upid = client.ask("POST", f"{V}/status/start", {}).data
    assert client.get(f"{N}/tasks/{upid}/status")["status"] == "running"
    assert client.end_of(upid) == "OK"


def test_locks_and_races(client: Client, put: Put) -> None:
    put(
        rule({"lock_timeout": True}, method="PUT"),
        rule({"vmid_taken": True}, method="POST", path=f"{N}/qemu"),
        rule({"vmid_taken": True}, path=f"{V}/clone"),
        rule({"nextid_taken": True}, path="/cluster/nextid"),
    )
    locked = client.ask("PUT", f"{V}/config", {"name": "x"})
    assert locked.reason == "can't lock file '/var/lock/qemu-server/lock-100.conf' - got timeout"
    taken = client.ask("POST", f"{N}/qemu", {"vmid": 200})
    assert taken.reason == "unable to create VM 200 - VM 200 already exists on node 'pvetest'"
    taken = client.ask("POST", f"{V}/clone", {"newid": 200})
    assert taken.reason == "unable to create VM 200: config file already exists"
    assert client.get("/cluster/nextid") == "100"


def test_tasks_that_fail_leave_what_a_failure_leaves(client: Client, put: Put) -> None:
    put(rule({"task_fails": "out of space"}, method="POST"))
    assert "out of space" in client.run("POST", f"{N}/qemu", vmid=200, scsi0="local-lvm:1")
    client.node.state.configs.save(100, client.node.state.configs.load(100))
    assert "out of space" in client.run("POST", f"{V}/clone", newid=300, full=1)
    assert [vm["vmid"] for vm in client.get(f"{N}/qemu")] == [100]
    assert {volume["vmid"] for volume in client.get(f"{N}/storage/local-lvm/content")} == {100}
    assert client.run("POST", f"{V}/snapshot", snapname="s1") == "out of space"
    put()
    client.do("POST", f"{V}/clone", newid=300, full=1)


def test_a_lagging_cluster(client: Client, put: Put) -> None:
    put(rule({"lag_seconds": 600}, path="/cluster/resources"))
    client.get("/cluster/resources")
    client.do("POST", f"{N}/qemu", vmid=200, name="new")
    entries = {entry["id"]: entry for entry in client.get("/cluster/resources")}
    assert entries["qemu/200"] == {
        "id": "qemu/200",
        "node": "pvetest",
        "type": "qemu",
        "vmid": 200,
        "status": "unknown",
    }
    assert entries["node/pvetest"]["status"] == "online"
    assert {vm["vmid"]: vm["name"] for vm in client.get(f"{N}/qemu")} == {100: "tpl", 200: "new"}
    put(rule({"lag_seconds": 0}, path="/cluster/resources"))
    entries = {entry["id"]: entry for entry in client.get("/cluster/resources")}
    assert entries["qemu/200"]["name"] == "new"


def test_skip_times_and_chance(client: Client, put: Put) -> None:
    def refusals(count: int) -> list[int]:
        return [number for number in range(count) if client.ask("GET", "/version").status == 500]

    put(rule({"status": 500}, path="/version", skip=2, times=2))
    assert refusals(6) == [2, 3]
    put(rule({"status": 500}, path="/version", probability=0.5), seed=3)
    first = refusals(20)
    assert 0 < len(first) < 20
    put(rule({"status": 500}, path="/version", probability=0.5), seed=4)
    refusals(1)
    put(rule({"status": 500}, path="/version", probability=0.5), seed=3)
    assert refusals(20) == first


def test_a_file_that_becomes_wrong_changes_nothing(client: Client, put: Put, file: Path) -> None:
    put(rule({"status": 503}, path="/version"))
    assert client.ask("GET", "/version").status == 503
    file.write_text("{")
    assert client.ask("GET", "/version").status == 503
    file.unlink()
    assert client.ask("GET", "/version").status == 503


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a table of seed, rules"),
        ('{"rule": []}', "has 'rule', which is none of seed, rules"),
        ('{"rules": [3]}', "rule 1 is not a table of match, then"),
        ('{"rules": [{"then": {}}]}', "rule 1: 'then' says nothing"),
        ('{"rules": [{"then": {"drop": "now"}}]}', "'drop' is 'before' or 'after'"),
        ('{"rules": [{"then": {"drop": "after", "status": 500}}]}', "says drop and status; it says one thing"),
        ('{"rules": [{"then": {"status": 200}}]}', "'status' is from 400 to 599"),
        ('{"rules": [{"then": {"status": true}}]}', "'status' is True, not of type int"),
        ('{"rules": [{"then": {"delay_seconds": -1}}]}', "'delay_seconds' is negative"),
        ('{"rules": [{"then": {"reason": "x"}}]}', "go with a 'status'"),
        ('{"rules": [{"match": {"methods": "GET"}, "then": {"status": 500}}]}', "has 'methods', which is none of"),
        ('{"rules": [{"match": {"method": "PATCH"}, "then": {"status": 500}}]}', "'PATCH' is no method"),
        ('{"rules": [{"match": {"probability": 2}, "then": {"status": 500}}]}', "'probability' is from 0 to 1"),
    ],
)
def test_wrong_files_are_explained(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "faults.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        faults.Faults(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_toml_and_files_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "faults.toml"
    path.write_text('seed = 1\n[[rules]]\nmatch = {path = "/version"}\nthen = {delay_seconds = 1}\n')
    faults.Faults(path)
    path.write_text("rules = 3 =")
    with pytest.raises(ConfigurationError, match="is not valid TOML"):
        faults.Faults(path)
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        faults.Faults(tmp_path / "none.json")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "node.example"])
def test_only_loopback_may_have_faults(tmp_path: Path, file: Path, host: str) -> None:
    home = tmp_path / "node"
    with pytest.raises(ConfigurationError, match="must listen on loopback"):
        serve(home, host, 0, qemu=FlagQemu(), disks=Disks(home / "storage"), faults=file)  # type: ignore[arg-type]


def run_cli(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AUTOVIBE_")}
    environment |= {"AUTOVIBE_HOME": str(tmp_path / "home"), "NO_COLOR": "1", "COLUMNS": "200"}
    program = str(Path(sys.executable).with_name("autovibe"))
    return subprocess.run(
        [program, "serve", "node", *words], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_command_line_explains_itself(tmp_path: Path, file: Path) -> None:
    told = run_cli(tmp_path, "--help").stdout
    for word in ("--faults", "rules", "task_fails", "lag_seconds", "truncate"):
        assert word in told
    file.write_text('{"rules": 3}')
    wrong = run_cli(tmp_path, "--port", str(free_port()), "--faults", str(file))
    assert wrong.returncode != 0
    assert "'rules' is 3, not of type list" in " ".join((wrong.stdout + wrong.stderr).split())
    open_to_all = run_cli(tmp_path, "--host", "0.0.0.0", "--port", str(free_port()), "--faults", str(file))
    assert open_to_all.returncode != 0
    assert "must listen on loopback" in " ".join((open_to_all.stdout + open_to_all.stderr).split())
