"""The node itself over HTTP: what it is and has, its options and log, all of its VMs at a time, figures over time."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autovibe.node.host import sampler
from autovibe.node.vm.monitor import MonitorError
from tests.contract.node_parts import Client, FlagQemu, make_node

N = "/nodes/pvetest"
NOW = 1_795_132_800


@pytest.fixture
def client(tmp_path: Path, qemu: FlagQemu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(sampler, "PERIOD_SECONDS", 3600)  # samples are the tests' own business
    node = make_node(tmp_path / "node", qemu)
    yield Client(node)
    node.stop()


def make_vm(client: Client, vmid: int, **options: object) -> None:
    client.do("POST", f"{N}/qemu", vmid=vmid, memory=64, **options)


# What it is


def test_nobody_ends_the_machine_from_here(client: Client) -> None:
    for command in ("reboot", "shutdown"):
        answer = client.ask("POST", f"{N}/status", {"command": command})
        assert (answer.status, answer.reason) == (403, "Permission check failed (/nodes/pvetest, Sys.PowerMgmt)")
    answer = client.ask("POST", f"{N}/status", {"command": "stop"})
    wanted = {"command": "value 'stop' does not have a value in the enumeration 'reboot, shutdown'"}
    assert answer.json["errors"] == wanted


def test_time_names_and_hosts_are_the_machine_s(client: Client) -> None:
    before = int(time.time())
    found = client.get(f"{N}/time")
    assert before <= found["time"] <= time.time()
    assert found["localtime"] - found["time"] == time.localtime(found["time"]).tm_gmtoff
    assert found["timezone"]
    hosts = client.get(f"{N}/hosts")
    data = Path("/etc/hosts").read_bytes()
    assert hosts == {"data": data.decode(), "digest": hashlib.sha1(data).hexdigest()}
    assert set(client.get(f"{N}/dns")) <= {"search", "dns1", "dns2", "dns3"}
    for method, path in (("PUT", "time"), ("PUT", "dns"), ("POST", "hosts"), ("POST", "network"), ("POST", "lxc")):
        assert client.ask(method, f"{N}/{path}", {}).status == 501


def test_networks_are_the_guests_bridge_and_the_host_s_own(client: Client) -> None:
    found = {entry["iface"]: entry for entry in client.get(f"{N}/network")}
    bridge = found["vmbr0"]
    assert (bridge["type"], bridge["active"], bridge["address"], bridge["cidr"]) == (
        "bridge", 1, "10.0.2.2", "10.0.2.2/24",
    )  # fmt: skip
    assert "lo" not in found
    assert [entry["iface"] for entry in client.get(f"{N}/network", type="any_bridge")] == ["vmbr0"]
    assert "vmbr0" not in [entry["iface"] for entry in client.get(f"{N}/network", type="eth")]
    assert client.get(f"{N}/network/vmbr0") == {key: value for key, value in bridge.items() if key != "iface"}
    answer = client.ask("GET", f"{N}/network/eth99")
    assert (answer.status, answer.json["errors"]) == (400, {"iface": "interface does not exist"})
    assert client.ask("GET", f"{N}/network/e;x").status == 400


def test_services_are_the_node_s_own_parts(client: Client) -> None:
    services = client.get(f"{N}/services")
    running = {entry["service"] for entry in services if entry["active-state"] == "active"}
    assert running == {"pveproxy", "pvedaemon", "pvestatd"}
    state = client.get(f"{N}/services/pveproxy/state")
    assert (state["state"], state["unit-state"]) == ("running", "enabled")
    assert client.get(f"{N}/services/corosync/state")["unit-state"] == "not-found"
    assert client.get(f"{N}/services/pveproxy") == [{"subdir": "state"}]
    assert client.ask("GET", f"{N}/services/nope/state").status == 400
    assert client.ask("POST", f"{N}/services/pveproxy/restart").status == 501


def test_there_is_no_subscription(client: Client) -> None:
    found = client.get(f"{N}/subscription")
    assert set(found) == {"status", "message", "serverid", "url"}
    assert (found["status"], found["message"]) == ("notfound", "There is no subscription key")
    assert found == client.get(f"{N}/subscription")


def test_a_report_names_what_is_there(client: Client) -> None:
    make_vm(client, 100)
    report = client.get(f"{N}/report")
    assert "pve-manager/9.2.11" in report
    assert "100: stopped" in report
    assert "local-lvm" in report
    assert client.authorization.rpartition("=")[2] not in report


def test_capabilities_are_the_installed_qemu_s(client: Client) -> None:
    told = subprocess.run(["qemu-system-x86_64", "-machine", "help"], capture_output=True, text=True, check=True).stdout
    machines = client.get(f"{N}/capabilities/qemu/machines")
    assert {machine["id"] for machine in machines} == {
        line.split()[0] for line in told.splitlines() if line.startswith(("pc-i440fx-", "pc-q35-"))
    }
    assert machines[0]["id"] in (f"pc-{kind}-{machines[0]['version']}" for kind in ("i440fx", "q35"))
    models = {model["name"]: model for model in client.get(f"{N}/capabilities/qemu/cpu")}
    assert {"host", "max", "qemu64", "486", "EPYC", "x86-64-v2-AES"} <= models.keys()
    assert models["EPYC"] == {"name": "EPYC", "custom": 0, "vendor": "AuthenticAMD"}
    assert not any(name.endswith("-v1") for name in models)
    assert {"aes", "pcid"} <= {flag["name"] for flag in client.get(f"{N}/capabilities/qemu/cpu-flags")}
    assert client.get(f"{N}/capabilities/qemu/machines", arch="aarch64") == []
    assert client.get(f"{N}/capabilities/qemu/migration") == {"has-dbus-vmstate": 0}


# Its options


def test_the_node_s_options_are_kept(client: Client) -> None:
    empty = hashlib.sha1(b"").hexdigest()
    assert client.get(f"{N}/config") == {"digest": empty}
    given = {"description": "in the attic\nleft", "startall-onboot-delay": 5, "wakeonlan": "BC:24:11:00:00:01"}
    assert client.ask("PUT", f"{N}/config", {**given, "digest": empty}).data is None
    found = client.get(f"{N}/config")
    assert {key: found[key] for key in given} == given
    assert client.get(f"{N}/config", property="wakeonlan") == {"wakeonlan": "BC:24:11:00:00:01"}
    assert client.get(f"{N}/config", property="acme") == {}
    answer = client.ask("PUT", f"{N}/config", {"wakeonlan": "BC:24:11:00:00:02", "digest": empty})
    message = "detected modified configuration - file changed by other user? Try again."
    assert (answer.status, answer.reason) == (500, message)
    answer = client.ask("PUT", f"{N}/config", {"startall-onboot-delay": 301, "wakeonlan": "nope", "acmedomain6": "x"})
    assert set(answer.json["errors"]) == {"startall-onboot-delay", "wakeonlan", "acmedomain6"}
    client.ask("PUT", f"{N}/config", {"delete": "description,wakeonlan"})
    assert set(client.get(f"{N}/config")) == {"digest", "startall-onboot-delay"}


# Its log

LOG = """\
2026-11-20 09:00:00,001 INFO autovibe.node.serve Node 'pvetest' serves
2026-11-20 10:00:00,002 ERROR autovibe.node.http.api GET /x ran into a defect.
Traceback (most recent call last):
  ValueError: x
