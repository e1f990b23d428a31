"""How a Proxmox behaves, asked over HTTP alone: on the embedded node always, and on a real one where there is one.

A real Proxmox VE takes part when AUTOVIBE_TEST_PVE is set to its URL (https://pve.example.org:8006), with

- AUTOVIBE_TEST_PVE_TOKEN: an API token `user@realm!id=secret` that may make VMs, without privilege separation
- AUTOVIBE_TEST_PVE_FINGERPRINT: the SHA-256 of its certificate, as Proxmox shows it
- AUTOVIBE_TEST_PVE_NODE (default `pve`) and AUTOVIBE_TEST_PVE_STORAGE (`local`): a directory storage for images
- AUTOVIBE_TEST_PVE_VMIDS (`9900-9949`): ids that are the tests' own; VMs they make there are removed afterwards
- AUTOVIBE_TEST_PVE_PASSWORD: root@pam's, for what a token may not do (locks); without it those tests are skipped there
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import pytest

from autovibe.node.access import auth
from tests.contract.node_parts import Answer, FlagQemu, make_node

UPID = re.compile(r"UPID:[\w.-]+:[0-9A-F]{8}:[0-9A-F]{8,9}:[0-9A-F]{8}:(\w+):([^:]*):[^:]+:")
FORM = "application/x-www-form-urlencoded"
_TASK_SECONDS = 180


class Pve:
    """The Proxmox under test. `vmid()` gives an id of the tests' own; what is made there is removed by `clear`."""

    def __init__(self, url: str, fingerprint: str, token: str, node: str, storage: str, vmids: Iterator[int]) -> None:
        place = urlsplit(url)
        self._address = (place.hostname or "", place.port or 8006)
        self._fingerprint, self._vmids = fingerprint.replace(":", "").lower(), vmids
        self.node, self.storage, self.n = node, storage, f"/nodes/{node}"
        self.authorization = {"Authorization": f"PVEAPIToken={token}"}
        self.password = ""
        self._used: list[int] = []

    def ask(self, method: str, path: str, *, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
        """Fields whose names Python does not allow are given with `_` for `-`."""
        named = {name.replace("_", "-"): value for name, value in fields.items()}
        sent, body = dict(self.authorization if headers is None else headers), None
        if named and method in ("POST", "PUT"):
            body, sent["Content-Type"] = urlencode(named, doseq=True), FORM
        elif named:
            path += "?" + urlencode(named, doseq=True)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the fingerprint is checked below
        connection = http.client.HTTPSConnection(*self._address, context=context, timeout=60)
        try:
            connection.connect()
            certificate = connection.sock.getpeercert(binary_form=True)
            assert hashlib.sha256(certificate).hexdigest() == self._fingerprint, "the certificate is another one"
            connection.request(method, path if path.startswith("/api2") else f"/api2/json{path}", body, sent)
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def get(self, path: str, **fields: Any) -> Any:
        return self.ask("GET", path, **fields).data

    def run(self, method: str, path: str, **fields: Any) -> str:
        """The exit status of the task that a call starts."""
        upid = self.ask(method, path, **fields).data
        assert UPID.fullmatch(upid), upid
        deadline = time.monotonic() + _TASK_SECONDS
        while (status := self.get(f"{self.n}/tasks/{upid}/status"))["status"] == "running":
            assert "exitstatus" not in status
            assert time.monotonic() < deadline, f"task '{upid}' does not end"
            time.sleep(0.05)
        return str(status["exitstatus"])

    def do(self, method: str, path: str, **fields: Any) -> None:
        status = self.run(method, path, **fields)
        assert status == "OK", (method, path, status)

    def refused(self, method: str, path: str, **fields: Any) -> tuple[int, str, dict[str, str]]:
        """Status, reason and the parameters' faults of a call that is refused."""
        answer = self.ask(method, path, **fields)
        assert answer.status >= 400, answer.json
        assert answer.json["data"] is None
        assert answer.json["message"].split("\n")[0] == answer.reason
        return answer.status, answer.reason, answer.json.get("errors", {})

    def vmid(self) -> int:
        self._used.append(next(self._vmids))
        return self._used[-1]

    def vm(self, **options: Any) -> str:
        """The path of a new VM with a disk."""
        vmid = self.vmid()
        given = {"name": f"t{vmid}", "memory": 64, "kvm": 0, "cpu": "qemu64", "scsi0": f"{self.storage}:1,format=qcow2"}
        self.do("POST", f"{self.n}/qemu", vmid=vmid, **{**given, **options})
        return f"{self.n}/qemu/{vmid}"

    def root(self) -> dict[str, str]:
        """Headers of a ticket of root@pam's."""
        if not self.password:
            pytest.skip("AUTOVIBE_TEST_PVE_PASSWORD is not set: only root@pam itself may do this")
        ticket = self.ask("POST", "/access/ticket", headers={}, username="root@pam", password=self.password).data
        return {
            "Cookie": f"PVEAuthCookie={quote(ticket['ticket'])}",
            "CSRFPreventionToken": ticket["CSRFPreventionToken"],
        }

    def clear(self) -> None:
        """Clones go before what they are clones of."""
        for vmid in reversed(self._used):
            path = f"{self.n}/qemu/{vmid}"
            if self.ask("GET", f"{path}/config").status != 200:
                continue
            self.ask("PUT", f"{path}/config", protection=0)
            self.run("POST", f"{path}/status/stop")
            self.run("DELETE", path)


@pytest.fixture(params=["node", "proxmox"] if os.environ.get("AUTOVIBE_TEST_PVE") else ["node"])
def pve(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pve]:
    if request.param == "node":
        monkeypatch.setattr(auth, "FAILED_LOGIN_DELAY_SECONDS", 0.05)
        node = make_node(tmp_path / "node", FlagQemu())
        found = Pve(node.url, node.fingerprint, node.token, node.name, "local", iter(range(100, 200)))
        found.password = (node.home / "password").read_text().strip()
        yield found
        found.clear()
        node.stop()
        return
    given = {name: os.environ.get(f"AUTOVIBE_TEST_PVE_{name}") for name in ("TOKEN", "FINGERPRINT", "NODE", "STORAGE")}
    first, _, last = os.environ.get("AUTOVIBE_TEST_PVE_VMIDS", "9900-9949").partition("-")
    assert given["TOKEN"], "AUTOVIBE_TEST_PVE_TOKEN is not set"
    assert given["FINGERPRINT"], "AUTOVIBE_TEST_PVE_FINGERPRINT is not set"
    found = Pve(
        os.environ["AUTOVIBE_TEST_PVE"],
        given["FINGERPRINT"],
        given["TOKEN"],
        given["NODE"] or "pve",
        given["STORAGE"] or "local",
        iter(range(int(first), int(last) + 1)),
    )
    found.password = os.environ.get("AUTOVIBE_TEST_PVE_PASSWORD", "")
    yield found
    found.clear()


# HTTP


def test_answers_have_proxmoxs_form(pve: Pve) -> None:
    answer = pve.ask("GET", "/version")
    assert (answer.status, answer.reason) == (200, "OK")
    assert answer.headers["content-type"] == "application/json;charset=UTF-8"
    assert answer.headers["server"] == "pve-api-daemon/3.0"
    assert re.fullmatch(r"9\.\d+(\.\d+)?", answer.data["version"])
    assert all(isinstance(answer.data[name], str) for name in ("version", "release", "repoid"))


def test_without_credentials_there_is_a_bare_401(pve: Pve) -> None:
    for method in ("GET", "POST"):
        answer = pve.ask(method, f"{pve.n}/qemu", headers={})
        assert (answer.status, answer.reason, answer.body) == (401, "No ticket", b"")
        assert "content-type" not in answer.headers


def test_unknown_methods_and_paths_are_501(pve: Pve) -> None:
    patched = pve.ask("PATCH", "/version")
    assert (patched.status, patched.reason, patched.body) == (501, "method 'PATCH' not available", b"")
    assert pve.ask("GET", "/nope").reason == "Method 'GET /nope' not implemented"


def test_extjs_answers_200_with_what_came_of_it(pve: Pve) -> None:
    path = pve.vm()
    good = pve.ask("GET", f"/api2/extjs{path}/config").json
    assert good["success"] == 1
    assert good["data"]["memory"] == "64"
    bad = pve.ask("GET", f"/api2/extjs{path}/nope")
    message = f"Method 'GET {path}/nope' not implemented"
    assert (bad.status, bad.json) == (200, {"data": None, "success": 0, "status": 501, "message": message})
    faulty = pve.ask("PUT", f"/api2/extjs{path}/config", onboot="yes").json
    assert (faulty["success"], faulty["status"]) == (0, 400)
    assert faulty["errors"] == {"onboot": "type check ('boolean') failed - got 'yes'"}


# Parameters


def test_every_faulty_parameter_is_named(pve: Pve) -> None:
    status, reason, errors = pve.refused("POST", f"{pve.n}/qemu", vmid="abc", memory="x", foo=1)
    assert (status, reason) == (400, "Parameter verification failed.")
    assert errors["vmid"].startswith("type check ('integer') failed - got 'abc'")
    assert errors["foo"] == "property is not defined in schema and the schema does not allow additional properties"
    assert errors["memory"].startswith("invalid format - format error\nmemory.current: type check ('integer') failed")


@pytest.mark.parametrize("text", ["true", "yes", "on", "maybe", "2"])
def test_booleans_are_0_or_1(pve: Pve, text: str) -> None:
    _, _, errors = pve.refused("GET", f"{pve.n}/qemu", full=text)
    assert errors == {"full": f"type check ('boolean') failed - got '{text}'"}


def test_what_is_missing_is_said(pve: Pve) -> None:
    _, _, errors = pve.refused("POST", f"{pve.n}/qemu")
    assert errors["vmid"] == "property is missing and it is not optional"


def test_keys_for_ssh_are_percent_encoded(pve: Pve) -> None:
    path = pve.vm()
    _, _, errors = pve.refused("PUT", f"{path}/config", sshkeys="ssh-ed25519 AAAA me@x")
    assert errors == {"sshkeys": "invalid format - invalid urlencoded string: ssh-ed25519 AAAA me@x\n"}
    encoded = quote("ssh-ed25519 AAAA me@x", safe="")
    assert pve.ask("PUT", f"{path}/config", sshkeys=encoded, cipassword="secret").data is None
    config = pve.get(f"{path}/config")
    assert (config["sshkeys"], config["cipassword"]) == (encoded, "**********")


# VMs


def test_create_and_the_types_of_a_configuration(pve: Pve) -> None:
    path = pve.vm(cores=2, onboot=0, agent=1, tags="a;b", description="first")
    config = pve.get(f"{path}/config")
    assert (config["cores"], config["onboot"], config["memory"], config["agent"]) == (2, 0, "64", "1")
    assert re.fullmatch(r"[0-9a-f]{40}", config["digest"])
    assert re.match(r"uuid=[0-9a-f-]{36}", config["smbios1"])
    assert re.fullmatch(r"[0-9a-f-]{36}", config["vmgenid"])
    assert config["meta"].startswith("creation-qemu=")
    assert "size=1G" in config["scsi0"]
    assert config["boot"] == "order=scsi0"
    status = pve.get(f"{path}/status/current")
    assert (status["status"], status["cpus"], status["maxmem"], status["ha"]) == (
        "stopped",
        2,
        64 << 20,
        {"managed": 0},
    )
    vmid = int(path.rpartition("/")[2])
    assert [vm["name"] for vm in pve.get(f"{pve.n}/qemu") if vm["vmid"] == vmid] == [f"t{vmid}"]
    reason = f"unable to create VM {vmid} - VM {vmid} already exists on node '{pve.node}'"
    assert pve.refused("POST", f"{pve.n}/qemu", vmid=vmid) == (500, reason, {})


def test_nextid_is_a_string_and_asserts(pve: Pve) -> None:
    path = pve.vm()
    vmid = path.rpartition("/")[2]
    found = pve.get("/cluster/nextid")
    assert isinstance(found, str)
    assert found.isdigit()
    assert pve.refused("GET", "/cluster/nextid", vmid=vmid)[2] == {"vmid": f"VM {vmid} already exists"}
    assert pve.get("/cluster/nextid", vmid=found) == found


def test_what_is_not_there_is_a_500(pve: Pve) -> None:
    vmid = pve.vmid()
    reason = f"Configuration file 'nodes/{pve.node}/qemu-server/{vmid}.conf' does not exist"
    for method, where in (("GET", "/config"), ("DELETE", ""), ("POST", "/status/start"), ("GET", "/snapshot")):
        assert pve.refused(method, f"{pve.n}/qemu/{vmid}{where}")[:2] == (500, reason)


def test_changes_with_and_without_a_digest(pve: Pve) -> None:
    path = pve.vm()
    before = pve.get(f"{path}/config")["digest"]
    assert pve.ask("PUT", f"{path}/config", description="one", digest=before).data is None
    config = pve.get(f"{path}/config")
    assert config["digest"] != before
    assert config["description"].strip() == "one"
    stale = pve.refused("PUT", f"{path}/config", cores=2, digest=before)
    assert stale[:2] == (500, "checksum mismatch (file change by other user?)")
    pve.do("POST", f"{path}/config", cores=2, delete="description")
    config = pve.get(f"{path}/config")
    assert config["cores"] == 2
    assert "description" not in config
    assert pve.refused("PUT", f"{path}/config", delete="zzz")[2] == {"delete": "unknown option 'zzz'"}
    both = pve.refused("PUT", f"{path}/config", delete="onboot", onboot=1)[2]
    assert both == {"delete": "you can't use '-onboot' and -delete onboot' at the same time"}
    for option in ({"lock": "backup"}, {"args": "-S"}):
        assert pve.refused("PUT", f"{path}/config", **option)[1] == f"only root can set '{next(iter(option))}' config"
    assert pve.refused("POST", f"{path}/status/start", skiplock=1)[2] == {"skiplock": "Only root may use this option."}


def test_a_removed_disk_becomes_unused(pve: Pve) -> None:
    path = pve.vm()
    volume = pve.get(f"{path}/config")["scsi0"].partition(",")[0]
    assert pve.ask("PUT", f"{path}/config", delete="scsi0").data is None
    config = pve.get(f"{path}/config")
    assert config["unused0"] == volume
    assert "scsi0" not in config
    assert config["boot"].strip() == ""
    assert pve.ask("PUT", f"{path}/config", delete="unused0").data is None
    vmid = path.rpartition("/")[2]
    assert pve.get(f"{pve.n}/storage/{pve.storage}/content", vmid=vmid) == []


def test_a_disk_grows_and_never_shrinks(pve: Pve) -> None:
    path = pve.vm()
    pve.do("PUT", f"{path}/resize", disk="scsi0", size="+64M")
    assert "size=1088M" in pve.get(f"{path}/config")["scsi0"]
    assert pve.run("PUT", f"{path}/resize", disk="scsi0", size="1G") == "shrinking disks is not supported"


def test_power_and_what_waits_while_it_runs(pve: Pve) -> None:
    path = pve.vm()
    vmid = path.rpartition("/")[2]
    for verb in ("reset", "suspend", "resume"):
        assert pve.refused("POST", f"{path}/status/{verb}")[:2] == (500, f"VM {vmid} not running")
    pve.do("POST", f"{path}/status/stop")  # of a stopped VM it is none
    pve.do("POST", f"{path}/status/start")
    assert pve.run("POST", f"{path}/status/start") == f"VM {vmid} already running"
    assert pve.get(f"{path}/status/current")["qmpstatus"] == "running"
    assert pve.ask("PUT", f"{path}/config", memory=80, description="at once").data is None
    waiting = {entry["key"]: entry for entry in pve.get(f"{path}/pending")}
    assert waiting["memory"] == {"key": "memory", "value": "64", "pending": "80"}
    assert "pending" not in waiting["description"]
    assert pve.get(f"{path}/config")["memory"] == "80"
    assert pve.get(f"{path}/config", current=1)["memory"] == "64"
    assert pve.ask("PUT", f"{path}/config", revert="memory").data is None
    assert pve.get(f"{path}/config")["memory"] == "64"
    assert pve.ask("PUT", f"{path}/config", memory=96).data is None
    pve.do("POST", f"{path}/status/suspend")
    assert pve.get(f"{path}/status/current")["qmpstatus"] == "paused"
    pve.do("POST", f"{path}/status/resume")
    assert pve.refused("DELETE", path)[:2] == (500, f"VM {vmid} is running - destroy failed")
    reason = "you can't convert a VM to template if VM is running"
    assert pve.refused("POST", f"{path}/template")[:2] == (500, reason)
    pve.do("POST", f"{path}/status/stop")
    assert pve.get(f"{path}/config", current=1)["memory"] == "96"


def test_protection_and_destroy(pve: Pve) -> None:
    path = pve.vm(protection=1)
    vmid = path.rpartition("/")[2]
    assert pve.refused("DELETE", path)[:2] == (500, f"can't remove VM {vmid} - protection mode enabled")
    assert pve.ask("PUT", f"{path}/config", protection=0).data is None
    pve.do("DELETE", path, purge=1, destroy_unreferenced_disks=1)
    assert pve.get(f"{pve.n}/storage/{pve.storage}/content", vmid=vmid) == []


def test_the_agents_three_refusals(pve: Pve) -> None:
    path, other = pve.vm(agent=1), pve.vm()
    vmid = path.rpartition("/")[2]
    assert pve.refused("POST", f"{path}/agent/ping")[1] == f"VM {vmid} is not running"
    for where in (path, other):
        pve.do("POST", f"{where}/status/start")
    assert pve.refused("GET", f"{path}/agent/get-osinfo")[1] == "QEMU guest agent is not running"
    assert pve.refused("POST", f"{other}/agent/ping")[1] == "No QEMU guest agent configured"


def test_a_lock_refuses_at_once_or_in_the_task(pve: Pve) -> None:
    root, path = pve.root(), pve.vm()
    assert pve.ask("PUT", f"{path}/config", headers=root, lock="backup").data is None
    locked = "VM is locked (backup)"
    for method, where, fields in (
        ("PUT", "/config", {"description": "x"}),
        ("POST", "/clone", {"newid": pve.vmid(), "full": 1}),
        ("POST", "/template", {}),
    ):
        assert pve.refused(method, f"{path}{where}", **fields)[:2] == (500, locked)
    for method, where, fields in (
        ("POST", "/snapshot", {"snapname": "s1"}),
        ("PUT", "/resize", {"disk": "scsi0", "size": "+1M"}),
        ("POST", "/status/start", {}),
    ):
        assert pve.run(method, f"{path}{where}", **fields) == locked
    pve.do("POST", f"{path}/status/stop")  # of a stopped VM it is none, and looks at no lock
    assert pve.get(f"{path}/config")["lock"] == "backup"
    assert pve.ask("PUT", f"{path}/config", headers=root, delete="lock", skiplock=1).data is None
    assert "lock" not in pve.get(f"{path}/config")


# Clones, templates, snapshots


def test_clones_and_templates(pve: Pve) -> None:
    path = pve.vm(net0="virtio")
    config = pve.get(f"{path}/config")
    volume = config["scsi0"].partition(",")[0]
    copy = pve.vmid()
    pve.do("POST", f"{path}/clone", newid=copy, name="copy", full=1)
    copied = pve.get(f"{pve.n}/qemu/{copy}/config")
    assert copied["name"] == "copy"
    assert all(copied[key] != config[key] for key in ("net0", "smbios1", "vmgenid", "scsi0"))
    taken = f"unable to create VM {copy}: config file already exists"
    assert pve.refused("POST", f"{path}/clone", newid=copy, full=1)[:2] == (500, taken)
    unsupported = f"Linked clone feature is not supported for '{volume}' (scsi0)"
    assert pve.refused("POST", f"{path}/clone", newid=pve.vmid(), full=0)[:2] == (500, unsupported)
    assert pve.refused("POST", f"{path}/clone", newid=pve.vmid(), target="nope")[1] == "no such cluster node 'nope'"
    pve.do("POST", f"{path}/template")
    template = pve.get(f"{path}/config")
    assert template["template"] == 1
    assert "/base-" in template["scsi0"]
    assert pve.run("POST", f"{path}/status/start") == "you can't start a vm if it's a template"
    linked = pve.vmid()
    refused = pve.refused("POST", f"{path}/clone", newid=linked, full=0, storage=pve.storage)
    assert refused[1] == "parameter 'storage' not allowed for linked clones"
    pve.do("POST", f"{path}/clone", newid=linked)  # of a template it is linked
    base = template["scsi0"].partition(",")[0].partition(":")[2]
    drive = pve.get(f"{pve.n}/qemu/{linked}/config")["scsi0"]
    assert drive.startswith(f"{pve.storage}:{base}/{linked}/vm-{linked}-disk-0.qcow2")
    assert "template" not in pve.get(f"{pve.n}/qemu/{linked}/config")
    assert re.match(r"base volume '.*' is still in use by linked clone", pve.run("DELETE", path))
    pve.do("DELETE", f"{pve.n}/qemu/{linked}")
    pve.do("DELETE", path)


def test_snapshots_are_a_tree(pve: Pve) -> None:
    path = pve.vm(description="before")
    at = f"{path}/snapshot"
    pve.do("POST", at, snapname="s1", description="first")
    assert pve.ask("PUT", f"{path}/config", cores=2).data is None
    pve.do("POST", at, snapname="s2")
    listed = {entry["name"]: entry for entry in pve.get(at)}
    assert pve.get(at)[-1]["name"] == "current"
    assert {name: entry.get("parent") for name, entry in listed.items()} == {"s1": None, "s2": "s1", "current": "s2"}
    assert (listed["s1"]["description"].strip(), listed["s1"]["vmstate"]) == ("first", 0)
    assert (listed["current"]["description"], listed["current"]["running"]) == ("You are here!", 0)
    assert isinstance(listed["s1"]["snaptime"], int)
    assert pve.get(f"{at}/s1/config")["snaptime"] == listed["s1"]["snaptime"]
    assert pve.ask("PUT", f"{at}/s1/config", description="renamed").data is None
    assert pve.get(f"{at}/s1/config")["description"].strip() == "renamed"
    reason = "unable to create template, because VM contains snapshots"
    assert pve.refused("POST", f"{path}/template")[:2] == (500, reason)
    assert pve.run("POST", at, snapname="s1") == "snapshot name 's1' already used"
    assert pve.run("DELETE", f"{at}/nope") == "snapshot 'nope' does not exist"
    assert "errors" in pve.ask("POST", at, snapname="a/b").json
    missing = pve.refused("POST", f"{path}/clone", newid=pve.vmid(), full=1, snapname="zz")
    assert missing[:2] == (500, "snapshot 'zz' does not exist")
    assert pve.get(f"{path}/feature", feature="snapshot") == {"hasFeature": 1, "nodes": [pve.node]}
    assert pve.get(f"{path}/feature", feature="clone")["hasFeature"] == 0
    before = pve.get(f"{path}/config")["vmgenid"]
    pve.do("POST", f"{at}/s1/rollback")
    config = pve.get(f"{path}/config")
    assert (config.get("cores", 1), config["parent"]) == (1, "s1")
    assert config["vmgenid"] != before
    pve.do("DELETE", f"{at}/s1")
    listed = {entry["name"]: entry for entry in pve.get(at)}
    assert listed.keys() == {"s2", "current"}
    assert not [entry for entry in listed.values() if entry.get("parent")]
    pve.do("DELETE", f"{at}/s2")


# Tasks and storages


def test_tasks(pve: Pve) -> None:
    path = pve.vm()
    vmid = path.rpartition("/")[2]
    upid = pve.ask("POST", f"{path}/status/stop").data
    match = UPID.fullmatch(upid)
    assert match is not None
    assert match.groups() == ("qmstop", vmid)
    pve.do("POST", f"{path}/status/stop")
    status = pve.get(f"{pve.n}/tasks/{upid}/status")
    assert (status["upid"], status["type"], status["id"], status["node"]) == (upid, "qmstop", vmid, pve.node)
    log = pve.ask("GET", f"{pve.n}/tasks/{upid}/log")
    assert log.data[-1] == {"n": log.json["total"], "t": "TASK OK"}
    listed = pve.get(f"{pve.n}/tasks", vmid=vmid, typefilter="qmcreate")
    assert {task["type"] for task in listed} == {"qmcreate"}  # of VMs before this one too
    assert (listed[0]["id"], listed[0]["status"]) == (vmid, "OK")
    assert all(task["endtime"] >= task["starttime"] for task in listed)
    gone = f"UPID:{pve.node}:00000002:00000002:6B002011:qmstart:1:root@pam:"
    assert pve.refused("GET", f"{pve.n}/tasks/{gone}/status")[2] == {"upid": "no such task"}
    assert pve.refused("GET", f"{pve.n}/tasks/UPID:xx/status")[2] == {"upid": "unable to parse worker upid"}


def test_storages_and_what_they_hold(pve: Pve) -> None:
    path = pve.vm()
    volume = pve.get(f"{path}/config")["scsi0"].partition(",")[0]
    status = pve.get(f"{pve.n}/storage/{pve.storage}/status")
    assert (status["active"], status["enabled"], status["type"]) == (1, 1, "dir")
    assert status["total"] >= status["avail"] >= 0
    found = [entry for entry in pve.get(f"{pve.n}/storage/{pve.storage}/content") if entry["volid"] == volume]
    assert [(entry["size"], entry["format"], entry["content"]) for entry in found] == [(1 << 30, "qcow2", "images")]
    reason = f"storage '{'n' * 20}' does not exist"
    assert pve.refused("GET", f"{pve.n}/storage/{'n' * 20}/content")[:2] == (500, reason)
    assert pve.refused("GET", f"{pve.n}/storage/{'n' * 20}/status")[2] == {"storage": "No such storage."}
    _, _, errors = pve.refused("GET", f"{pve.n}/storage/{pve.storage}/content", content="nope")
    assert list(errors) == ["content"]


def test_json_bodies_say_the_same(pve: Pve) -> None:
    path = pve.vm()
    headers = {**pve.authorization, "Content-Type": "application/json"}
    place = urlsplit(path).path
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection(*pve._address, context=context, timeout=60)
    body = json.dumps({"onboot": True, "cores": 2, "description": "by JSON"})
    connection.request("PUT", f"/api2/json{place}/config", body, headers)
    assert Answer(connection.getresponse()).data is None
    connection.close()
    config = pve.get(f"{path}/config")
    assert (config["onboot"], config["cores"], config["description"].strip()) == (1, 2, "by JSON")
