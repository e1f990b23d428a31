"""proxmoxer as its users call it: tokens and tickets, uploads, agent calls, errors, time-outs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from proxmoxer import AuthenticationError, ProxmoxAPI, ResourceException
from proxmoxer.tools import Tasks

from tests.contract.node_parts import Client, FlagQemu, make_node

N = "pvetest"


@pytest.fixture
def qemu() -> FlagQemu:
    return FlagQemu()


@pytest.fixture
def client(tmp_path: Path, qemu: FlagQemu) -> Iterator[Client]:
    node = make_node(tmp_path / "node", qemu)
    yield Client(node)
    node.stop()


def by_token(client: Client, **more: object) -> ProxmoxAPI:
    user, _, rest = client.node.token.partition("!")
    name, _, value = rest.partition("=")
    return connect(client, **{"user": user, "token_name": name, "token_value": value, **more})


def by_password(client: Client, **more: object) -> ProxmoxAPI:
    return connect(client, user="root@pam", **{"password": (client.node.home / "password").read_text().strip(), **more})


def connect(client: Client, **more: object) -> ProxmoxAPI:
    certificate = str(client.node.home / "cert.pem")
    return ProxmoxAPI(f"127.0.0.1:{client.node.port}", **{"verify_ssl": certificate, "timeout": 30, **more})


def do(api: ProxmoxAPI, upid: str) -> None:
    """proxmoxer's own way to wait for a task."""
    status = Tasks.blocking_status(api, upid, timeout=60, polling_interval=0.05)
    assert status is not None
    assert status["exitstatus"] == "OK", status


def test_a_token_and_a_password(client: Client) -> None:
    token, password = by_token(client), by_password(client)
    assert token.version.get() == password.version.get()
    assert token.get_tokens() == (None, None)
    ticket = password.get_tokens()[0]
    assert ticket.startswith("PVE:root@pam:")
    do(password, password.nodes(N).qemu.post(vmid=100, memory=64))
    do(token, token.nodes(N).qemu(100).delete())
    again = by_password(client, password=ticket)  # a ticket is as good as the password
    assert again.version.get()["release"] == "9.2"


def test_a_ticket_is_renewed(client: Client) -> None:
    api = by_password(client)
    auth = api._backend.auth
    auth.birth_time -= auth.renew_age + 1  # an hour later
    aged = auth.birth_time
    assert api.nodes(N).qemu.get() == []
    assert auth.birth_time > aged + auth.renew_age
    do(api, api.nodes(N).qemu.post(vmid=100, memory=64))


def test_wrong_secrets(client: Client) -> None:
    with pytest.raises(AuthenticationError, match=r"Couldn't authenticate user: root@pam to .* code: 401"):
        by_password(client, password="wrong")
    with pytest.raises(ResourceException) as refused:
        by_token(client, token_value="00000000-0000-0000-0000-000000000000").version.get()
    assert refused.value.status_code == 401


def test_a_certificate_that_is_not_trusted(client: Client, tmp_path: Path) -> None:
    other = make_node(tmp_path / "other", FlagQemu())
    try:
        with pytest.raises(requests.exceptions.SSLError):
            by_token(client, verify_ssl=str(other.home / "cert.pem")).version.get()
    finally:
        other.stop()


@pytest.mark.parametrize("size", [1 << 16, 11 << 20], ids=["in one body", "streamed"])
def test_uploads(client: Client, tmp_path: Path, size: int) -> None:
    api = by_password(client)
    image = tmp_path / "an image.iso"
    image.write_bytes(hashlib.sha256(b"seed").digest() * (size // 32))
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    storage = api.nodes(N).storage("local")
    with image.open("rb") as file:
        upid = storage.upload.post(content="iso", filename=file, **{"checksum": digest, "checksum-algorithm": "sha256"})
    do(api, upid)
    (listed,) = storage.content.get(content="iso")
    assert (listed["volid"], listed["size"]) == ("local:iso/an_image.iso", size)
    assert hashlib.sha256(client.node.state.disks.path(listed["volid"]).read_bytes()).hexdigest() == digest
    do(api, storage.content("local:iso/an_image.iso").delete())
    assert storage.content.get() == []


def test_agent_calls(client: Client, qemu: FlagQemu) -> None:
    api = by_token(client)
    vm = api.nodes(N).qemu(100)
    do(api, api.nodes(N).qemu.post(vmid=100, memory=64, agent=1))
    do(api, vm.status.start.post())
    with pytest.raises(ResourceException, match="QEMU guest agent is not running"):
        vm.agent.ping.post()
    qemu.answers = {"get-host-name": {"host-name": "guest"}}
    # proxmoxer splits a string as a shell would; a list goes as repeated keys.
    assert vm.agent.exec.post(command="sh -c 'echo two words'") == {"pid": 145}
    assert vm.agent("exec").post(command=["sh", "-c", "echo 'three  words'"]) == {"pid": 145}
    assert vm.agent.post("exec", command="cat", **{"input-data": "a\nb"}) == {"pid": 145}
    assert qemu.agent_calls[-5::2] == [
        "exec ['sh', '-c', 'echo two words'] None",
        "exec ['sh', '-c', \"echo 'three  words'\"] None",
        "exec ['cat'] b'a\\nb'",
    ]
    assert vm.agent("exec-status").get(pid=145)["out-data"] == "hi\n"
    assert vm.agent("get-host-name").get()["result"]["host-name"] == "guest"
    assert vm.agent("file-write").post(file="/x", content="hello", encode=1) is None


def test_errors_carry_the_reason_and_the_faulty_parameters(client: Client) -> None:
    api = by_token(client)
    with pytest.raises(ResourceException) as found:
        api.nodes(N).qemu(999).config.get()
    error = found.value
    assert error.status_code == 500
    assert error.content == f"Configuration file 'nodes/{N}/qemu-server/999.conf' does not exist"
    assert error.errors is None
    with pytest.raises(ResourceException) as found:
        api.nodes(N).qemu.post(vmid=7, memory="much", onboot=True)
    error = found.value
    assert (error.status_code, error.status_message, error.content) == (
        400, "Bad Request", "Parameter verification failed.",
    )  # fmt: skip
    assert set(error.errors) == {"vmid", "memory", "onboot"}  # True is sent as "True"
    assert error.errors["onboot"] == "type check ('boolean') failed - got 'True'"
    with pytest.raises(ResourceException) as found:
        api.nodes(N).nonsense.get()
    assert (found.value.status_code, found.value.status_message) == (501, "Not Implemented")
    assert found.value.content == f"Method 'GET /nodes/{N}/nonsense' not implemented"


def test_a_call_that_takes_too_long_leaves_the_node_well(client: Client) -> None:
    """A failed login is answered after three seconds; the client is gone by then."""
    with pytest.raises(requests.exceptions.ReadTimeout):
        by_password(client, password="wrong", timeout=0.5)
    assert by_password(client).nodes.get()[0]["node"] == N


def test_one_connection_serves_many_calls_and_survives_errors(client: Client) -> None:
    api = by_token(client)
    for vmid in range(100, 106):
        do(api, api.nodes(N).qemu.post(vmid=vmid, memory=64, name=f"vm{vmid}"))
        with pytest.raises(ResourceException):
            api.nodes(N).qemu.post(vmid=vmid)
    listed = api.cluster.resources.get(type="vm")
    assert sorted(vm["vmid"] for vm in listed) == list(range(100, 106))
    assert [vm["template"] for vm in listed] == [0] * 6
    assert api.cluster.nextid.get() == "106"
