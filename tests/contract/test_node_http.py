"""HTTP as Proxmox's own server speaks it, byte by byte, and what a hostile or clumsy client can do to it: nothing."""

from __future__ import annotations

import gzip
import html
import json
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest

from autovibe.node import serve
from autovibe.node.access.auth import Actor
from autovibe.node.disks import Disks, qemu_img
from autovibe.node.http import server
from autovibe.node.refusal import Refusal
from autovibe.node.tasks import Task
from autovibe.node.tasks.worker import running, start_of
from tests.contract.node_parts import Answer, Client, FlagQemu

N = "/nodes/pvetest"


class Wire:
    """A TLS connection on which a test writes what it wants."""

    def __init__(self, client: Client, context: ssl.SSLContext | None = None) -> None:
        plain = socket.create_connection(("127.0.0.1", client.node.port), timeout=20)
        self.socket = (context or client.context).wrap_socket(plain)
        self.rest = b""

    def send(self, data: bytes) -> Wire:
        self.socket.sendall(data)
        return self

    def until(self, mark: bytes) -> bytes:
        while mark not in self.rest:
            block = self.socket.recv(65536)
            if not block:
                raise EOFError(self.rest)
            self.rest += block
        found, _, self.rest = self.rest.partition(mark)
        return found

    def answer(self) -> tuple[str, dict[str, str], bytes]:
        """Status line, headers and body of the next answer."""
        lines = self.until(b"\r\n\r\n").decode("latin1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        size = int(headers.get("content-length", 0))
        while len(self.rest) < size:
            self.rest += self.socket.recv(65536)
        body, self.rest = self.rest[:size], self.rest[size:]
        return lines[0], headers, body

    def to_end(self) -> bytes:
        found = self.rest
        while block := self._block():
            found += block
        return found

    def _block(self) -> bytes:
        try:
            return self.socket.recv(65536)
        except (ConnectionError, ssl.SSLError):
            return b""


def head(client: Client, line: str = "GET /api2/json/version HTTP/1.1", *more: str) -> bytes:
    lines = [line, "Host: node", f"Authorization: {client.authorization}", *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin1")


def login(client: Client) -> dict[str, str]:
    password = (client.node.home / "password").read_text().strip()
    fields = {"username": "root@pam", "password": password}
    found = client.ask("POST", "/access/ticket", fields, headers={}).data
    assert isinstance(found, dict)
    return found


# The status line and the headers


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("PATCH /api2/json/version HTTP/1.1", "501 method 'PATCH' not available"),
        ("OPTIONS /api2/json/version HTTP/1.1", "501 method 'OPTIONS' not available"),
        ("HEAD /api2/json/version HTTP/1.1", "501 method 'HEAD' not available"),
        ("GET /api2/json/version HTTP/2.0", "506 http protocol version 2.0 not supported"),
        ("GET root@host HTTP/1.1", "400 invalid url"),
        ("nonsense", "400 bad request"),
        ("GET / HTTP/1.1", "501 no such file '/'"),
        ("GET /api2 HTTP/1.1", "501 no such uri"),
        ("GET /api2/html/version HTTP/1.1", "501 no formatter for uri /version, html"),
    ],
)
def test_what_a_real_one_refuses_barely(client: Client, line: str, status: str) -> None:
    got, headers, body = Wire(client).send(head(client, line)).answer()
    assert got == f"HTTP/1.1 {status}"
    assert (body, headers.get("content-type"), headers["connection"]) == (b"", None, "close")


@pytest.mark.parametrize(
    ("more", "status"),
    [
        (["Transfer-Encoding: chunked"], "501 chunked transfer encoding not supported"),
        (["Transfer-Encoding: gzip"], "501 Unknown transfer encoding 'gzip'"),
        (["no colon here"], "506 unable to parse request header"),
        (["Content-Length: 3"], "501 Unexpected content for method 'GET'"),
    ],
)
def test_headers_a_real_one_refuses(client: Client, more: list[str], status: str) -> None:
    assert Wire(client).send(head(client, "GET /api2/json/version HTTP/1.1", *more)).answer()[0] == f"HTTP/1.1 {status}"


