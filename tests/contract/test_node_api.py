"""The node's API: HTTP as Proxmox speaks it, authentication, parameters, tasks and the life of VMs on real disks."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from pathlib import Path

import pytest
from proxmoxer import ProxmoxAPI, ResourceException

from autovibe.errors import ConfigurationError
from autovibe.node import serve
from autovibe.node.disks import Disks
from autovibe.node.http.server import _as_reason
from tests.contract.node_parts import Client, FlagQemu, make_node

N = "/nodes/pvetest"
V = f"{N}/qemu/100"


def make_vm(client: Client, vmid: int = 100, **options: object) -> None:
    given = {"name": "tpl", "memory": 128, "scsi0": "local-lvm:1", "net0": "virtio,bridge=vmbr0", **options}
    client.do("POST", f"{N}/qemu", vmid=vmid, **given)


# HTTP


def test_an_error_is_in_the_status_line_and_ends_the_connection(client: Client) -> None:
    answer = client.ask("GET", f"{N}/qemu/999/config")
    message = "Configuration file 'nodes/pvetest/qemu-server/999.conf' does not exist"
    assert (answer.status, answer.reason) == (500, message)
    assert answer.json == {"data": None, "message": f"{message}\n"}
    assert answer.headers["content-type"] == "application/json;charset=UTF-8"
    assert answer.headers["server"] == "pve-api-daemon/3.0"
    assert answer.headers["connection"] == "close"


def test_a_connection_serves_many_requests(client: Client) -> None:
    connection = client.connect()
    for _ in range(3):
        connection.request("GET", "/api2/json/version", headers={"Authorization": client.authorization})
        response = connection.getresponse()
        assert response.status == 200
        assert json.loads(response.read())["data"]["version"] == "9.2.11"
    connection.close()


@pytest.mark.parametrize(
    ("method", "path", "status", "reason"),
    [
        ("PATCH", "/version", 501, "method 'PATCH' not available"),
        ("GET", "/nope", 501, "Method 'GET /nope' not implemented"),
        ("PUT", "/version", 501, "Method 'PUT /version' not implemented"),
        ("GET", "/nodes/pvetest/ceph/status", 501, "Method 'GET /nodes/pvetest/ceph/status' not implemented"),
    ],
)
def test_unknown_paths_and_methods_answer_501(client: Client, method: str, path: str, status: int, reason: str) -> None:
    answer = client.ask(method, path)
    assert (answer.status, answer.reason) == (status, reason)


def test_extjs_always_answers_200(client: Client) -> None:
    good = client.ask("GET", "/api2/extjs/version")
    assert good.json["success"] == 1
    bad = client.ask("GET", f"/api2/extjs{V}/nope")
    assert bad.status == 200
    message = f"Method 'GET {V}/nope' not implemented"
    assert bad.json == {"data": None, "success": 0, "status": 501, "message": message}


def test_a_large_body_is_refused(client: Client) -> None:
    answer = client.ask("POST", f"{N}/qemu", {"vmid": 100, "description": "x" * (600 << 10)})
    assert (answer.status, answer.reason, answer.body) == (501, "for data too large", b"")


def test_a_message_of_the_guests_becomes_an_ascii_reason() -> None:
    message = "Agent error: Failed to execute child process \u201c/nope\u201d (\u00c3)\nmore"
    assert _as_reason(message) == b"Agent error: Failed to execute child process '/nope' (?)"


def test_plain_http_is_sent_to_https(client: Client) -> None:
    with socket.create_connection(("127.0.0.1", client.node.port)) as plain:
        plain.sendall(b"GET /x HTTP/1.1\r\nHost: here:1\r\n\r\n")
        answer = plain.recv(4096).decode()
    assert answer.startswith("HTTP/1.1 301 ")
    assert "Location: https://here:1/x\r\n" in answer


def test_garbage_does_not_hurt(client: Client) -> None:
    with socket.create_connection(("127.0.0.1", client.node.port)) as plain:
        with client.context.wrap_socket(plain) as secured:
            secured.sendall(b"\x00\xff\r\n\r\n")
            assert secured.recv(100).startswith(b"HTTP/1.1 400 bad request\r\n")
    assert client.get("/version")["release"] == "9.2"


# Who calls


def test_without_or_with_wrong_credentials_there_is_a_bare_401(client: Client) -> None:
    token = client.authorization
    for headers, reason in (
        ({}, "No ticket"),
        ({"Authorization": token[:-1] + ("0" if token[-1] != "0" else "1")}, "Authentication failed!"),
        ({"Authorization": "PVEAPIToken=root@pam!other=0"}, "Authentication failed!"),
        ({"Cookie": "PVEAuthCookie=PVE:root@pam:6B000000::x"}, "permission denied - invalid PVE ticket"),
        ({"Authorization": "Basic abc"}, "No ticket"),
    ):
        answer = client.ask("GET", "/version", headers=headers)
        assert (answer.status, answer.reason, answer.body) == (401, reason, b"")
        assert "content-type" not in answer.headers


def test_a_ticket_works_with_its_csrf_token(client: Client) -> None:
    password = (client.node.home / "password").read_text().strip()
    refused = client.ask("POST", "/access/ticket", {"username": "root@pam", "password": "no"}, headers={})
    assert (refused.status, refused.reason) == (401, "authentication failure")
    assert refused.json == {"data": None, "message": "authentication failure\n"}
    login = client.ask("POST", "/access/ticket", {"username": "root@pam", "password": password}, headers={}).data
    cookie = {"Cookie": f"PVEAuthCookie={login['ticket'].replace(':', '%3A').replace('+', '%2B').replace('/', '%2F')}"}
    assert client.ask("GET", "/version", headers=cookie).status == 200
    denied = client.ask("POST", f"{N}/qemu", {"vmid": 100}, headers=cookie)
    assert (denied.status, denied.reason) == (401, "Permission denied - invalid csrf token")
    allowed = {**cookie, "CSRFPreventionToken": login["CSRFPreventionToken"]}
    upid = client.ask("POST", f"{N}/qemu", {"vmid": 100, "args": "-nodefaults"}, headers=allowed).data
    assert upid.endswith(":qmcreate:100:root@pam:")
    renewed = client.ask("POST", "/access/ticket", {"username": "root@pam", "password": login["ticket"]}, headers={})
    assert renewed.data["username"] == "root@pam"


def test_a_token_of_roots_is_not_root(client: Client) -> None:
    assert client.ask("POST", f"{N}/qemu", {"vmid": 501, "args": "-foo"}).reason == "only root can set 'args' config"
    make_vm(client)
    answer = client.ask("POST", f"{V}/status/start", {"skiplock": 1})
    assert answer.json["errors"] == {"skiplock": "Only root may use this option."}
    assert client.ask("PUT", f"{V}/config", {"lock": "backup"}).reason == "only root can set 'lock' config"


def test_secrets_are_private_and_kept(client: Client, tmp_path: Path) -> None:
    home = client.node.home
    for name in ("token", "password", "key.pem", "signing-key"):
        assert (home / name).stat().st_mode & 0o077 == 0
    token = (home / "token").read_text().strip()
    assert re.fullmatch(r"root@pam!autovibe=[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", token)
    fingerprint = client.node.fingerprint
    client.node.stop()
    again = make_node(home, FlagQemu())
    assert (again.token, again.fingerprint) == (token, fingerprint)
    assert (home / "fingerprint").read_text().strip() == fingerprint
    again.stop()


# Parameters


def test_all_faults_are_reported_together(client: Client) -> None:
    answer = client.ask("POST", f"{N}/qemu", {"vmid": "abc", "memory": "x", "foo": 1})
    assert (answer.status, answer.reason) == (400, "Parameter verification failed.")
    assert answer.json["errors"] == {
        "memory": "invalid format - format error\nmemory.current: type check ('integer') failed - got 'x'\n",
        "vmid": "type check ('integer') failed - got 'abc'",
        "foo": "property is not defined in schema and the schema does not allow additional properties",
    }


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"onboot": "true"}, "onboot"),
        ({"name": "bad_name"}, "name"),
        ({"name": "x\nargs: -foo"}, "name"),
        ({"ciuser": "x\nargs: -foo"}, "ciuser"),
        ({"sshkeys": "ssh-ed25519 AAAA me@x"}, "sshkeys"),
        ({"scsi1": "local-lvm:../../etc/passwd"}, "scsi1"),
        ({"scsi1": "/etc/passwd"}, "scsi1"),
        ({"scsi1": "local-lvm:1,import-from=/etc/passwd"}, "scsi1"),
        ({"scsi1": "local-lvm:1,nope=1"}, "scsi1"),
        ({"net0": "virtio=zz"}, "net0"),
        ({"ipconfig0": "ip=10.0.0.300/24"}, "ipconfig0"),
        ({"boot": "order=floppy"}, "boot"),
        ({"cores": 0}, "cores"),
        ({"delete": "zzz"}, "delete"),
        ({"hostpci0": "00:0x"}, "hostpci0"),
    ],
)
def test_a_bad_option_is_refused_by_name(client: Client, fields: dict[str, object], name: str) -> None:
    make_vm(client)
    before = client.get(f"{V}/config")
    answer = client.ask("PUT", f"{V}/config", fields)
    assert answer.status == 400
    assert list(answer.json["errors"]) == [name]
    assert client.get(f"{V}/config") == before


def test_json_bodies_and_json_booleans_pass(client: Client) -> None:
    make_vm(client)
    headers = {"Authorization": client.authorization, "Content-Type": "application/json"}
    answer = client.ask("PUT", f"{V}/config", body=b'{"onboot": true, "cores": 2}', headers=headers)
    assert answer.data is None
    assert client.get(f"{V}/config")["onboot"] == 1
    for body, status in ((b"[1]", 501), (b"{", 501), (b'{"name": {"a": 1}}', 400), (b'{"name": "\\ud800"}', 400)):
        assert client.ask("PUT", f"{V}/config", body=body, headers=headers).status == status


# Tasks


def test_a_task_has_status_log_and_a_place_in_the_lists(client: Client) -> None:
    upid = client.ask("POST", f"{N}/qemu", {"vmid": 100, "scsi0": "local:1"}).data
    assert client.end_of(upid) == "OK"
    assert client.log(upid)[-1] == "TASK OK"
    assert "scsi0: successfully created disk 'local:100/vm-100-disk-0.qcow2,size=1G'" in client.log(upid)
    page = client.ask("GET", f"{N}/tasks").json
    assert page["total"] == 1
    assert page["data"][0] | {"endtime": 0} == {
        "upid": upid, "node": "pvetest", "type": "qmcreate", "id": "100", "user": "root@pam", "tokenid": "autovibe",
        "status": "OK", "endtime": 0, **{key: page["data"][0][key] for key in ("pid", "pstart", "starttime")},
    }  # fmt: skip
    assert client.get("/cluster/tasks")[0]["upid"] == upid
    assert client.get(f"{N}/tasks", errors=1) == []
    assert len(client.ask("GET", f"{N}/tasks/{upid}/log", {"limit": 1}).json["data"]) == 1


def test_unknown_and_malformed_upids_are_400(client: Client) -> None:
    unknown = client.ask("GET", f"{N}/tasks/UPID:pvetest:00000002:00000002:6B002011:qmstart:1:root@pam:/status")
    assert (unknown.status, unknown.json["errors"]) == (400, {"upid": "no such task"})
    malformed = client.ask("GET", f"{N}/tasks/UPID:xx/status")
    assert malformed.json["errors"] == {"upid": "unable to parse worker upid"}


def test_finished_tasks_are_remembered_by_the_next_node(client: Client) -> None:
    upid = client.ask("POST", f"{N}/qemu", {"vmid": 100}).data
    client.end_of(upid)
    client.node.stop()
    again = Client(make_node(client.node.home, FlagQemu()))
    assert again.end_of(upid) == "OK"
    assert again.log(upid) == ["TASK OK"]
    again.node.stop()


def test_one_node_a_home(client: Client) -> None:
    with pytest.raises(ConfigurationError, match="in use by another node"):
        serve(client.node.home, "127.0.0.1", 0, qemu=FlagQemu(), disks=Disks(client.node.home / "storage"))


# The life of a VM


def test_create_gives_identity_disks_and_types(client: Client) -> None:
    make_vm(client, ide2="local-lvm:cloudinit", agent="enabled=1", serial0="socket", cores=2, boot="order=scsi0")
    config = client.get(f"{V}/config")
    assert config["scsi0"] == "local-lvm:vm-100-disk-0,size=1G"
    assert config["ide2"] == "local-lvm:vm-100-cloudinit,media=cdrom"
    assert re.fullmatch(r"virtio=BC:24:11(:[0-9A-F]{2}){3},bridge=vmbr0", config["net0"])
    assert (config["memory"], config["cores"]) == ("128", 2)
    assert re.fullmatch(r"[0-9a-f]{40}", config["digest"])
    assert client.get(f"{V}/status/current")["status"] == "stopped"
    assert client.get(f"{N}/qemu")[0] == {
        "vmid": 100, "name": "tpl", "status": "stopped", "cpus": 2, "maxmem": 128 << 20, "maxdisk": 1 << 30, "cpu": 0,
        "mem": 0, "memhost": 0, "uptime": 0, "disk": 0, "netin": 0, "netout": 0, "serial": 1,
    }  # fmt: skip
    resource = client.get("/cluster/resources", type="vm")[0]
    assert (resource["id"], resource["vmid"], resource["template"], resource["maxcpu"]) == ("qemu/100", 100, 0, 2)


def test_a_taken_vmid_is_a_clean_500_and_nextid_a_string(client: Client) -> None:
    assert client.get("/cluster/nextid") == "100"
    make_vm(client)
    assert client.get("/cluster/nextid") == "101"
    assert client.ask("GET", "/cluster/nextid", {"vmid": 100}).json["errors"] == {"vmid": "VM 100 already exists"}
    reason = "unable to create VM 100 - VM 100 already exists on node 'pvetest'"
    assert client.ask("POST", f"{N}/qemu", {"vmid": 100}).reason == reason


def test_a_create_that_fails_leaves_nothing(client: Client) -> None:
    status = client.run("POST", f"{N}/qemu", vmid=100, scsi0="local-lvm:1", scsi1="local:1,format=vmdk")
    assert status.startswith("unable to create VM 100 - ")
    assert client.get(f"{N}/qemu") == []
    assert client.get(f"{N}/storage/local-lvm/content") == []
    absent = client.ask("POST", f"{N}/qemu", {"vmid": 100, "scsi0": "nope:1"})
    assert absent.reason == "storage 'nope' does not exist"


def test_config_changes_wait_while_the_vm_runs(client: Client, qemu: FlagQemu) -> None:
    make_vm(client)
    client.do("POST", f"{V}/status/start")
    assert client.ask("PUT", f"{V}/config", {"memory": 384, "description": "two\nlines: %é"}).data is None
    assert client.get(f"{V}/config")["memory"] == "384"
    assert client.get(f"{V}/config", current=1)["memory"] == "128"
    assert client.get(f"{V}/config")["description"] == "two\nlines: %é"
    assert {"key": "memory", "value": "128", "pending": "384"} in client.get(f"{V}/pending")
    client.ask("PUT", f"{V}/config", {"revert": "memory"})
    assert client.get(f"{V}/config")["memory"] == "128"
    client.ask("PUT", f"{V}/config", {"memory": 256})
    client.do("POST", f"{V}/status/stop")
    assert client.get(f"{V}/config", current=1)["memory"] == "256"
    stale = client.ask("PUT", f"{V}/config", {"memory": 512, "digest": "0" * 40})
    assert stale.reason == "checksum mismatch (file change by other user?)"


def test_a_removed_disk_becomes_unused_and_then_goes(client: Client) -> None:
    make_vm(client, boot="order=scsi0")
    assert client.ask("PUT", f"{V}/config", {"delete": "scsi0"}).data is None
    config = client.get(f"{V}/config")
    assert (config["unused0"], config["boot"]) == ("local-lvm:vm-100-disk-0", " ")
    client.do("POST", f"{V}/config", scsi1="local-lvm:vm-100-disk-0")
    assert "unused0" not in client.get(f"{V}/config")
    client.ask("PUT", f"{V}/config", {"delete": "scsi1"})
    client.ask("PUT", f"{V}/config", {"delete": "unused0"})
    assert client.get(f"{N}/storage/local-lvm/content") == []


def test_resize_grows_and_never_shrinks(client: Client) -> None:
    make_vm(client)
    client.do("PUT", f"{V}/resize", disk="scsi0", size="+64M")
    assert client.get(f"{V}/config")["scsi0"].endswith("size=1088M")
    assert client.run("PUT", f"{V}/resize", disk="scsi0", size="1M") == "shrinking disks is not supported"
    assert client.run("PUT", f"{V}/resize", disk="scsi7", size="+1M") == "disk 'scsi7' does not exist"
    assert client.ask("PUT", f"{V}/resize", {"disk": "scsi0", "size": "1X"}).status == 400


def test_power(client: Client, qemu: FlagQemu) -> None:
    make_vm(client, ide2="local-lvm:cloudinit", ciuser="lab")
    assert client.ask("POST", f"{V}/status/reset").reason == "VM 100 not running"
    client.do("POST", f"{V}/status/stop")
    client.do("POST", f"{V}/status/start")
    drives = qemu.given[100][1]
    assert set(drives) == {"scsi0", "ide2"}
    assert b"hostname: tpl" in drives["ide2"].read_bytes()
    assert client.run("POST", f"{V}/status/start") == "VM 100 already running"
    client.do("POST", f"{V}/status/suspend")
    assert client.get(f"{V}/status/current")["qmpstatus"] == "paused"
    client.do("POST", f"{V}/status/resume")
    client.do("POST", f"{V}/status/reset")
    client.do("POST", f"{V}/status/reboot")
    qemu.ignores_power_button = True
    assert client.run("POST", f"{V}/status/shutdown", timeout=0) == "VM quit/powerdown failed - got timeout"
    upid = client.ask("POST", f"{V}/status/shutdown", {"timeout": 0, "forceStop": 1}).data
    assert client.end_of(upid) == "OK"
    assert "VM still running - terminating now with SIGTERM" in client.log(upid)
    assert not qemu.is_running(100)
    qemu.fails_with = "start failed: QEMU exited with code 1"
    assert client.run("POST", f"{V}/status/start") == "start failed: QEMU exited with code 1"


def test_destroy(client: Client) -> None:
    make_vm(client, ide2="local-lvm:cloudinit")
    client.do("POST", f"{V}/snapshot", snapname="s1")
    client.do("POST", f"{V}/status/start")
    assert client.ask("DELETE", V).reason == "VM 100 is running - destroy failed"
    client.do("POST", f"{V}/status/stop")
    client.ask("PUT", f"{V}/config", {"protection": 1})
    assert client.ask("DELETE", V).reason == "can't remove VM 100 - protection mode enabled"
    client.ask("PUT", f"{V}/config", {"protection": 0})
    client.do("DELETE", V, purge=1)
    assert client.get(f"{N}/qemu") == []
    assert client.get(f"{N}/storage/local-lvm/content") == []
    assert client.ask("DELETE", V).status == 500


def test_locks_refuse_at_once_or_in_the_task(client: Client, qemu: FlagQemu) -> None:
    make_vm(client)
    config = client.node.state.configs.load(100)
    config.values["lock"] = "backup"
    client.node.state.configs.save(100, config)
    for method, path, fields in (
        ("PUT", f"{V}/config", {"description": "x"}),
        ("POST", f"{V}/clone", {"newid": 101}),
        ("POST", f"{V}/template", {}),
    ):
        assert client.ask(method, path, fields).reason == "VM is locked (backup)"
    for method, path, fields in (
        ("POST", f"{V}/status/start", {}),
        ("POST", f"{V}/snapshot", {"snapname": "s1"}),
        ("PUT", f"{V}/resize", {"disk": "scsi0", "size": "+1M"}),
        ("DELETE", V, {}),
    ):
        assert client.run(method, path, **fields) == "VM is locked (backup)"
    client.do("POST", f"{V}/status/stop")  # nothing to be done
    qemu.start(100, {}, {})
    assert client.run("POST", f"{V}/status/stop") == "VM is locked (backup)"
    assert client.get(f"{V}/config")["lock"] == "backup"


# Clones and templates


def test_a_template_and_its_linked_clones(client: Client) -> None:
    make_vm(client, ide2="local-lvm:cloudinit")
    client.do("POST", f"{V}/template")
    assert client.get(f"{V}/config")["template"] == 1
    assert client.get(f"{V}/config")["scsi0"] == "local-lvm:base-100-disk-0,size=1G"
    assert client.run("POST", f"{V}/status/start") == "you can't start a vm if it's a template"
    upids: list[str] = []
    threads = [
        threading.Thread(
            target=lambda newid=newid: upids.append(
                client.ask("POST", f"{V}/clone", {"newid": newid, "name": f"c{newid}", "description": "mine"}).data
            )
        )
        for newid in range(101, 109)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [client.end_of(upid) for upid in upids] == ["OK"] * 8
    source, clone = client.get(f"{V}/config"), client.get(f"{N}/qemu/101/config")
    assert (clone["name"], clone["description"]) == ("c101", "mine")
    assert "template" not in clone
    for key in ("net0", "smbios1", "vmgenid", "scsi0", "ide2"):
        assert clone[key] != source[key]
    taken = client.ask("POST", f"{V}/clone", {"newid": 101})
    assert taken.reason == "unable to create VM 101: config file already exists"
    in_use = "base volume 'local-lvm:base-100-disk-0' is still in use by linked cloned"
    assert client.run("DELETE", V) == in_use
    refused = client.ask("POST", f"{V}/clone", {"newid": 120, "full": 0, "storage": "local"})
    assert refused.reason == "parameter 'storage' not allowed for linked clones"
    for newid in range(101, 109):
        client.do("DELETE", f"{N}/qemu/{newid}")
    client.do("DELETE", V)


def test_clones_of_a_snapshot_are_linked_where_the_storage_can(client: Client) -> None:
    make_vm(client)
    client.do("POST", f"{V}/snapshot", snapname="s1")
    assert client.get(f"{V}/feature", feature="clone", snapname="s1") == {"hasFeature": 1, "nodes": ["pvetest"]}
    client.do("POST", f"{V}/clone", newid=101, full=0, snapname="s1")
    assert "parent" not in client.get(f"{N}/qemu/101/config")
    make_vm(client, 200, scsi0="local:1")
    client.do("POST", f"{N}/qemu/200/snapshot", snapname="s1")
    assert client.get(f"{N}/qemu/200/feature", feature="clone", snapname="s1")["hasFeature"] == 0
    answer = client.ask("POST", f"{N}/qemu/200/clone", {"newid": 201, "full": 0, "snapname": "s1"})
    volid = "local:200/vm-200-disk-0.qcow2"
    assert answer.reason == f"Linked clone feature is not supported for a snapshot of '{volid}' (scsi0)"
    client.do("POST", f"{N}/qemu/200/clone", newid=201, full=1, snapname="s1", storage="local-lvm")
    assert client.get(f"{N}/qemu/201/config")["scsi0"] == "local-lvm:vm-201-disk-0,size=1G"
    missing = client.ask("POST", f"{V}/clone", {"newid": 305, "full": 1, "snapname": "zz"})
    assert missing.reason == "snapshot 'zz' does not exist"
    elsewhere = client.ask("POST", f"{V}/clone", {"newid": 306, "target": "nope"})
    assert elsewhere.reason == "no such cluster node 'nope'"


# Snapshots


def test_snapshots_make_a_tree(client: Client, qemu: FlagQemu) -> None:
    make_vm(client, agent=1)
    client.do("POST", f"{V}/snapshot", snapname="s1", description="first")
    client.do("POST", f"{V}/snapshot", snapname="s2")
    assert client.run("POST", f"{V}/snapshot", snapname="s1") == "snapshot name 's1' already used"
    client.ask("PUT", f"{V}/config", {"cores": 4})
    entries = {entry["name"]: entry for entry in client.get(f"{V}/snapshot")}
    assert (entries["s1"]["description"], entries["s2"]["parent"]) == ("first", "s1")
    assert client.get(f"{V}/snapshot")[-1]["name"] == "current"
    assert entries["current"]["parent"] == "s2"
    kept = client.get(f"{V}/snapshot/s1/config")
    assert "cores" not in kept
    assert "snapstate" not in kept
    client.ask("PUT", f"{V}/snapshot/s1/config", {"description": "changed"})
    client.do("POST", f"{V}/status/start")
    before = client.get(f"{V}/config")["vmgenid"]
    client.do("POST", f"{V}/snapshot/s1/rollback")
    assert not qemu.is_running(100)
    config = client.get(f"{V}/config")
    assert "cores" not in config
    assert (config["parent"], config["vmgenid"] == before) == ("s1", False)
    client.do("DELETE", f"{V}/snapshot/s1")
    entries = {entry["name"]: entry for entry in client.get(f"{V}/snapshot")}
    assert set(entries) == {"s2", "current"}
    assert "parent" not in entries["s2"]
    assert "parent" not in entries["current"]
    assert client.run("DELETE", f"{V}/snapshot/s1") == "snapshot 's1' does not exist"
    assert client.ask("POST", f"{V}/snapshot", {"snapname": "current"}).status == 500
    assert client.ask("POST", f"{V}/snapshot", {"snapname": "a" * 41}).status == 400


def test_a_running_guest_is_frozen_while_its_disks_are_snapshot(client: Client, qemu: FlagQemu) -> None:
    make_vm(client, agent=1)
    client.do("POST", f"{V}/status/start")
    qemu.answers = {}
    client.do("POST", f"{V}/snapshot", snapname="s1")
    assert qemu.agent_calls == ["ping", "fsfreeze-freeze", "fsfreeze-thaw"]
    qemu.answers = None
    upid = client.ask("POST", f"{V}/snapshot", {"snapname": "s2"}).data
    assert client.end_of(upid) == "OK"
    assert "skipping guest filesystem freeze - agent configured but not running?" in client.log(upid)


def test_a_snapshot_that_fails_is_taken_back_and_the_guest_thawed(
    client: Client, qemu: FlagQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_vm(client, agent=1, scsi1="local-lvm:1")
    client.do("POST", f"{V}/status/start")
    qemu.answers = {}
    disks, real = client.node.state.disks, client.node.state.disks.snapshot

    def failing(volid: str, name: str, *, monitor: object) -> None:
        if volid.endswith("disk-1"):
            raise OSError("no space left")
        real(volid, name, monitor=monitor)

    monkeypatch.setattr(disks, "snapshot", failing)
    assert client.run("POST", f"{V}/snapshot", snapname="s1") == "no space left"
    assert qemu.agent_calls[-1] == "fsfreeze-thaw"
    assert [entry["name"] for entry in client.get(f"{V}/snapshot")] == ["current"]
    assert disks.snapshots("local-lvm:vm-100-disk-0") == []
    assert "lock" not in client.get(f"{V}/config")


# Storages


def multipart(*parts: tuple[str, str | None, bytes]) -> tuple[bytes, dict[str, str]]:
    body = b""
    for name, filename, content in parts:
        place = f'; filename="{filename}"' if filename is not None else ""
        kind = "\r\nContent-Type: application/octet-stream" if filename is not None else ""
        body += (
            f'--b0\r\nContent-Disposition: form-data; name="{name}"{place}{kind}\r\n\r\n'.encode() + content + b"\r\n"
        )
    return body + b"--b0--\r\n", {"Content-Type": "multipart/form-data; boundary=b0"}


def upload(client: Client, storage: str, *parts: tuple[str, str | None, bytes]) -> object:
    body, headers = multipart(*parts)
    headers["Authorization"] = client.authorization
    return client.ask("POST", f"{N}/storage/{storage}/upload", body=body, headers=headers)


def test_uploads(client: Client) -> None:
    data = bytes(range(256)) * 4096
    answer = upload(client, "local", ("content", None, b"iso"), ("filename", "t 1.iso", data))
    assert ":imgcopy::" in answer.data
    assert client.end_of(answer.data) == "OK"
    listed = client.get(f"{N}/storage/local/content", content="iso")[0]
    assert (listed["volid"], listed["size"], listed["format"]) == ("local:iso/t_1.iso", len(data), "iso")
    assert set(listed) == {"volid", "size", "format", "ctime", "content"}
    assert client.node.state.disks.path("local:iso/t_1.iso").read_bytes() == data
    wrong = upload(client, "local", ("content", None, b"iso"), ("filename", "t.foo", data))
    assert wrong.json["errors"] == {"filename": "wrong file extension"}
    outside = upload(client, "local", ("content", None, b"iso"), ("filename", "../../../x.iso", b"x"))
    assert client.end_of(outside.data) == "OK"
    assert client.node.state.disks.path("local:iso/x.iso").exists()
    lvm = upload(client, "local-lvm", ("content", None, b"iso"), ("filename", "t.iso", data))
    assert lvm.reason == "can't upload to storage type 'lvmthin'"
    checked = upload(
        client, "local", ("content", None, b"snippets"), ("checksum", None, b"00"),
        ("checksum-algorithm", None, b"sha256"), ("filename", "u.yaml", b"#cloud-config\n"),
    )  # fmt: skip
    assert client.end_of(checked.data).startswith("checksum mismatch")
    none = upload(client, "local", ("content", None, b"iso"))
    assert none.json["errors"] == {"filename": "property is missing and it is not optional"}
    assert list((client.node.home / "uploads").iterdir()) == []
    client.do("DELETE", f"{N}/storage/local/content/local:iso/t_1.iso")
    client.do("DELETE", f"{N}/storage/local/content/iso/x.iso")
    assert client.get(f"{N}/storage/local/content") == []


@pytest.mark.parametrize("volume", ["local:iso/../../../token", "local-lvm:vm-100-disk-0", "local:iso/..", "x"])
def test_a_volume_outside_of_its_storage_is_refused(client: Client, volume: str) -> None:
    answer = client.ask("DELETE", f"{N}/storage/local/content/{volume}")
    assert answer.status in (400, 500)
    assert (client.node.home / "token").exists()


def test_storages_are_described(client: Client) -> None:
    found = {storage["storage"]: storage for storage in client.get(f"{N}/storage")}
    assert {name: storage["type"] for name, storage in found.items()} == {"local": "dir", "local-lvm": "lvmthin"}
    assert [storage["storage"] for storage in client.get(f"{N}/storage", content="import")] == ["local"]
    assert client.get(f"{N}/storage/local/status")["avail"] > 0
    absent = client.ask("GET", f"{N}/storage/nope/status")
    assert absent.json["errors"] == {"storage": "No such storage."}


# The guest agent


def test_the_agents_three_reasons_and_its_calls(client: Client, qemu: FlagQemu) -> None:
    make_vm(client)
    assert client.ask("POST", f"{V}/agent/ping").reason == "No QEMU guest agent configured"
    client.ask("PUT", f"{V}/config", {"agent": "enabled=1"})
    assert client.ask("POST", f"{V}/agent/ping").reason == "VM 100 is not running"
    client.do("POST", f"{V}/status/start")
    assert client.ask("POST", f"{V}/agent/ping").reason == "QEMU guest agent is not running"
    qemu.answers = {"get-host-name": {"host-name": "guest"}, "fsfreeze-status": "thawed"}
    assert client.ask("POST", f"{V}/agent/ping").data == {"result": {}}
    assert client.get(f"{V}/agent/get-host-name") == {"result": {"host-name": "guest"}}
    assert client.ask("POST", f"{V}/agent/fsfreeze-status").data == {"result": "thawed"}
    assert client.ask("POST", f"{V}/agent", {"command": "ping"}).data == {"result": {}}
    assert client.ask("POST", f"{V}/agent", {"command": "exec"}).status == 400
    fields = [("command", "sh"), ("command", "-c"), ("command", "echo\nhi"), ("input-data", "a\0b")]
    assert client.ask("POST", f"{V}/agent/exec", fields).data == {"pid": 145}
    assert "exec ['sh', '-c', 'echo\\nhi'] b'a\\x00b'" in qemu.agent_calls
    assert client.get(f"{V}/agent/exec-status", pid=145)["out-data"] == "hi\n"
    assert client.ask("POST", f"{V}/agent/file-write", {"file": "/x", "content": "aGVsbG8=", "encode": 0}).data is None
    assert "write /x b'hello'" in qemu.agent_calls
    assert client.ask("POST", f"{V}/agent/file-write", {"file": "/x", "content": "x" * 61441}).status == 400


# An unmodified client


def test_proxmoxer_drives_it(client: Client, tmp_path: Path) -> None:
    user, _, rest = client.node.token.partition("!")
    name, _, value = rest.partition("=")
    api = ProxmoxAPI(
        "127.0.0.1", port=client.node.port, user=user, token_name=name, token_value=value, timeout=30,
        verify_ssl=str(client.node.home / "cert.pem"),
    )  # fmt: skip
    node = api.nodes("pvetest")
    image = tmp_path / "t.qcow2"
    image.write_bytes(client.node.state.disks.path(_small_image(client)).read_bytes())
    with image.open("rb") as file:
        client.end_of(node.storage("local").upload.post(content="import", filename=file))
    upid = node.qemu.create(vmid=100, name="imp", memory=256, scsi0="local-lvm:0,import-from=local:import/t.qcow2")
    assert client.end_of(upid) == "OK"
    vm = node.qemu(100)
    assert vm.config.get()["scsi0"] == "local-lvm:vm-100-disk-0,size=8M"
    assert vm.config.put(tags="a;b", sshkeys="ssh-ed25519%20AAAA%20me%40x") is None
    client.end_of(vm.template.post())
    client.end_of(vm.clone.post(newid=101, name="c", description="x"))
    assert node.qemu(101).status.current.get()["name"] == "c"
    with pytest.raises(ResourceException) as refused:
        vm.clone.post(newid=101)
    assert refused.value.content == "unable to create VM 101: config file already exists"
    by_ticket = ProxmoxAPI(
        "127.0.0.1", port=client.node.port, user="root@pam", timeout=30,
        verify_ssl=str(client.node.home / "cert.pem"),
        password=(client.node.home / "password").read_text().strip(),
    )  # fmt: skip
    assert client.end_of(by_ticket.nodes("pvetest").qemu(101).delete()) == "OK"


def _small_image(client: Client) -> str:
    return client.node.state.disks.allocate("local", 999, size=8 << 20)


def test_stop_waits_for_tasks_and_answers_nothing_new(tmp_path: Path) -> None:
    qemu = FlagQemu()
    client = Client(make_node(tmp_path / "node", qemu))
    make_vm(client)
    client.do("POST", f"{V}/status/start")
    qemu.ignores_power_button = True
    client.ask("POST", f"{V}/status/shutdown", {"timeout": 1})
    before = time.monotonic()
    assert client.node.stop() is True
    assert 0.3 < time.monotonic() - before < 5
    with pytest.raises(OSError, match="refused"):
        client.ask("GET", "/version")
    assert qemu.is_running(100)
