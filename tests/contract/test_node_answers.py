"""Every GET of the node on a node with something in it: its answer is of the form that Proxmox's schema promises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from autovibe.node.routes import ROUTES, Route
from tests.contract.node_parts import Client, FlagQemu, make_node
from tests.contract.pve_reference import answer_faults, exchanges, schema

N = "/nodes/pvetest"

# Paths and what is not as promised: Proxmox itself (the recordings) answers so, or the reason why the node does.
OTHERWISE = {
    ("/cluster/nextid", "data is '104', not of type integer"): "a string in Proxmox too, and clients rely on it",
    (
        "/nodes/{node}/qemu/{vmid}/pending",
        r"data\[\d+\].(value|pending) is \d+, not of type string",
    ): "numbers there too",
}

# Routes that do not answer 200 here, and what they say.
REFUSING = {
    "/nodes/{node}/qemu/{vmid}/vncwebsocket": "permission denied - invalid PVEVNC ticket",
    "/nodes/{node}/qemu/{vmid}/agent/exec-status": "",
    "/nodes/{node}/query-url-metadata": "",
    "/cluster/ha/resources/{sid}": "no such resource 'vm:100'",
    "/cluster/ha/groups": "ha groups have been migrated to rules",
    "/cluster/ha/groups/{group}": "ha groups have been migrated to rules",
    "/cluster/ha/rules/{rule}": "no such ha rule 'r1'",
    "/cluster/replication/{id}": "no such replication job '100-0'",
    "/nodes/{node}/replication/{id}": "",
    "/cluster/backup-info": "Permission check failed (user != root@pam)",
}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    qemu = FlagQemu()
    node = make_node(tmp_path / "node", qemu)
    found = Client(node)
    _furnish(found, qemu)
    yield found
    node.stop()


def test_every_answer_is_as_the_schema_promises(client: Client) -> None:
    faults = []
    for route in ROUTES:
        spec = schema().get(route.path, {}).get(route.method)
        if route.method != "GET" or spec is None:
            continue
        for vmid in ("100", "101", "102") if "{vmid}" in route.path else ("100",):
            answer = client.ask("GET", _path_of(route, vmid, client), _fields_of(route, client))
            if answer.status != 200:
                if not _may_refuse(route, vmid, answer.reason):
                    faults.append(f"{route.path} ({vmid}): {answer.status} {answer.reason} {answer.body!r}")
                continue
            found = answer_faults(spec["returns"], answer.data)
            faults += [f"{route.path} ({vmid}): {text}" for text in found if not _is_otherwise(route.path, text)]
    assert not faults, f"{len(faults)} differences\n" + "\n".join(faults)


def test_the_recordings_themselves_are_as_promised() -> None:
    """What holds the node to the schema is held to what a real Proxmox answered."""
    faults = []
    for row in exchanges():
        path = row["path"].partition("?")[0].removeprefix("/api2/json")
        spec = next((spec for at, spec in schema().items() if _is_at(at, path)), {}).get(row["method"])
        if row["status"] == 200 and spec is not None:
            faults += [
                f"{row['method']} {path}: {text}" for text in answer_faults(spec["returns"], row["response"]["data"])
            ]
    odd = [text for text in faults if not re.search(r"nextid|/pending: .*not of type string|info.privsep", text)]
    assert not odd
    assert faults


def _is_at(template: str, path: str) -> bool:
    pattern = re.sub(r"\\{volume\\}", ".+", re.escape(template))
    return re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", pattern), path) is not None


def _is_otherwise(path: str, text: str) -> bool:
    return any(path == at and re.fullmatch(pattern, text) for at, pattern in OTHERWISE)


def _may_refuse(route: Route, vmid: str, reason: str) -> bool:
    if route.path in REFUSING:
        return REFUSING[route.path] in reason
    if "/agent/" in route.path:
        return vmid != "101" and reason in (f"VM {vmid} is not running", "No QEMU guest agent configured")
    return "snapname" in route.path and vmid != "100" and reason == "snapshot 's1' does not exist"


def _path_of(route: Route, vmid: str, client: Client) -> str:
    values = {
        "node": "pvetest", "vmid": vmid, "storage": "local", "snapname": "s1", "poolid": "lab", "userid": "joe@pve",
        "tokenid": "t1", "groupid": "g1", "roleid": "Role1", "realm": "pve", "pos": "0", "group": "group1",
        "cidr": "10.0.0.0/8", "iface": _first(client, "network", "iface"), "sid": "vm:100", "service": "pveproxy",
        "rule": "r1", "id": "100-0", "name": "set1" if "ipset" in route.path else "alias1",
        "volume": "local:101/vm-101-disk-0.qcow2",
        "upid": client.get(f"{N}/tasks")[0]["upid"],
    }  # fmt: skip
    return re.sub(r"\{(\w+)\}", lambda match: quote(values[match[1]], safe=""), route.path)


def _first(client: Client, what: str, key: str) -> str:
    entries = client.get(f"{N}/{what}")
    return str(entries[0][key]) if entries else "none"


def _fields_of(route: Route, client: Client) -> dict[str, Any] | None:
    """What must be given besides the path."""
    known = {
        "feature": "snapshot", "timeframe": "hour", "pid": 145, "file": "/tmp/x", "type": "user", "port": 5900,
        "vncticket": "x", "url": "http://127.0.0.1:9/x.iso",
    }  # fmt: skip
    in_path = set(re.findall(r"\{(\w+)\}", route.path))
    return {
        name: known[name] for name, param in route.table.items() if not param.optional and name not in in_path
    } or None


def _furnish(client: Client, qemu: FlagQemu) -> None:
    """A VM with snapshots, one that runs with an agent, a template; a pool, a user, rules."""
    disk = {
        "scsi0": "local-lvm:1",
        "ide2": "local:cloudinit",
        "ciuser": "lab",
        "net0": "virtio,bridge=vmbr0",
        "tags": "a;b",
    }
    client.do("POST", f"{N}/qemu", vmid=100, name="one", memory=64, agent=1, serial0="socket", description="x", **disk)
    for name in ("s1", "s2"):
        client.do("POST", f"{N}/qemu/100/snapshot", snapname=name, description=name)
    client.do(
        "POST",
        f"{N}/qemu",
        vmid=101,
        memory=64,
        agent=1,
        serial0="socket",
        scsi0="local:1,format=qcow2",
        ide2="local:cloudinit",
    )
    client.do("POST", f"{N}/qemu/101/status/start")
    assert client.ask("PUT", f"{N}/qemu/101/config", {"memory": 128, "delete": "serial0"}).status == 200
    client.do("POST", f"{N}/qemu", vmid=102, memory=64, scsi0="local-lvm:1", ide2="local:cloudinit")
    client.do("POST", f"{N}/qemu/102/template")
    client.do("POST", f"{N}/qemu/102/clone", newid=103)
    for method, path, fields in _STATE:
        answer = client.ask(method, path, fields)
        assert answer.status == 200, (method, path, answer.reason, answer.body)
    rows = exchanges()
    names = {143: "network-get-interfaces", 144: "get-osinfo", 145: "get-host-name", 146: "get-fsinfo", 147: "get-time"}
    names |= {148: "get-users", 149: "info"}
    qemu.answers = {name: rows[number]["response"]["data"]["result"] for number, name in names.items()}


_STATE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("POST", "/pools", {"poolid": "lab", "comment": "c"}),
    ("PUT", "/pools", {"poolid": "lab", "vms": "100,101", "storage": "local"}),
    ("POST", "/access/groups", {"groupid": "g1", "comment": "c"}),
    ("POST", "/access/users", {"userid": "joe@pve", "password": "secret-secret", "groups": "g1", "email": "a@b.org"}),
    ("POST", "/access/users/joe@pve/token/t1", {"comment": "c", "expire": 0}),
    ("POST", "/access/roles", {"roleid": "Role1", "privs": "VM.Audit,VM.PowerMgmt"}),
    ("PUT", "/access/acl", {"path": "/vms/100", "roles": "Role1", "users": "joe@pve"}),
    ("PUT", "/access/acl", {"path": "/", "roles": "PVEAuditor", "groups": "g1", "propagate": 0}),
    ("POST", "/cluster/firewall/groups", {"group": "group1", "comment": "c"}),
    ("POST", "/cluster/firewall/groups/group1", {"type": "in", "action": "ACCEPT", "enable": 1}),
    *(
        entry
        for at in ("/cluster/firewall", f"{N}/firewall", *(f"{N}/qemu/{vmid}/firewall" for vmid in (100, 101, 102)))
        for entry in (
            ("PUT", f"{at}/options", {"enable": 1}),
            ("POST", f"{at}/rules", {"type": "in", "action": "ACCEPT", "proto": "tcp", "dport": "22", "comment": "c"}),
        )
    ),
    *(
        entry
        for at in ("/cluster/firewall", *(f"{N}/qemu/{vmid}/firewall" for vmid in (100, 101, 102)))
        for entry in (
            ("POST", f"{at}/aliases", {"name": "alias1", "cidr": "10.0.0.1"}),
            ("POST", f"{at}/ipset", {"name": "set1", "comment": "c"}),
            ("POST", f"{at}/ipset/set1", {"cidr": "10.0.0.0/8", "nomatch": 1}),
        )
    ),
)
