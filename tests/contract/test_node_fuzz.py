"""Bad input over the whole table of routes: refused in Proxmox's words, never a defect, never a file out of the home.

The seed is new each time and printed when something is found; AUTOVIBE_FUZZ_SEED repeats a run.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from autovibe.node.access import auth
from autovibe.node.access.permissions import Anybody
from autovibe.node.refusal import Refusal
from autovibe.node.routes import ROUTES, Route
from autovibe.node.verbs import console
from tests.contract.fuzz_values import Fuzz
from tests.contract.node_parts import Client, FlagQemu, make_node

N = "/nodes/pvetest"
CALLS = int(os.environ.get("AUTOVIBE_FUZZ_CALLS", "12"))
"""Calls of each route."""

HEAD_BYTES = 8 << 10
"""Whose head is longer than this is cut off, by a real Proxmox too."""

STATUSES = {200, 400, 401, 403, 404, 414, 431, 500, 501}
DEFECT = re.compile(
    r"^(?!RRD error|download failed).*(internal error|Traceback|object has no|NoneType|invalid literal|list index"
    r"|unpack|KeyError|codec can't|File name too long|Invalid argument|Is a directory|Not a directory"
    r"|No such file or directory"
    r"|Permission denied$|File exists|Bad file descriptor|Too many levels|embedded null|surrogates|Errno|must be str"
    r"|expected str)"
)
UPID = re.compile(r'\{"data":"(UPID:[^"]+:)"\}')


class Watch:
    """A node and all that must not happen to it."""

    def __init__(self, client: Client, outside: Path) -> None:
        self.client, self.outside = client, outside
        self.faults: list[str] = []
        self.secrets = [
            (client.node.home / name).read_text().strip().rpartition("=")[2] for name in ("token", "password")
        ]
        self.secrets.append("the canary's own words")
        (outside / "canary").write_text(self.secrets[-1])
        for suffix in ("iso", "qcow2"):
            (outside / f"canary.{suffix}").write_text(self.secrets[-1])
        self.before = self._listing()

    def send(self, method: str, path: str, headers: dict[str, str], body: bytes | None) -> None:
        sent = {"Authorization": self.client.authorization, **headers}
        connection = self.client.connect()
        try:
            connection.request(method, f"/api2/json{path}", body=body, headers=sent)
            response = connection.getresponse()
            status, reason, data = response.status, response.reason, response.read()
        except (http.client.HTTPException, OSError) as error:
            if len(path) < HEAD_BYTES:
                self._note(method, path, body, f"no answer: {error!r}")
            return
        finally:
            connection.close()
        if status not in STATUSES or DEFECT.search(reason):
            self._note(method, path, body, f"{status} {reason}")
        if any(secret.encode() in data for secret in self.secrets):
            self._note(method, path, body, "the answer holds a secret")
        self._await_task(method, path, body, data)

    def _await_task(self, method: str, path: str, body: bytes | None, data: bytes) -> None:
        if method == "GET" or not (match := UPID.fullmatch(data.decode("utf-8", "replace"))):
            return
        try:
            task = self.client.node.state.tasks.find(match[1])
        except Refusal as error:
            self._note(method, path, body, f"its task is not found: {error!r}")
            return
        if not task.over.wait(60):
            self._note(method, path, body, "its task does not end")
        elif DEFECT.search(str(task.status)):
            self._note(method, path, body, f"its task ended with: {task.status}")

    def _note(self, method: str, path: str, body: bytes | None, what: str) -> None:
        self.faults.append(f"{method} {path[:300]} {(body or b'')[:300]!r}: {what}")

    def _listing(self) -> set[str]:
        """What lies beside the home, and what a shell would have left where the node works."""
        made = {str(path) for place in (Path.cwd(), Path.home()) for path in place.glob("*pwned*")}
        return made | {str(path) for path in self.outside.iterdir()}

    def check_outside(self) -> None:
        assert self._listing() == self.before
        assert (self.outside / "canary").read_text() == self.secrets[-1]
        assert not list(self.outside.glob("**/pwned*"))


class PatientQemu(FlagQemu):
    """Takes every line its monitor is told."""

    def tell(self, vmid: int, line: str) -> str:
        return ""


class _Tracebacks(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.texts.append(logging.Formatter("%(message)s").format(record))


@pytest.fixture
def tracebacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    handler = _Tracebacks()
    logging.getLogger("autovibe").addHandler(handler)
    monkeypatch.setattr(
        threading, "excepthook", lambda args: handler.texts.append(f"{args.thread}: {args.exc_value!r}")
    )
    yield handler.texts
    logging.getLogger("autovibe").removeHandler(handler)


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    monkeypatch.setattr(auth, "FAILED_LOGIN_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(console, "REFUSED_SECONDS", 0.0)
    outside = tmp_path / "outside"
    outside.mkdir()
    qemu = PatientQemu()
    qemu.answers = {"network-get-interfaces": []}
    node = make_node(outside / "node", qemu)
    yield Watch(Client(node), outside)
    node.stop()


def test_bad_input_is_refused(watch: Watch, tracebacks: list[str]) -> None:
    seed = int(os.environ.get("AUTOVIBE_FUZZ_SEED") or secrets.randbelow(1 << 32))
    fuzz = Fuzz(seed, _furnish(watch.client))
    for route in ROUTES:
        _furnish(watch.client)
        for _ in range(CALLS):
            watch.send(*fuzz.request(route))
    assert watch.client.ask("GET", "/version").status == 200
    watch.check_outside()
    found = [*dict.fromkeys(watch.faults), *dict.fromkeys(tracebacks)]
    assert not found, f"AUTOVIBE_FUZZ_SEED={seed}: {len(found)} defects\n" + "\n".join(found[:60])


def _furnish(client: Client) -> dict[str, tuple[str, ...]]:
    """VMs, a snapshot and volumes for the calls to meet, made again when a call took them; good values by name."""
    present = {vm["vmid"] for vm in client.get(f"{N}/qemu")}
    if 100 not in present:
        client.run("POST", f"{N}/qemu", vmid=100, memory=64, scsi0="local-lvm:1", ide2="local:cloudinit", agent=1)
        client.run("POST", f"{N}/qemu/100/snapshot", snapname="s1")
    if 101 not in present:
        client.run("POST", f"{N}/qemu", vmid=101, memory=64, scsi0="local:1,format=qcow2", agent=1)
    if client.get(f"{N}/qemu/101/status/current")["status"] != "running":
        client.run("POST", f"{N}/qemu/101/status/start")
    if 102 not in present:
        client.run("POST", f"{N}/qemu", vmid=102, memory=64, scsi0="local-lvm:1")
        client.run("POST", f"{N}/qemu/102/template")
    upid = client.get(f"{N}/tasks")[0]["upid"]
    return {
        "node": ("pvetest",), "vmid": ("100", "101", "101", "102", "400"), "newid": ("300", "301", "100"),
        "storage": ("local", "local-lvm"),
        "snapname": ("s1", "s2"), "upid": (upid, "UPID:pvetest:00000002:00000002:6B002011:qmstart:1:root@pam:"),
        "volume": ("local:101/vm-101-disk-0.qcow2", "local-lvm:vm-100-disk-0", "local:iso/no.iso"),
        "userid": ("fuzz@pve", "joe@pve"), "tokenid": ("t1", "t2"), "poolid": ("lab", "lab/sub"), "groupid": ("g1",),
        "roleid": ("PVEAuditor", "Role1"), "realm": ("pam", "pve"), "pos": ("0", "1"), "name": ("web", "set1"),
        "group": ("group1",), "cidr": ("10.0.0.0/8", "10.0.0.1"), "iface": ("vmbr0", "lo"), "service": ("pveproxy",),
        "sid": ("vm:100",), "target": ("pvetest",), "disk": ("scsi0",), "file": ("/tmp/x", "local:1"),
        "scsi1": ("local-lvm:1", "local:1,format=qcow2", "none,media=cdrom"), "content": ("iso", "images", "import"),
        "idlist": ("scsi1", "unused0"), "key": ("ret", "a-b"), "feature": ("clone", "snapshot"),
        "archive": ("local:backup/x",),
        "url": ("http://127.0.0.1:9/x.iso", "file:///etc/passwd", "ftp://127.0.0.1/x"), "timeout": ("0", "1"),
    }  # fmt: skip


def test_odd_paths_and_heads_are_refused(watch: Watch, tracebacks: list[str]) -> None:
    for path in (
        "/../../canary", "/%2e%2e/%2e%2e/canary", "//etc/passwd", f"{N}/qemu/100/../../../canary", f"{N}//qemu", "/%00",
        f"{N}/storage/local/content/local:iso/%2e%2e/%2e%2e/%2e%2e/canary", "/" + "a/" * 2000, "/" + "a" * 7000,
        f"{N}/storage/local/content/local:iso%2f..%2f..%2fcanary.iso", f"{N}/storage/..%2f..%2fcanary/content",
        f"{N}/storage/local/content/" + "%2e%2e%2f" * 20 + "canary", f"{N}/tasks/..%2f..%2f..%2fcanary/log",
        f"{N}/tasks/UPID:pvetest:..%2f:..%2f..%2fcanary:6B002011:qmstart:1:root@pam:/log", "/%ff%fe", "/\u0661?%ff=%fe",
        f"{N}/qemu/%31%30%30/config", f"{N}/qemu/100%00/config", f"{N}/qemu/1e2/config", f"{N}/qemu/+100/config",
    ):  # fmt: skip
        for method in ("GET", "DELETE", "POST", "PUT", "HEAD", "TRACE"):
            encoded = path.encode().decode("latin1")
            watch.send(method, "".join(char if char.isascii() else f"%{ord(char):02x}" for char in encoded), {}, None)
    assert watch.client.ask("GET", "/version").status == 200
    watch.check_outside()
    assert not [*watch.faults, *tracebacks], "\n".join([*watch.faults, *tracebacks])


@pytest.mark.parametrize("text", ["../../canary", "local:../../canary", "a\nb", "$(touch pwned)", "'; touch pwned; '"])
def test_a_hostile_volume_or_name_is_refused(watch: Watch, tracebacks: list[str], text: str) -> None:
    """Each parameter that names a volume, storage, snapshot, pool or VM refuses it by name, wherever it stands."""
    taken = []
    for route in ROUTES:
        for name in sorted(
            route.table.keys()
            & {"storage", "snapname", "poolid", "pool", "vmid", "newid", "node", "hookscript", "scsi0"}
        ):
            answer = _ask_with(watch.client, route, name, text)
            if answer[0] == 200:
                taken.append(f"{route.method} {route.path} {name}")
    watch.check_outside()
    assert not [*taken, *tracebacks]


def test_who_has_no_privileges_changes_and_sees_nothing(watch: Watch, tracebacks: list[str]) -> None:
    """Every route asked by a user that no rule of access names: what is not for all users is refused."""
    client = watch.client
    fuzz = Fuzz(1, _furnish(client))
    assert client.ask("POST", "/access/users", {"userid": "nobody@pve"}).status == 200
    token = client.ask("POST", "/access/users/nobody@pve/token/t1", {"privsep": 0}).data
    headers = {"Authorization": f"PVEAPIToken={token['full-tokenid']}={token['value']}"}
    passed = []
    for route in ROUTES:
        for _ in range(3):
            method, path, more, body = fuzz.honest(route)
            answer = client.ask(method, f"/api2/json{path}", body=body, headers={**headers, **more})
            assert not DEFECT.search(answer.reason), (method, path, answer.reason)
            if answer.status == 200 and (method != "GET" or not isinstance(route.needs, Anybody)):
                passed.append(f"{method} {path} {body!r}")
    assert not [*passed, *tracebacks], "\n".join([*passed, *tracebacks])


def _ask_with(client: Client, route: Route, name: str, text: str) -> tuple[int, str]:
    known = {"node": "pvetest", "vmid": "100", "storage": "local", "snapname": "s1", "poolid": "lab", "pos": "0"}
    fields = {**{key: known.get(key, "x") for key, param in route.table.items() if not param.optional}, name: text}
    path = route.path
    for part in re.findall(r"\{(\w+)\}", path):
        quoted = "".join(f"%{byte:02x}" for byte in fields.pop(part, known.get(part, "x")).encode())
        path = path.replace(f"{{{part}}}", quoted)
    kind = {"Content-Type": "application/json"} if route.method in ("POST", "PUT") else {}
    headers = {"Authorization": client.authorization, **kind}
    if kind:
        answer = client.ask(route.method, path, body=json.dumps(fields).encode(), headers=headers)
    else:
        answer = client.ask(route.method, path, fields, headers=headers)
    return answer.status, answer.reason