def test_the_headers_of_an_answer(client: Client) -> None:
    status, headers, body = Wire(client).send(head(client)).answer()
    assert status == "HTTP/1.1 200 OK"
    assert headers["content-type"] == "application/json;charset=UTF-8"
    assert headers["connection"] == "Keep-Alive"
    assert headers["expires"] == headers["date"]
    assert (headers["cache-control"], headers["pragma"]) == ("max-age=0", "no-cache")
    assert json.loads(body)["data"]["version"] == "9.2.11"


def test_too_large_heads_get_no_answer(client: Client) -> None:
    fitting = [f"X-{number}: a" for number in range(60)]
    assert "200" in Wire(client).send(head(client, "GET /api2/json/version HTTP/1.1", *fitting)).answer()[0]
    many = [f"X-{number}: a" for number in range(62)]
    assert Wire(client).send(head(client, "GET /api2/json/version HTTP/1.1", *many)).to_end() == b""
    assert Wire(client).send(head(client, "GET /api2/json/version HTTP/1.1", "X: " + 8192 * "a")).to_end() == b""
    assert Wire(client).send(b"GET " + 12_000 * b"/").to_end() == b""
    assert client.get("/version")["version"] == "9.2.11"


def test_answers_are_compressed_for_who_takes_it(client: Client) -> None:
    long = head(client, f"GET /api2/json{N}/status HTTP/1.1", "Accept-Encoding: gzip, deflate")
    _, headers, body = Wire(client).send(long).answer()
    assert headers["content-encoding"] == "gzip"
    assert "cpuinfo" in json.loads(gzip.decompress(body))["data"]
    _, headers, body = (
        Wire(client).send(head(client, "GET /api2/json/version HTTP/1.1", "Accept-Encoding: gzip")).answer()
    )
    assert "content-encoding" not in headers
    assert "content-encoding" not in client.ask("GET", f"{N}/status").headers


# Forms of answers and bodies


def test_the_forms_of_answers(client: Client) -> None:
    assert client.ask("GET", "/api2/extjs/version").json["success"] == 1
    refused = client.ask("GET", f"/api2/extjs{N}/qemu/999/config")
    assert (refused.status, refused.json["success"], refused.json["status"]) == (200, 0, 500)
    faulty = client.ask("POST", f"/api2/extjs{N}/qemu", {"vmid": "x"}).json
    assert (faulty["status"], set(faulty["errors"])) == (400, {"vmid"})
    page = client.ask("GET", "/api2/htmljs/version")
    assert page.headers["content-type"] == "text/html;charset=UTF-8"
    assert json.loads(html.unescape(page.body.decode()))["data"]["version"] == "9.2.11"
    bare = client.ask("GET", "/api2/extjs/version", headers={})
    assert (bare.status, bare.reason, bare.body) == (401, "No ticket", b"")


def test_slashes_are_forgiven(client: Client) -> None:
    for path in ("/api2/json/version/", "/api2//json/version", "/api2/json//version"):
        assert client.ask("GET", path).status == 200, path


def post(client: Client, body: bytes, kind: str | None) -> Answer:
    headers = {"Authorization": client.authorization, **({"Content-Type": kind} if kind else {})}
    return client.ask("POST", f"{N}/qemu", body=body, headers=headers)


def test_bodies(client: Client) -> None:
    for kind in (None, "text/plain", "application/x-www-form-urlencoded"):
        answer = post(client, b'{"vmid": 100}', kind)
        assert answer.status == 400
        assert '{"vmid": 100}' in answer.json["errors"], kind
    assert "memory" in post(client, b"vmid=100&memory=1&memory=2", None).json["errors"]
    assert "net0" in post(client, b"vmid=100&net0=virtio,bridge=vmbr0&cores=x", None).json["errors"], (
        "a bare '=' ends it"
    )
    assert set(post(client, b"vmid=1;cores=x", None).json["errors"]) == {"vmid", "cores"}
    assert post(client, b'{"vmid": 1, "cores": "x"}', "application/json; charset=utf-8").status == 400
    for broken in (b"{", b"[1]", b'"x"', b"[" * 100_000):
        answer = post(client, broken, "application/json")
        assert (answer.status, answer.body) == (501, b""), broken[:10]
    assert client.ask("GET", "/version?_dc=1637").status == 200