2026-11-21 10:00:00,003 WARNING autovibe.node.host.sampler Figures could not be recorded: full
2026-11-21 11:00:00,004 INFO autovibe.node.tasks Task 'UPID:x' ended: OK
"""


def test_syslog_is_the_node_s_own_log_by_lines(client: Client) -> None:
    assert client.get(f"{N}/syslog") == [{"n": 1, "t": "no content"}]
    (client.node.home / "node.log.1").write_text("2026-11-19 09:00:00,001 INFO autovibe.node.serve older\n")
    (client.node.home / "node.log").write_text(LOG)
    answer = client.ask("GET", f"{N}/syslog").json
    assert answer["total"] == 7
    assert [line["n"] for line in answer["data"]] == list(range(1, 8))
    pid = os.getpid()
    assert answer["data"][0]["t"] == f"Nov 19 09:00:00 pvetest pvedaemon[{pid}]: older"
    assert answer["data"][4]["t"] == f"Nov 20 10:00:00 pvetest pveproxy[{pid}]:   ValueError: x"

    def ask(**fields: Any) -> list[int]:
        return [line["n"] for line in client.get(f"{N}/syslog", **fields) if line["t"] != "no content"]

    assert ask(start=2, limit=2) == [3, 4]
    assert ask(limit=0) == list(range(1, 8))
    assert len(ask(since="2026-11-20")) == 6
    assert len(ask(since="2026-11-20 09:30:00", until="2026-11-20")) == 3
    assert len(ask(until="2026-11-20 09:00")) == 2
    assert len(ask(service="pvestatd")) == 1
    assert ask(service="corosync") == []
    assert client.ask("GET", f"{N}/syslog", {"since": "yesterday"}).status == 400


def test_the_journal_goes_on_from_its_cursor(client: Client) -> None:
    assert client.get(f"{N}/journal") == ["", ""]
    file = client.node.home / "node.log"
    file.write_text(LOG)
    first, *lines, last = client.get(f"{N}/journal")
    assert len(lines) == 6
    assert "serves" in lines[0]
    assert client.get(f"{N}/journal", startcursor=last) == [last, last]
    with file.open("a") as log:
        log.write("2026-11-21 12:00:00,000 INFO autovibe.node.tasks new\n")
    _, new, end = client.get(f"{N}/journal", startcursor=last)
    assert new.endswith("new")
    assert client.get(f"{N}/journal", startcursor=first, endcursor=last)[1:-1] == lines[1:]
    assert len(client.get(f"{N}/journal", lastentries=2)) == 4
    assert len(client.get(f"{N}/journal", priority="3")) == 2 + 3
    assert len(client.get(f"{N}/journal", priority="4..4")) == 2 + 1
    noon = int(time.mktime((2026, 11, 21, 10, 30, 0, 0, 0, -1)))
    assert len(client.get(f"{N}/journal", since=noon)) == 2 + 2
    assert len(client.get(f"{N}/journal", until=noon)) == 2 + 5
    assert client.get(f"{N}/journal", kernel=1) == ["", ""]
    assert len(client.get(f"{N}/journal", unit="pvestatd.service")) == 2 + 1
    assert client.ask("GET", f"{N}/journal", {"structured": 1}).status == 501
    assert len(client.get(f"{N}/journal", startcursor="s=0;i=ffff")) == 2 + 7  # of a log that is gone
    assert end


# All VMs at a time


def test_startall_starts_what_is_to_be_started_in_order(client: Client, qemu: FlagQemu) -> None:
    for vmid, options in {
        100: {"onboot": 1, "startup": "up=0"},
        101: {"onboot": 1, "startup": "order=2,up=0"},
        102: {"onboot": 0, "startup": "order=1,up=0"},
        103: {"onboot": 1, "startup": "order=1,up=1"},
        104: {"onboot": 1, "startup": "2,up=0"},
    }.items():
        make_vm(client, vmid, **options)
    make_vm(client, 105, onboot=1)
    client.do("POST", f"{N}/qemu/105/template")
    qemu.start(104, {}, {})
    upid = client.ask("POST", f"{N}/startall").data
    assert ":startall::root@pam!autovibe:" in upid
    assert client.end_of(upid) == "OK"
    assert client.log(upid) == [
        "Starting VM 103", "Waiting for 1 seconds (startup delay)", "Starting VM 101", "Starting VM 100", "TASK OK",
    ]  # fmt: skip
    assert set(qemu.started) == {100, 101, 103, 104}
    kinds = [task["type"] for task in client.get(f"{N}/tasks", typefilter="qmstart")]
    assert len(kinds) == 3
    upid = client.ask("POST", f"{N}/startall", {"vms": "102,100,999", "force": 1}).data
    assert client.end_of(upid) == "OK"
    assert client.log(upid) == ["Starting VM 102", "TASK OK"]


def test_a_vm_that_does_not_start_does_not_hold_up_the_others(client: Client, qemu: FlagQemu) -> None:
    for vmid in (100, 101):
        make_vm(client, vmid, startup="up=0")
    config = client.node.state.configs.load(100)
    config.values["lock"] = "backup"
    client.node.state.configs.save(100, config)
    upid = client.ask("POST", f"{N}/startall", {"force": 1}).data
    assert client.end_of(upid) == "OK"
    assert client.log(upid)[:3] == [
        "Starting VM 100", "Starting VM 100 failed: VM is locked (backup)", "Starting VM 101",
    ]  # fmt: skip
    assert set(qemu.started) == {101}


def test_stopall_goes_backwards_and_ends_what_does_not_obey(client: Client, qemu: FlagQemu) -> None:
    for vmid, startup in ((100, "order=1,down=1"), (101, "order=2"), (102, ""), (103, "order=2")):
        make_vm(client, vmid, **({"startup": startup} if startup else {}))
    for vmid in (100, 101, 102):
        qemu.start(vmid, {}, {})
    upid = client.ask("POST", f"{N}/stopall", {"max-workers": 1, "timeout": 7}).data
    assert client.end_of(upid) == "OK"
    assert client.log(upid) == [
        "Stopping VM 102 (timeout = 7 seconds)", "Stopping VM 101 (timeout = 7 seconds)",
        "Stopping VM 100 (timeout = 1 seconds)", "TASK OK",
    ]  # fmt: skip
    assert not qemu.started
    qemu.start(100, {}, {})
    qemu.ignores_power_button = True
    upid = client.ask("POST", f"{N}/stopall", {"force-stop": 0}).data
    assert client.end_of(upid) == "OK"
    assert "Stopping VM 100 failed: VM quit/powerdown failed - got timeout" in client.log(upid)
    assert 100 in qemu.started
    assert client.run("POST", f"{N}/stopall", vms="100") == "OK"
    assert not qemu.started


def test_a_bulk_task_that_is_stopped_begins_nothing_more(client: Client, qemu: FlagQemu) -> None:
    make_vm(client, 100, startup="order=1,up=600")
    make_vm(client, 101, startup="order=2")
    upid = client.ask("POST", f"{N}/startall", {"force": 1}).data
    task = client.node.state.tasks.find(upid)
    for _ in range(600):
        if any("Waiting" in line for line in client.log(upid)) or task.over.wait(0.05):
            break
    assert client.ask("DELETE", f"{N}/tasks/{upid}").status == 200
    assert client.end_of(upid) == "received interrupt"
    assert set(qemu.started) == {100}


def test_bad_bulk_calls_are_refused(client: Client) -> None:
    answer = client.ask("POST", f"{N}/startall", {"vms": "100,abc", "max-workers": 65})
    assert set(answer.json["errors"]) == {"vms", "max-workers"}
    answer = client.ask("POST", f"{N}/migrateall", {"target": "pvetest"})
    assert (answer.status, answer.json["errors"]) == (400, {"target": "target is local node."})
    answer = client.ask("POST", f"{N}/migrateall", {"target": "other"})
    assert (answer.status, answer.reason) == (500, "no such cluster node 'other'")
    answer = client.ask("POST", f"{N}/wakeonlan")
    assert (answer.status, answer.reason) == (500, "'pvetest' is local node, cannot wake my self!")
    assert client.run("POST", f"{N}/stopall") == "OK"
    assert client.run("POST", f"{N}/suspendall") == "OK"


# Figures over time


class Counting:
    """A monitor whose disks have read a million bytes more at each question."""

    def __init__(self) -> None:
        self._calls = itertools.count(1)

    def execute(self, command: str, **_arguments: Any) -> Any:
        assert command == "query-blockstats"
        calls = next(self._calls)
        return [{"stats": {"rd_bytes": calls * 1_000_000, "wr_bytes": calls * 10}}] * 2


class Hanging:
    """A monitor that answers when it is told to."""

    def __init__(self) -> None:
        self.told = threading.Event()

    def execute(self, command: str, **_arguments: Any) -> Any:
        self.told.wait(30)
        raise MonitorError(f"VM 101 qmp command '{command}' failed - got timeout")


def test_figures_of_vms_storages_and_the_node(client: Client, qemu: FlagQemu, monkeypatch: pytest.MonkeyPatch) -> None:
    make_vm(client, 100, scsi0="local-lvm:2", cores=2)
    make_vm(client, 101)
    monitors: dict[int, Any] = {100: Counting(), 101: Hanging()}
    monkeypatch.setattr(qemu, "pid", lambda vmid: os.getpid() if vmid in qemu.started else None)
    monkeypatch.setattr(qemu, "monitor", monitors.get)
    monkeypatch.setattr(sampler, "_ANSWER_SECONDS", 0.2)
    state = client.node.state
    state.sampler.stop()  # the samples are ours from here on
    now = time.time() // 60 * 60 - 300
    for step in range(7):
        if step == 1:
            qemu.start(100, {}, {})
            qemu.start(101, {}, {})
        state.sampler.sample(state, now + step * 30)
    rows = client.get(f"{N}/qemu/100/rrddata", timeframe="hour")
    assert len(rows) == 60
    known = [row for row in rows if len(row) > 1]
    assert [row["time"] for row in known] == [now + 60, now + 120, now + 180]
    assert (known[1]["maxcpu"], known[1]["maxmem"], known[1]["maxdisk"], known[1]["disk"]) == (2, 64 << 20, 2 << 30, 0)
    assert known[1]["mem"] > 1 << 20
    assert known[1]["memhost"] == known[1]["mem"]
    assert known[1]["diskread"] == pytest.approx(2_000_000 / 30)
    assert known[1]["diskwrite"] == pytest.approx(20 / 30)
    assert known[1]["cpu"] >= 0
    (vm,) = (vm for vm in client.get("/cluster/resources", type="vm") if vm["vmid"] == 100)
    assert (vm["diskread"], vm["diskwrite"]) == (12_000_000, 120)
    hung = [row for row in client.get(f"{N}/qemu/101/rrddata", timeframe="hour", cf="MAX") if len(row) > 1]
    assert hung[1].keys() >= {"mem", "cpu", "maxmem"}
    assert "diskread" not in hung[1]
    monitors[101].told.set()
    node = [row for row in client.get(f"{N}/rrddata", timeframe="hour") if len(row) > 1]
    assert node[1].keys() >= {
        "cpu", "iowait", "loadavg", "maxcpu", "memtotal", "memused", "roottotal", "rootused", "swaptotal", "swapused",
    }  # fmt: skip
    assert node[1]["cpu"] >= 0
    storage = [row for row in client.get(f"{N}/storage/local/rrddata", timeframe="hour") if len(row) > 1]
    assert set(storage[1]) == {"time", "total", "used"}
    assert len(client.get(f"{N}/rrddata", timeframe="decade")) == 570


def test_a_stopped_vm_has_its_sizes_and_no_more(client: Client) -> None:
    make_vm(client, 100, scsi0="local-lvm:1")
    state = client.node.state
    state.sampler.stop()
    now = time.time() // 60 * 60 - 120
    for step in range(3):
        state.sampler.sample(state, now + step * 60)
    rows = client.get(f"{N}/qemu/100/rrddata", timeframe="hour", cf="AVERAGE")
    assert [set(row) for row in rows if len(row) > 1] == [{"time", "maxcpu", "maxmem", "maxdisk", "disk"}] * 2
    client.do("DELETE", f"{N}/qemu/100")
    state.sampler.sample(state, now + 180)
    assert not (client.node.home / "rrd" / "vm-100").exists()
    answer = client.ask("GET", f"{N}/qemu/100/rrddata", {"timeframe": "hour"})
    assert answer.status == 500
    assert answer.reason.startswith("RRD error: opening ")
    assert client.ask("GET", f"{N}/storage/nope/rrddata", {"timeframe": "hour"}).status == 500
    for fields in ({}, {"timeframe": "minute"}, {"timeframe": "hour", "cf": "MIN"}, {"timeframe": "decade"}):
        assert client.ask("GET", f"{N}/storage/local/rrddata", fields).status == 400
    for path in (f"{N}/rrd", f"{N}/qemu/100/rrd", f"{N}/storage/local/rrd"):
        assert client.ask("GET", path, {"timeframe": "hour", "ds": "cpu"}).status == 501


def test_figures_are_there_after_a_restart(tmp_path: Path, qemu: FlagQemu) -> None:
    now = time.time() // 60 * 60 - 120
    node = make_node(tmp_path / "node", qemu)
    node.state.sampler.stop()
    for step in range(3):
        node.state.sampler.sample(node.state, now + step * 60)
    node.stop()
    node = make_node(tmp_path / "node", qemu)
    try:
        rows = Client(node).get(f"{N}/rrddata", timeframe="day")
        assert sum("memused" in row for row in rows) == 2
    finally:
        node.stop()


def test_a_node_that_cannot_write_figures_says_so_once(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = threading.Semaphore(0)

    def fail(*_: object) -> None:
        tries.release()
        raise OSError(28, "No space left on device")

    broken = sampler.Sampler(client.node.home / "rrd")
    monkeypatch.setattr(sampler, "PERIOD_SECONDS", 0.01)
    monkeypatch.setattr(broken, "sample", fail)
    broken.start(client.node.state)
    for _ in range(3):
        assert tries.acquire(timeout=30)
    broken.stop()
    said = [record for record in caplog.records if "Figures could not be recorded" in record.message]
    assert len(said) == 1
