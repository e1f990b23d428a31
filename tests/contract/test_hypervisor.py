"""`hypervisor` against the embedded node's real HTTP, tasks and disks, and against servers that misbehave."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import urllib3.exceptions

from autovibe.errors import (
    ConfigurationError,
    HypervisorRefused,
    HypervisorTaskFailed,
    HypervisorUnavailable,
    NotYet,
)
from autovibe.hypervisor import Proxmox, VmidTaken, change, read
from autovibe.node.http import certificate
from autovibe.node.serve import Node
from tests.contract.node_parts import FlagQemu, make_node

OWNER = UUID("11111111-2222-4333-8444-555555555555")
STORAGE = "local-lvm"


class Site:
    def __init__(self, home: Path) -> None:
        self.qemu = FlagQemu()
        self.node: Node = make_node(home, self.qemu)
        self.px = self.connect()

    def connect(self, **options: Any) -> Proxmox:
        given = {"node": "pvetest", "fingerprint": self.node.fingerprint, **options}
        return Proxmox(self.node.url, self.node.token, **given)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("node"))
    yield found
    found.px.close()
    found.node.stop()


@pytest.fixture
def px(site: Site) -> Proxmox:
    return site.px


VMIDS = iter(range(9000, 9900))


def finish(px: Proxmox, upid: str | None) -> None:
    if upid is not None:
        read.await_task(px, upid, slice_seconds=30, interval=0.02)


def settle(call: Callable[[], Any]) -> Any:
    """Call again while it is not yet, as a durable step does."""
    end = time.monotonic() + 30
    while True:
        try:
            return call()
        except NotYet:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def make_vm(px: Proxmox, owner: UUID = OWNER, **values: Any) -> int:
    vmid = next(VMIDS)
    disk = {"scsi0": f"{STORAGE}:1", "memory": 256, "name": f"vm{vmid}"}
    finish(px, change.create(px, vmid, owner=owner, **{**disk, **values}))
    return vmid


@pytest.fixture(scope="module")
def template(site: Site) -> int:
    vmid = make_vm(site.px, name="av-image-tiny-0001", tags=("autovibe-image",))
    finish(site.px, change.template(site.px, vmid))
    return vmid


# The connection


def test_facts_of_the_node(px: Proxmox, site: Site) -> None:
    assert read.version(px).split(".")[0].isdigit()
    status = read.node_status(px)
    assert status.cores > 0
    assert 0 < status.memory_free <= status.memory_total
    storage = read.storage(px, STORAGE)
    assert storage.active
    assert "images" in storage.content
    assert storage.avail > 0
    assert read.permissions(px)
    read.check_node(px)
    with pytest.raises(ConfigurationError, match="pvetest"):
        read.check_node(site.connect(node="other"))


def test_the_pin_holds_whatever_the_environment_says(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, "/etc/ssl/certs/ca-certificates.crt")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read.version(site.connect())
    wrong = ":".join(["AB"] * 32)
    with pytest.raises(HypervisorUnavailable, match="certificate"):
        read.version(site.connect(fingerprint=wrong))
    with pytest.raises(HypervisorUnavailable, match="certificate"):
        read.version(site.connect(fingerprint=""))
    authority = tmp_path / "ca.pem"
    authority.write_bytes((site.node.home / "cert.pem").read_bytes())
    assert read.version(site.connect(fingerprint="", ca_file=authority))


def test_insecure_requests_are_still_warned_about() -> None:
    """Importing proxmoxer switches these warnings off for the whole process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn("x", urllib3.exceptions.InsecureRequestWarning, stacklevel=1)
    assert caught


