"""The cluster's side of the node: options, vmids, resources by permission, log, and the lists of what is not there."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest

from autovibe.node.routes import ROUTES
from tests.contract.node_parts import Client, FlagQemu
from tests.contract.pve_reference import answer_faults, schema

N = "/nodes/pvetest"


def make_vm(client: Client, vmid: int, **options: object) -> None:
    client.do("POST", f"{N}/qemu", vmid=vmid, memory=64, **options)


def make_reader(client: Client, path: str, role: str, name: str = "joe") -> Client:
    """A client with a token of a user who has one role on one path."""
    user = f"{name}@pve"
    assert client.ask("POST", "/access/users", {"userid": user, "password": "secret-1"}).status == 200
    assert client.ask("PUT", "/access/acl", {"path": path, "roles": role, "users": user}).status == 200
    value = client.ask("POST", f"/access/users/{user}/token/t1", {"privsep": 0}).data["value"]
    reader = Client(client.node)
    reader.authorization = f"PVEAPIToken={user}!t1={value}"
    return reader


# Options


def test_options_are_kept_in_proxmox_own_form(client: Client) -> None:
    fresh = client.get("/cluster/options")
    assert fresh == {"allowed-tags": [], "description": "", "mac_prefix": "BC:24:11"}
    given = {
        "keyboard": "de",
        "console": "html5",
        "description": "our lab\nof machines",
        "next-id": "lower=500,upper=600",
        "tag-style": "shape=dense,case-sensitive=1",
        "bwlimit": "clone=1024,default=2048",
        "max_workers": 3,
        "registered-tags": "prod;secret",
        "user-tag-access": "user-allow=list,user-allow-list=blue;green",
        "migration": "insecure,network=10.0.0.0/8",
        "consent-text": "Be nice.\nAlways.",
    }
    assert client.ask("PUT", "/cluster/options", given).data is None
    found = client.get("/cluster/options")
    assert found == {
        **given,
        "description": "our lab\nof machines\n",
        "mac_prefix": "BC:24:11",
        "next-id": {"lower": 500, "upper": 600},
        "tag-style": {"shape": "dense", "case-sensitive": 1},
        "registered-tags": ["prod", "secret"],
        "user-tag-access": {"user-allow": "list", "user-allow-list": ["blue", "green"]},
        "migration": {"type": "insecure", "network": "10.0.0.0/8"},
        "allowed-tags": ["blue", "green", "prod", "secret"],
    }
    lines = (client.node.home / "datacenter.cfg").read_text().splitlines()
    assert lines[:2] == ["#our lab", "#of machines"]
    assert {"keyboard: de", "max_workers: 3", "next-id: lower=500,upper=600"} <= set(lines)
    client.ask("PUT", "/cluster/options", {"delete": "keyboard,description next-id", "console": "xtermjs"})
    found = client.get("/cluster/options")
    assert found["console"] == "xtermjs"
    assert not {"keyboard", "next-id"} & found.keys()
    assert found["description"] == ""


def test_bad_options_are_refused_together(client: Client) -> None:
    answer = client.ask(
        "PUT",
        "/cluster/options",
        {
            "keyboard": "xx",
            "max_workers": 0,
            "next-id": "lower=a",
            "nope": 1,
            "mac_prefix": "01:00",
            "email_from": "a b",
        },
    )
    assert (answer.status, answer.reason) == (400, "Parameter verification failed.")
    assert set(answer.json["errors"]) == {"keyboard", "max_workers", "next-id", "nope", "mac_prefix", "email_from"}
    answer = client.ask("PUT", "/cluster/options", {"next-id": "lower=700,upper=600"})
    assert (answer.status, answer.reason) == (500, "lower (700) <= upper (600) boundary rule broken")
    assert client.get("/cluster/options")["allowed-tags"] == []


@pytest.mark.parametrize("text", ["max_workers: x\nnext-id: lower\nnonsense\n: \nkeyboard: de\n", "\x00\n[a]\n", ""])
def test_an_options_file_edited_by_hand_breaks_nothing(client: Client, text: str) -> None:
    (client.node.home / "datacenter.cfg").write_text(text)
    assert client.get("/cluster/options")["mac_prefix"] == "BC:24:11"
    assert client.get("/cluster/nextid") == "100"
    assert client.ask("PUT", "/cluster/options", {"keyboard": "fr"}).status == 200
    assert client.get("/cluster/options")["keyboard"] == "fr"


def test_the_next_vmid_is_of_the_range_in_the_options(client: Client) -> None:
    assert client.get("/cluster/nextid") == "100"
    client.ask("PUT", "/cluster/options", {"next-id": "lower=500,upper=502"})
    assert client.get("/cluster/nextid") == "500"
    make_vm(client, 500)
    assert client.get("/cluster/nextid") == "501"
    make_vm(client, 501)
    answer = client.ask("GET", "/cluster/nextid")
    assert (answer.status, answer.reason) == (500, "unable to get any free VMID in range [500, 502]")
    assert client.get("/cluster/nextid", vmid=502) == "502"
    answer = client.ask("GET", "/cluster/nextid", {"vmid": 501})
    assert (answer.status, answer.json["errors"]) == (400, {"vmid": "VM 501 already exists"})


def test_options_changed_at_once_are_all_there(client: Client) -> None:
    changes = [{"keyboard": "de"}, {"max_workers": 5}, {"console": "vv"}, {"language": "ca"}, {"fencing": "both"}]
    threads = [threading.Thread(target=client.ask, args=("PUT", "/cluster/options", change)) for change in changes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = client.get("/cluster/options")
    assert {key: found.get(key) for change in changes for key in change} == {
        key: value for change in changes for key, value in change.items()
    }


# Who sees what


def test_resources_carry_pool_tags_and_lock(client: Client, qemu: FlagQemu) -> None:
    make_vm(client, 100, name="web", tags="a;b", scsi0="local-lvm:1")
    make_vm(client, 101)
    assert client.ask("POST", "/pools", {"poolid": "lab", "comment": "c"}).status == 200
    assert client.ask("PUT", "/pools", {"poolid": "lab", "vms": "100"}).status == 200
    config = client.node.state.configs.load(101)
    config.values["lock"] = "backup"
    client.node.state.configs.save(101, config)
    client.do("POST", f"{N}/qemu/100/status/start")
    found = client.get("/cluster/resources")
    by_id = {entry["id"]: entry for entry in found}
    assert by_id["/pool/lab"] == {"id": "/pool/lab", "pool": "lab", "type": "pool"}
    web, other = by_id["qemu/100"], by_id["qemu/101"]
    assert (web["pool"], web["tags"], web["status"], web["template"], web["maxdisk"]) == (
        "lab",
        "a;b",
        "running",
        0,
        1 << 30,
    )
    assert (other["lock"], other["name"], other["status"]) == ("backup", "VM 101", "stopped")
    assert "pool" not in other
    assert by_id["node/pvetest"]["cgroup-mode"] == 2
    assert {"storage/pvetest/local", "storage/pvetest/local-lvm"} <= by_id.keys()
    assert by_id["network/pvetest/zone/localnetwork"]["network-type"] == "zone"
    assert not list(answer_faults(schema()["/cluster/resources"]["GET"]["returns"], found))
    for kind, wanted in (("vm", {"qemu"}), ("node", {"node"}), ("storage", {"storage"}), ("sdn", {"network"})):
        assert {entry["type"] for entry in client.get("/cluster/resources", type=kind)} == wanted


def test_lists_are_cut_to_what_the_caller_may_see(client: Client) -> None:
    make_vm(client, 100, tags="mine")
    make_vm(client, 101, tags="theirs")
    reader = make_reader(client, "/vms/100", "PVEAuditor")
    assert [entry["id"] for entry in reader.get("/cluster/resources", type="vm")] == ["qemu/100"]
    assert {entry["id"] for entry in reader.get("/cluster/resources")} == {"qemu/100", "node/pvetest"}
    (node,) = reader.get("/nodes")
    assert set(node) == {"id", "node", "type", "status", "ssl_fingerprint"}
    assert reader.get("/cluster/options") == {"allowed-tags": ["mine"]}
    assert reader.get("/cluster/log") == []
    assert reader.ask("GET", "/cluster/status").status == 403
    assert reader.ask("GET", "/cluster/backup-info/not-backed-up").status == 403
    assert reader.ask("PUT", "/cluster/options", {"keyboard": "de"}).reason == "Permission check failed (/, Sys.Modify)"
    assert reader.ask("GET", f"{N}/status").status == 403
    assert "serverid" not in reader.get(f"{N}/subscription")
    assert reader.get(f"{N}/network") == []
    assert reader.ask("GET", f"{N}/qemu/101/rrddata", {"timeframe": "hour"}).status == 403
    assert len(reader.get(f"{N}/qemu/100/rrddata", timeframe="hour")) == 60


def test_many_vms_at_a_time_need_the_right_on_each(client: Client, qemu: FlagQemu) -> None:
    for vmid in (100, 101):
        make_vm(client, vmid, startup="up=0")
    operator = make_reader(client, "/vms/100", "PVEVMUser")
    for verb, reason in (
        ("startall", "Permission check failed (/, VM.PowerMgmt)"),
        ("stopall", "Permission check failed (/, VM.PowerMgmt)"),
        ("suspendall", "Permission check failed (/, VM.PowerMgmt && VM.Config.Disk)"),
    ):
        answer = operator.ask("POST", f"{N}/{verb}", {})
        assert (answer.status, answer.reason) == (403, reason)
        answer = operator.ask("POST", f"{N}/{verb}", {"vms": "100,101"})
        assert (answer.status, answer.reason) == (403, "Permission check failed (/vms/101, VM.PowerMgmt)")
    assert operator.ask("POST", f"{N}/migrateall", {"target": "other"}).status == 403
    upid = operator.ask("POST", f"{N}/startall", {"vms": "100", "force": 1}).data
    assert client.end_of(upid) == "OK"
    assert set(qemu.started) == {100}


# The log, and what is not there


def test_the_log_tells_of_tasks(client: Client) -> None:
    make_vm(client, 100)
    upid = client.ask("POST", f"{N}/qemu/100/status/start").data
    client.end_of(upid)
    failed = client.ask("POST", f"{N}/qemu/100/status/start").data
    assert client.end_of(failed) == "VM 100 already running"
    entries = client.get("/cluster/log")
    messages = {entry["msg"]: entry for entry in entries}
    assert messages[f"starting task {upid}"]["pri"] == 6
    assert messages[f"end task {upid} OK"]["user"] == "root@pam!autovibe"
    assert messages[f"end task {failed} VM 100 already running"]["pri"] == 3
    assert [entry["time"] for entry in entries] == sorted((entry["time"] for entry in entries), reverse=True)
    assert {"uid", "id", "node", "pid", "tag", "time", "user", "pri", "msg"} == set(entries[0])
    assert len({entry["id"] for entry in entries}) == len(entries)
    assert client.get("/cluster/log", max=2) == entries[:2]
    assert client.ask("GET", "/cluster/log", {"max": 0}).status == 400


EMPTY = (
    "/cluster/ha/resources", "/cluster/ha/rules", "/cluster/replication", "/cluster/backup", "/cluster/mapping/pci",
    "/cluster/mapping/usb", "/cluster/mapping/dir", "/cluster/sdn/zones", "/cluster/sdn/vnets",
    "/cluster/jobs/realm-sync", f"{N}/lxc", f"{N}/replication", f"{N}/aplinfo", f"{N}/netstat",
)  # fmt: skip


def test_lists_of_what_a_single_node_has_none_of_are_empty(client: Client) -> None:
    assert {path: client.get(path) for path in EMPTY} == {path: [] for path in EMPTY}
    assert client.get("/cluster/config/qdevice") == {}


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/cluster/ha/resources/vm:100", 500, "no such resource 'vm:100'"),
        ("/cluster/ha/resources/100", 500, "unable do add resource - VM/CT 100 does not exist"),
        ("/cluster/ha/resources/..", 400, "Parameter verification failed."),
        ("/cluster/ha/groups", 500, "cannot index groups: ha groups have been migrated to rules"),
        ("/cluster/ha/groups/g1", 500, "cannot read group 'g1': ha groups have been migrated to rules"),
        ("/cluster/ha/rules/r1", 500, "no such ha rule 'r1'"),
        ("/cluster/replication/100-0", 500, "no such replication job '100-0'"),
        ("/cluster/ceph/status", 501, "Method 'GET /cluster/ceph/status' not implemented"),
    ],
)
def test_what_is_not_there_is_refused_by_name(client: Client, path: str, status: int, reason: str) -> None:
    answer = client.ask("GET", path)
    assert (answer.status, answer.reason) == (status, reason)


def test_the_ha_manager_stands_by(client: Client) -> None:
    quorum, fencing = client.get("/cluster/ha/status/current")
    assert (quorum["id"], quorum["quorate"], quorum["status"], quorum["node"]) == ("quorum", 1, "OK", "pvetest")
    assert (fencing["type"], fencing["armed-state"]) == ("fencing", "standby")
    make_vm(client, 100)
    assert client.ask("GET", "/cluster/ha/resources/100").reason == "no such resource 'vm:100'"


def test_every_vm_is_not_backed_up(client: Client) -> None:
    assert client.get("/cluster/backup-info/not-backed-up") == []
    make_vm(client, 100, name="web")
    make_vm(client, 101)
    assert client.get("/cluster/backup-info/not-backed-up") == [
        {"vmid": 100, "name": "web", "type": "qemu"},
        {"vmid": 101, "type": "qemu"},
    ]


# The schema


def test_indexes_name_what_is_there(client: Client) -> None:
    places = {"/": "subdir", "/cluster": "name", "/cluster/ha": "id", "/cluster/ha/status": "name", N: "name"}
    places |= {"/cluster/config": "name", "/cluster/jobs": "subdir", "/cluster/mapping": "name", "/cluster/sdn": "id"}
    places |= {f"{N}/capabilities": "name", f"{N}/capabilities/qemu": "name"}
    known = {route.path.replace("{node}", "pvetest") for route in ROUTES}
    for place, key in places.items():
        for entry in client.get(place):
            child = f"{place.rstrip('/')}/{entry[key]}"
            assert any(path == child or path.startswith(f"{child}/") for path in known), child


def test_every_answer_has_the_shape_of_the_schema(client: Client) -> None:
    make_vm(client, 100, name="web")
    skipped = re.compile(r"/(qemu|storage|firewall|tasks|vnc|spice|term|query-)|\{(?!node)|/(rrd|qdevice)")
    faults = []
    for path, methods in schema().items():
        if not path.startswith(("/cluster", "/nodes")) or skipped.search(path.replace("/capabilities/qemu", "")):
            continue
        if "GET" not in methods or path in ("/cluster/ha/groups", "/cluster/backup-info"):  # refused, for root only
            continue
        answer = client.ask("GET", path.replace("{node}", "pvetest"), needed(path))
        if answer.status == 501:
            continue
        assert answer.status == 200, (path, answer.status, answer.reason)
        faults += [f"{path}: {fault}" for fault in answer_faults(methods["GET"].get("returns"), answer.json["data"])]
    assert not [fault for fault in faults if not fault.startswith(("/cluster/nextid", "/cluster/options"))], faults


def needed(path: str) -> dict[str, Any] | None:
    return {"timeframe": "hour"} if path.endswith("rrddata") else None