def test_large_bodies(client: Client) -> None:
    answer = post(client, b"vmid=100&description=" + 100_000 * b"a", None)
    assert (answer.status, list(answer.json["errors"])) == (400, ["description"])
    too_large = post(client, b"a" * ((512 << 10) + 1), None)
    assert (too_large.status, too_large.reason, too_large.body) == (501, "for data too large", b"")
    begun = Wire(client).send(head(client, f"POST /api2/json{N}/qemu HTTP/1.1", "Content-Length: 99999999999"))
    assert begun.answer()[0] == "HTTP/1.1 501 for data too large"


def test_a_client_may_ask_before_it_sends_the_body(client: Client) -> None:
    line = "POST /api2/json/access/ticket HTTP/1.1"
    wire = Wire(client).send(head(client, line, "Content-Length: 9", "Expect: 100-continue"))
    assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
    assert wire.send(b"username=").answer()[0] == "HTTP/1.1 400 Parameter verification failed."
    refused = Wire(client).send(
        b"POST /api2/json/nodes HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
    )
    assert refused.answer()[0] == "HTTP/1.1 401 No ticket"


# Connections


def test_requests_may_come_at_once_and_in_pieces(client: Client) -> None:
    wire = Wire(client).send(head(client) * 3)
    assert [wire.answer()[0] for _ in range(3)] == ["HTTP/1.1 200 OK"] * 3
    for byte in head(client)[:40]:
        wire.send(bytes([byte]))
    assert wire.send(head(client)[40:]).answer()[0] == "HTTP/1.1 200 OK"
    put = head(client, f"POST /api2/json{N}/qemu HTTP/1.1", "Content-Length: 6") + b"vmid=1"
    assert wire.send(put + head(client)).answer()[0] == "HTTP/1.1 400 Parameter verification failed."
    assert wire.to_end() == b"", "an error ends the connection, whatever else was asked"


def test_when_a_connection_ends(client: Client) -> None:
    assert (
        Wire(client)
        .send(head(client, "GET /api2/json/version HTTP/1.1", "Connection: close"))
        .answer()[1]["connection"]
        == "close"
    )
    old = Wire(client).send(head(client, "GET /api2/json/version HTTP/1.0"))
    assert old.answer()[1]["connection"] == "close"
    assert old.to_end() == b""
    wire = Wire(client)
    kinds = [wire.send(head(client)).answer()[1]["connection"] for _ in range(100)]
    assert kinds == ["Keep-Alive"] * 99 + ["close"]