@pytest.mark.parametrize(
    ("url", "token", "fingerprint"),
    [
        ("http://h:8006", "a@pam!b=c", ""),
        ("h:8006", "a@pam!b=c", ""),
        ("https://h", "secret", ""),
        ("https://h", "a@pam!b=c", "AB:CD"),
    ],
)
def test_settings_that_cannot_work(url: str, token: str, fingerprint: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        Proxmox(url, token, node="n", fingerprint=fingerprint)
    assert "secret" not in str(error.value)


def test_a_wrong_token_and_a_node_that_is_down(site: Site) -> None:
    stranger = Proxmox(
        site.node.url,
        "root@pam!no=00000000-0000-0000-0000-000000000000",
        node="pvetest",
        fingerprint=site.node.fingerprint,
    )
    with pytest.raises(HypervisorRefused, match="token") as refusal:
        read.version(stranger)
    assert refusal.value.details["status"] == 401
    with pytest.raises(HypervisorUnavailable, match="does not answer"):
        read.version(Proxmox("https://127.0.0.1:24999", "a@pam!b=c", node="n"))


def test_threads_do_not_share_a_session(px: Proxmox) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: read.version(px), range(64)))) == 1


# Life of a VM


def test_a_clone_is_ours_and_made_once(px: Proxmox, template: int) -> None:
    vmid, owner = next(VMIDS), uuid4()
    order = {"source": template, "vmid": vmid, "owner": owner, "name": "m-1", "description": "two\nlines"}
    upid = change.clone(px, **order)
    assert upid
    finish(px, upid)
    assert settle(lambda: change.clone(px, **order)) is None
    assert read.owner(px, vmid) == owner
    assert read.config(px, vmid)["description"].splitlines()[:3] == [f"autovibe {owner}", "two", "lines"]
    with pytest.raises(VmidTaken):
        change.clone(px, **{**order, "owner": uuid4()})
    assert read.find_vm(px, vmid).name == "m-1"
    assert vmid in read.taken_vmids(px)
    assert read.find_vm(px, 9999) is None
    assert read.owner(px, 9999) is None


def test_parallel_clones_to_one_id_make_one(px: Proxmox, template: int) -> None:
    vmid = next(VMIDS)
    owners = [uuid4() for _ in range(4)]

    def attempt(owner: UUID) -> UUID | None:
        try:
            finish(px, settle(lambda: change.clone(px, source=template, vmid=vmid, owner=owner, name="race")))
        except VmidTaken:
            return None
        return owner

    with ThreadPoolExecutor(4) as pool:
        winners = {winner for winner in pool.map(attempt, owners) if winner}
    assert winners == {read.owner(px, vmid)}


def test_configure_speaks_proxmox(px: Proxmox) -> None:
    vmid = make_vm(px)
    keys = "ssh-ed25519 AAAA+/= a b\nssh-ed25519 BBBB ü"
    change.configure(px, vmid, sshkeys=keys, onboot=False, agent=True, tags=("autovibe", "x"), ciuser="agent")
    found = read.config(px, vmid)
    assert (found["onboot"], str(found["agent"])) == (0, "1")
    assert "%2B%2F%3D" in found["sshkeys"]
    assert read.find_vm(px, vmid).tags == ("autovibe", "x")
    change.configure(px, vmid, delete=["ciuser", "onboot"])
    assert "ciuser" not in read.config(px, vmid)
    with pytest.raises(HypervisorRefused, match="nonsense"):
        change.configure(px, vmid, nonsense="1")
    finish(px, change.resize(px, vmid, "scsi0", "2G"))
    assert "size=2G" in read.config(px, vmid)["scsi0"]


def test_start_stop_and_shutdown_find_their_effect(px: Proxmox) -> None:
    vmid = make_vm(px)
    assert change.stop(px, vmid) is None
    finish(px, change.start(px, vmid))
    assert read.find_vm(px, vmid).is_running
    assert change.start(px, vmid) is None
    finish(px, change.shutdown(px, vmid, timeout_seconds=5))
    assert change.shutdown(px, vmid) is None
    with pytest.raises(HypervisorRefused, match="no VM 9999"):
        change.start(px, 9999)


def test_snapshots(px: Proxmox) -> None:
    vmid = make_vm(px)
    name = f"av-{uuid4()}"
    finish(px, change.snapshot(px, vmid, name, "why"))
    assert settle(lambda: change.snapshot(px, vmid, name)) is None
    assert [found.name for found in read.snapshots(px, vmid)] == [name]
    assert read.has_feature(px, vmid, "clone", name)
    clone = next(VMIDS)
    finish(px, settle(lambda: change.clone(px, source=vmid, vmid=clone, owner=OWNER, name="c", snapshot=name)))
    finish(px, settle(lambda: change.rollback(px, vmid, name)))
    finish(px, settle(lambda: change.destroy(px, clone, owner=OWNER)))
    finish(px, settle(lambda: change.delete_snapshot(px, vmid, name)))
    assert settle(lambda: change.delete_snapshot(px, vmid, name)) is None
    assert read.snapshots(px, vmid) == []
    assert change.delete_snapshot(px, 9999, name) is None


def test_only_our_own_vm_is_destroyed(px: Proxmox, site: Site) -> None:
    vmid = make_vm(px)
    for stranger in (uuid4(), uuid4()):
        with pytest.raises(HypervisorRefused, match="not destroyed"):
            change.destroy(px, vmid, owner=stranger)
    finish(px, change.start(px, vmid))
    finish(px, settle(lambda: change.destroy(px, vmid, owner=OWNER)))
    assert vmid not in site.qemu.started
    assert change.destroy(px, vmid, owner=OWNER) is None
    foreign = next(VMIDS)
    finish(px, change.create(px, foreign, memory=64))
    with pytest.raises(HypervisorRefused, match="not one of autovibe's"):
        change.destroy(px, foreign, owner=OWNER)
    finish(px, change.destroy(px, foreign, owner=None))


def test_the_image_is_the_newest_finished_template(px: Proxmox, template: int) -> None:
    assert read.find_image(px, "tiny").vmid == template
    assert read.find_image(px, "other") is None
    newer = make_vm(px, name="av-image-tiny-0002", tags=("autovibe-image",))
    assert read.find_image(px, "tiny").vmid == template
    finish(px, change.template(px, newer))
    assert change.template(px, newer) is None
    assert read.find_image(px, "tiny").vmid == newer
    finish(px, change.destroy(px, newer, owner=OWNER))


@pytest.mark.parametrize("size", [1000, 12 << 20])
def test_an_upload_tells_its_progress(px: Proxmox, tmp_path: Path, size: int) -> None:
    image = tmp_path / f"tiny-{size}.qcow2"
    image.write_bytes(b"QFI\xfb\x00\x00\x00\x03" + bytes(size - 8))
    seen: list[int] = []
    with contextlib.suppress(HypervisorTaskFailed):  # the node may look into the file, which is no image
        finish(px, change.upload(px, "local", image, seen.append))
    assert seen[-1] == size
    assert seen == sorted(seen)
    change.delete_volume(px, "local", f"local:import/{image.name}")


# Tasks


def test_a_task_that_fails_says_why_with_its_log(px: Proxmox) -> None:
    vmid = make_vm(px)
    with pytest.raises(HypervisorTaskFailed) as error:
        finish(px, change.resize(px, vmid, "scsi0", "512M"))
    assert "shrinking" in error.value.message
    assert error.value.details["upid"].startswith("UPID:")
    assert isinstance(error.value.details["log"], list)


def test_a_slice_ends_and_stop_is_asked(px: Proxmox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Proxmox, "get", lambda self, path, **_: {"status": "running"})
    began = time.monotonic()
    with pytest.raises(NotYet, match="qmclone of VM 100 is running"):
        read.await_task(px, "UPID:n:1:1:1:qmclone:100:u@pam:", slice_seconds=0.4, interval=0.1)
    assert 0.2 < time.monotonic() - began < 2
    began = time.monotonic()
    with pytest.raises(NotYet):
        read.await_task(px, "UPID:n:1:1:1:qmclone:100:u@pam:", slice_seconds=30, stop=lambda: True)
    assert time.monotonic() - began < 1


def test_an_unknown_task_and_an_api_that_is_away(px: Proxmox) -> None:
    upid = "UPID:pvetest:00000001:00000001:00000001:qmclone:100:root@pam:"
    with pytest.raises(HypervisorTaskFailed, match="knows no task"):
        read.await_task(px, upid, slice_seconds=0.2, interval=0.1)
    away = Proxmox("https://127.0.0.1:24999", "a@pam!b=c", node="pvetest")
    with pytest.raises(NotYet, match="does not answer"):
        read.await_task(away, upid, slice_seconds=0.2)