def test_slow_clients_do_not_keep_a_thread(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IDLE_SECONDS", "HANDSHAKE_SECONDS", "HEAD_SECONDS", "STALL_SECONDS"):
        monkeypatch.setattr(server, name, 0.3)
    monkeypatch.setattr(server, "_SLOWEST_PACE", 1 << 20)
    assert Wire(client).to_end() == b"", "idle"
    with socket.create_connection(("127.0.0.1", client.node.port), timeout=20) as mute:
        assert mute.recv(10) == b"", "no handshake"
    for begun in (
        b"GET /api2/json/version HTTP/1.1\r\n",
        head(client, "POST /api2/json/access/ticket HTTP/1.1", "Content-Length: 9"),
    ):
        wire = Wire(client).send(begun)
        ended = threading.Event()
        dripping = threading.Thread(target=drip, args=(wire, ended))
        dripping.start()
        assert wire.to_end() == b""
        ended.set()
        dripping.join()


def drip(wire: Wire, ended: threading.Event) -> None:
    """A byte now and then, each in time, all of them too late."""
    while not ended.wait(0.05):
        try:
            wire.send(b"a")
        except OSError:
            return


def test_who_takes_no_answer_is_given_up(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    upid = client.node.state.tasks.start(
        Actor("root@pam"), "vzdump", "", lambda task: task.log(40 * (999_999 * "a" + "\n"))
    )
    assert client.end_of(upid) == "OK"
    monkeypatch.setattr(server, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(server, "_SLOWEST_PACE", 1 << 30)
    wire = Wire(client).send(head(client, f"GET /api2/json{N}/tasks/{upid}/log?limit=0 HTTP/1.1"))
    assert wire.until(b"\r\n").startswith(b"HTTP/1.1 200")
    deadline = time.monotonic() + 20
    while any(thread.name == "connection" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the connection's thread is still there"
        time.sleep(0.02)


def test_plain_http_is_told_where_to_go(client: Client) -> None:
    for method, status in (("GET", "301 Moved Permanently"), ("POST", "308 Permanent Redirect")):
        with socket.create_connection(("127.0.0.1", client.node.port), timeout=20) as plain:
            plain.sendall(f"{method} /api2/json/version?a=b HTTP/1.1\r\nHost: node:8006\r\n\r\n".encode())
            answer = b"".join(iter(lambda: plain.recv(4096), b"")).decode()
        assert answer.startswith(f"HTTP/1.1 {status}\r\n")
        assert "location: https://node:8006/api2/json/version?a=b\r\n" in answer.lower()


# TLS and addresses


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls(client: Client, version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cafile=str(client.node.home / "cert.pem"))
    context.check_hostname = False
    context.minimum_version = context.maximum_version = version
    wire = Wire(client, context)
    assert wire.socket.version() == version.name.replace("_", ".")
    assert wire.send(head(client)).answer()[0] == "HTTP/1.1 200 OK"


def test_older_tls_is_refused(client: Client) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        Wire(client, context)


def test_ipv6(tmp_path: Path) -> None:
    home = tmp_path / "node"
    node = serve(home, "::1", 0, name="pvetest", qemu=FlagQemu(), disks=Disks(home / "storage")).start()  # type: ignore[arg-type]
    try:
        assert node.url == f"https://[::1]:{node.port}"
        context = ssl.create_default_context(cafile=str(home / "cert.pem"))
        with (
            socket.create_connection(("::1", node.port), timeout=20) as plain,
            context.wrap_socket(plain, server_hostname="::1") as secured,
        ):
            lines = ["GET /api2/json/version HTTP/1.1", "Host: [::1]", f"Authorization: PVEAPIToken={node.token}"]
            secured.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
            assert secured.recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")
    finally:
        node.stop()


# Cookies


def test_cookies_in_every_dress(client: Client) -> None:
    ticket = login(client)["ticket"]
    for cookie in (
        f"PVEAuthCookie={ticket}",
        f"PVEAuthCookie={quote(ticket, safe='')}",
        f'PVEAuthCookie="{ticket}"',
        f"PVELangCookie=en; PVEAuthCookie={quote(ticket, safe='')}; other=1",
    ):
        assert client.ask("GET", "/version", headers={"Cookie": cookie}).status == 200, cookie
    for authorization in (f"PVEAuthCookie={quote(ticket, safe='')}", f"PVEAuthCookie={ticket}"):
        assert client.ask("GET", "/version", headers={"Authorization": authorization}).status == 200
    assert client.ask("GET", "/version", headers={"Cookie": "PVEAuthCookie=nonsense"}).status == 401


# Uploads


def upload(client: Client, body: bytes, boundary: str = "b") -> Answer:
    headers = {"Authorization": client.authorization, "Content-Type": f"multipart/form-data; boundary={boundary}"}
    return client.ask("POST", f"{N}/storage/local/upload", body=body, headers=headers)


def part(name: str, value: bytes, filename: str = "") -> bytes:
    file = f'; filename="{filename}"\r\nContent-Type: application/octet-stream' if filename else ""
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + value + b"\r\n"


def test_uploads_that_make_no_sense_leave_nothing(client: Client) -> None:
    content = part("content", b"iso")
    for body, reason in (
        (content + part("filename", b"data", "a.iso"), "upload failed"),
        (
            content + part("wrong", b"data", "a.iso") + b"--b--",
            "wrong field name 'wrong' for file upload, expected 'filename'",
        ),
        (b"no parts at all", "upload failed"),
    ):
        answer = upload(client, body)
        assert (answer.status, answer.body) == (501, b"")
        assert answer.reason.startswith(reason), answer.reason
    assert list((client.node.home / "uploads").iterdir()) == []
    done = upload(client, content + part("filename", b"data", "a.iso") + b"--b--\r\n")
    assert (done.status, done.headers["connection"]) == (200, "close")
    assert client.end_of(done.data) == "OK"


def test_an_upload_goes_to_the_disk_as_it_comes(client: Client) -> None:
    """Sixty MiB, of which no more than some blocks are ever in memory."""
    size = 60 << 20
    begin = part("content", b"iso") + part("filename", b"", "big.iso")[:-2]
    end = b"\r\n--b--\r\n"
    wire = Wire(client).send(
        head(
            client,
            f"POST /api2/json{N}/storage/local/upload HTTP/1.1",
            "Content-Type: multipart/form-data; boundary=b",
            f"Content-Length: {len(begin) + size + len(end)}",
        )
        + begin
    )
    process, block = psutil.Process(), bytes(1 << 20)
    before = process.memory_info().rss
    for _ in range(size >> 20):
        wire.send(block)
    grown = process.memory_info().rss - before
    assert wire.send(end).answer()[0] == "HTTP/1.1 200 OK"
    assert grown < size // 2


# Tasks


def test_a_tasks_pid_is_that_of_its_thread(client: Client) -> None:
    state, seen = client.node.state, threading.Event()
    go_on = threading.Event()
    numbers: list[int] = []

    def work(_task: Task) -> None:
        numbers.append(threading.get_native_id())
        seen.set()
        go_on.wait(20)

    upid = state.tasks.start(Actor("root@pam"), "qmstart", 100, work)
    assert seen.wait(20)
    status = client.get(f"{N}/tasks/{upid}/status")
    assert (status["status"], status["pid"], status["pstart"]) == ("running", numbers[0], start_of(numbers[0]))
    assert upid.startswith(
        f"UPID:pvetest:{status['pid']:08X}:{status['pstart']:08X}:{status['starttime']:08X}:qmstart:100:"
    )
    go_on.set()
    assert client.end_of(upid) == "OK"


def test_stopping_a_task_ends_what_it_runs(client: Client, tmp_path: Path) -> None:
    state = client.node.state
    begun = threading.Event()
    found: list[psutil.Process] = []

    def copy(_task: Task) -> None:
        with subprocess.Popen(["sleep", "600"]) as command, running(command):
            found.append(psutil.Process(command.pid))
            begun.set()
            command.wait()
        raise qemu_img.DiskError("qemu-img convert failed: it gave no reason")

    upid = state.tasks.start(Actor("root@pam"), "qmclone", 100, copy)
    assert begun.wait(20)
    assert client.ask("DELETE", f"{N}/tasks/{upid}").data is None
    assert client.end_of(upid) == "interrupted by signal"
    assert not found[0].is_running()
    assert client.log(upid)[-1] == "TASK ERROR: interrupted by signal"

    def wait(task: Task) -> None:
        begun.set()
        while True:
            task.check()
            time.sleep(0.01)

    begun.clear()
    upid = state.tasks.start(Actor("root@pam"), "qmshutdown", 100, wait)
    assert begun.wait(20)
    client.ask("DELETE", f"{N}/tasks/{upid}")
    assert client.end_of(upid) == "received interrupt"


def test_the_log_in_parts_and_as_a_file(client: Client) -> None:
    def work(task: Task) -> None:
        for number in range(60):
            task.log(f"line {number}")
        raise Refusal("no\nmore")

    upid = client.node.state.tasks.start(Actor("root@pam"), "vzdump", "", work)
    assert client.end_of(upid) == "no"
    whole = client.ask("GET", f"{N}/tasks/{upid}/log").json
    assert (whole["total"], len(whole["data"])) == (61, 50)
    assert client.get(f"{N}/tasks/{upid}/log", start=59, limit=5) == [
        {"n": 60, "t": "line 59"},
        {"n": 61, "t": "TASK ERROR: no"},
    ]
    file = client.ask("GET", f"{N}/tasks/{upid}/log?download=1")
    assert (file.headers["content-type"], file.body.count(b"\n")) == ("text/plain", 61)
    assert file.headers["content-disposition"].startswith('attachment; filename="task-pvetest-')
    assert "download" in client.ask("GET", f"{N}/tasks/{upid}/log?download=1&limit=1").json["errors"]


def test_lists_are_filtered(client: Client) -> None:
    tasks = client.node.state.tasks
    for user, kind, vmid, fails in (
        ("root@pam", "qmstart", 100, False),
        ("root@pam!t1", "qmstop", 101, True),
        ("a@pve", "qmstart", 101, False),
    ):
        name, _, token = user.partition("!")

        def work(_task: Task, fails: bool = fails) -> None:
            if fails:
                raise Refusal("bad")

        client.end_of(tasks.start(Actor(name, token), kind, vmid, work))
    assert [task["type"] for task in client.get(f"{N}/tasks", vmid=101)] == ["qmstart", "qmstop"]
    assert [task["tokenid"] for task in client.get(f"{N}/tasks", errors=1)] == ["t1"]
    assert [task["user"] for task in client.get(f"{N}/tasks", userfilter="A@P")] == ["a@pve"]
    assert len(client.get(f"{N}/tasks", typefilter="qmstart", statusfilter="ok", limit=1)) == 1
    empty = client.ask("GET", f"{N}/tasks?typefilter=none").json
    assert empty == {"data": []}, "a total of nothing is not told"


def test_tasks_are_their_owners(client: Client) -> None:
    client.ask("POST", "/access/users", {"userid": "ann@pve", "password": "long enough"})
    tasks = client.node.state.tasks
    roots, anns = (tasks.start(Actor(name), "qmstart", 100, lambda _task: None) for name in ("root@pam", "ann@pve"))
    fields = {"username": "ann@pve", "password": "long enough"}
    ticket = client.ask("POST", "/access/ticket", fields, headers={}).data
    cookie = {"Cookie": f"PVEAuthCookie={ticket['ticket']}", "CSRFPreventionToken": ticket["CSRFPreventionToken"]}

    def ask(method: str, path: str) -> Answer:
        return client.ask(method, path, headers=cookie)

    assert ask("GET", f"{N}/tasks/{anns}/status").status == 200
    assert ask("DELETE", f"{N}/tasks/{anns}").status == 200
    for what in ("status", "log"):
        refused = ask("GET", f"{N}/tasks/{roots}/{what}")
        assert (refused.status, refused.reason) == (403, "Permission check failed (/nodes/pvetest, Sys.Audit)")
    refused = ask("DELETE", f"{N}/tasks/{roots}")
    assert (refused.status, refused.reason) == (403, "Permission check failed (/nodes/pvetest, Sys.Modify)")
    for path in (f"{N}/tasks?source=all", "/cluster/tasks"):
        assert {task["user"] for task in ask("GET", path).json["data"]} == {"ann@pve"}
    client.ask("PUT", "/access/acl", {"path": "/", "users": "ann@pve", "roles": "PVEAuditor"})
    assert ask("GET", f"{N}/tasks/{roots}/status").status == 200
    assert ask("DELETE", f"{N}/tasks/{roots}").status == 403