# Locks, lost answers and other misbehaviour, from a server whose answers the test chooses


class Scripted:
    """An HTTPS server; `answer(method, path, count)` gives (status, reason, body), or None to hang up."""

    def __init__(self, home: Path, answer: Callable[[str, str, int], tuple[int, str, bytes] | None]) -> None:
        context, self.fingerprint = certificate.load(home, "127.0.0.1")
        self.calls: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def respond(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                call = f"{self.command} {self.path.removeprefix('/api2/json').partition('?')[0]}"
                outer.calls.append(call)
                found = answer(self.command, self.path, outer.calls.count(call))
                if found is None:
                    self.close_connection = True
                    with contextlib.suppress(OSError):
                        self.connection.shutdown(2)
                    return
                status, reason, body = found
                self.send_response(status, reason)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_DELETE = respond

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def proxmox(self, **options: Any) -> Proxmox:
        url = f"https://127.0.0.1:{self.server.server_address[1]}"
        return Proxmox(url, "a@pam!b=c", node="n", fingerprint=self.fingerprint, **options)


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[..., Scripted]]:
    made: list[Scripted] = []

    def make(answer: Callable[[str, str, int], tuple[int, str, bytes] | None]) -> Scripted:
        made.append(Scripted(tmp_path, answer))
        return made[-1]

    yield make
    for server in made:
        server.server.shutdown()
        server.server.server_close()


OK = (200, "OK", b'{"data":null}')
LOCKED = (500, "can't lock file '/var/lock/qemu-server/lock-100.conf' - got timeout", b"")


def test_a_lock_is_waited_for_and_then_it_is_not_yet(scripted: Callable[..., Scripted]) -> None:
    server = scripted(lambda _method, _path, count: OK if count == 3 else LOCKED)
    change.configure(server.proxmox(), 100, cores=1)
    assert len(server.calls) == 3
    stuck = scripted(lambda *_: (500, "VM is locked (backup)", b""))
    began = time.monotonic()
    with pytest.raises(NotYet, match=r"VM is locked \(backup\)"):
        change.configure(stuck.proxmox(), 100, cores=1)
    assert 1 < time.monotonic() - began < 5


@pytest.mark.parametrize("status", [595, 596, 599, 502, 503])
def test_a_daemon_behind_the_proxy_that_does_not_answer(scripted: Callable[..., Scripted], status: int) -> None:
    server = scripted(lambda *_: (status, "Broken pipe", b""))
    with pytest.raises(HypervisorUnavailable, match=str(status)):
        read.vms(server.proxmox())


def test_proxmox_own_words_arrive(scripted: Callable[..., Scripted]) -> None:
    body = b'{"data":null,"errors":{"cores":"type check failed"},"message":"Parameter verification failed.\\n"}'
    server = scripted(lambda *_: (400, "Parameter verification failed.", body))
    with pytest.raises(HypervisorRefused, match="cores: type check failed") as error:
        change.configure(server.proxmox(), 100, cores="x")
    assert error.value.details["errors"] == {"cores": "type check failed"}
    strange = scripted(lambda *_: (200, "OK", b"<html>hello"))
    with pytest.raises(HypervisorRefused, match="no JSON"):
        read.vms(strange.proxmox())
    hanging = scripted(lambda *_: time.sleep(2) or OK)
    with pytest.raises(HypervisorUnavailable, match="does not answer"):
        read.vms(hanging.proxmox(timeout_seconds=0.2))


def test_a_lost_answer_to_a_clone_makes_no_second_vm(scripted: Callable[..., Scripted]) -> None:
    """The first POST is carried out and its answer lost: what is there is looked at before another one."""
    state = {"made": 0}

    def answer(method: str, path: str, _count: int) -> tuple[int, str, bytes] | None:
        if method == "POST":
            state["made"] += 1
            return None
        if path.endswith("/qemu"):
            vm = '{"vmid":9001,"name":"m","status":"stopped"}' if state["made"] else ""
            return 200, "OK", f'{{"data":[{vm}]}}'.encode()
        return 200, "OK", f'{{"data":{{"description":"autovibe {OWNER}\\n"}}}}'.encode()

    server = scripted(answer)
    assert change.clone(server.proxmox(), source=100, vmid=9001, owner=OWNER, name="m") is None
    assert state["made"] == 1


def test_a_lost_answer_to_a_question_is_asked_again(scripted: Callable[..., Scripted]) -> None:
    server = scripted(lambda _method, _path, count: None if count == 1 else (200, "OK", b'{"data":[]}'))
    assert read.vms(server.proxmox()) == []
    gone = scripted(lambda *_: None)
    with pytest.raises(HypervisorUnavailable):
        read.vms(gone.proxmox())
    assert len(gone.calls) == 2


def test_a_snapshot_in_the_making_is_followed(scripted: Callable[..., Scripted]) -> None:
    upid = "UPID:n:1:1:1:qmsnapshot:100:a@pam:"
    state = {"listed": False, "lock": "snapshot", "tasks": "[]"}

    def answer(method: str, path: str, _count: int) -> tuple[int, str, bytes]:
        if "/tasks" in path:
            return 200, "OK", f'{{"data":{state["tasks"]}}}'.encode()
        if path.endswith("/snapshot"):
            name = '{"name":"av-x","snaptime":1},' if state["listed"] else ""
            return 200, "OK", f'{{"data":[{name}{{"name":"current"}}]}}'.encode()
        vm = f'{{"vmid":100,"status":"running","lock":"{state["lock"]}"}}'
        return 200, "OK", f'{{"data":[{vm}]}}'.encode()

    server = scripted(answer)
    px = server.proxmox()
    with pytest.raises(NotYet):
        change.snapshot(px, 100, "av-x")
    state["listed"] = True
    task = f'{{"upid":"{upid}","type":"qmsnapshot","id":"100"}}'
    state["tasks"] = f"[{task}]"
    assert change.snapshot(px, 100, "av-x") == upid
    state["tasks"] = "[]"
    with pytest.raises(NotYet):
        change.snapshot(px, 100, "av-x")
    state["lock"] = ""
    assert change.snapshot(px, 100, "av-x") is None
    assert not any(call.startswith("POST") for call in server.calls)


def test_the_guests_own_address(scripted: Callable[..., Scripted]) -> None:
    cards = (
        '[{"name":"lo","hardware-address":"00:00:00:00:00:00","ip-addresses":[{"ip-address":"127.0.0.1"}]},'
        '{"name":"docker0","hardware-address":"02:42:00:00:00:01","ip-addresses":[{"ip-address":"172.17.0.1"}]},'
        '{"name":"eth0","hardware-address":"bc:24:11:5a:fd:7f","ip-addresses":[{"ip-address":"fe80::1"},'
        '{"ip-address":"10.1.2.3"}]}]'
    )
    state = {"agent": (500, "QEMU guest agent is not running", b"")}

    def answer(_method: str, path: str, _count: int) -> tuple[int, str, bytes]:
        if "agent" in path:
            return state["agent"]
        return 200, "OK", b'{"data":{"net0":"virtio=BC:24:11:5A:FD:7F,bridge=vmbr0"}}'

    px = scripted(answer).proxmox()
    with pytest.raises(NotYet):
        read.guest_address(px, 9001, via="address", forward_host_port=0)
    state["agent"] = (200, "OK", f'{{"data":{{"result":{cards}}}}}'.encode())
    assert read.guest_address(px, 9001, via="address", forward_host_port=0) == ("10.1.2.3", 22)
    assert read.guest_address(px, 9001, via="forward", forward_host_port=8007) == ("127.1.35.41", 8007)
    for told in ('"x"', "null", '["x", 1]', '[{"ip-addresses":"x"}]', '[{"ip-addresses":[1,null]}]'):
        state["agent"] = (200, "OK", f'{{"data":{{"result":{told}}}}}'.encode())
        with pytest.raises(NotYet):
            read.guest_address(px, 9001, via="address", forward_host_port=0)
