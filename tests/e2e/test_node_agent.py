"""The guest agent of a real Debian guest through the node's API, and the clients that ask for it. One boot for all."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from proxmoxer import ProxmoxAPI

from tests.clients.parts import NODE, Lab, ansible, open_lab
from tests.clients.test_inventory import inventory
from tests.contract.node_parts import Answer

N, V = f"/nodes/{NODE}", f"/nodes/{NODE}/qemu/100"
MAC = "bc:24:11:5a:fd:7f"


class Guest:
    """The agent of VM 100, asked over HTTP."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def ask(self, method: str, name: str, **fields: Any) -> Answer:
        return self.lab.client.ask(method, f"{V}/agent/{name}", {key.replace("_", "-"): fields[key] for key in fields})

    def result(self, method: str, name: str) -> Any:
        return self.ask(method, name).data["result"]

    def is_up(self) -> bool:
        """Whether its agent answers, cloud-init has named it, and it has an address."""
        if self.ask("POST", "ping").status != 200 or self.result("GET", "get-host-name") != {"host-name": "guest"}:
            return False
        return '"10.0.2.' in json.dumps(self.result("GET", "network-get-interfaces"))

    def start(self, *argv: str, **more: Any) -> int:
        return int(self.ask("POST", "exec", command=argv, **more).data["pid"])

    def end_of(self, pid: int, interval_seconds: float = 0.1) -> dict[str, Any]:
        while not (told := self.ask("GET", "exec-status", pid=pid).data)["exited"]:
            time.sleep(interval_seconds)
        return dict(told)

    def run(self, *argv: str, **more: Any) -> dict[str, Any]:
        return self.end_of(self.start(*argv, **more))


@contextlib.contextmanager
def booted(home: Path, guest_image: Path) -> Iterator[Lab]:
    """A guest imported, made and started through the API."""
    image = max(guest_image.glob("debian-12-*.qcow2"), key=lambda path: path.stat().st_mtime)
    with open_lab(home) as found:
        place = found.node.home / "storage" / "local" / "import" / "debian.qcow2"
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(image, place)
        except OSError:
            shutil.copy(image, place)
        found.client.do(
            "POST", f"{N}/qemu", vmid=100, name="guest", memory=512, cores=2, agent="enabled=1", boot="order=scsi0",
            scsihw="virtio-scsi-single", scsi0="local-lvm:0,import-from=local:import/debian.qcow2,discard=on",
            ide2="local-lvm:cloudinit", net0=f"virtio={MAC.upper()},bridge=vmbr0", ipconfig0="ip=dhcp", ciupgrade=0,
            ciuser="agent", tags="real", serial0="socket",
        )  # fmt: skip
        found.client.do("POST", f"{V}/status/start")
        guest = Guest(found)
        assert guest.ask("POST", "ping").reason == "QEMU guest agent is not running"
        deadline = time.monotonic() + 300
        while not guest.is_up():
            assert time.monotonic() < deadline, found.qemu.console(100)[-4000:]
            time.sleep(0.5)
        yield found


@pytest.mark.guest
def test_the_agent_of_a_real_guest(tmp_path: Path, guest_image: Path) -> None:
    """One test, for each would boot a guest of its own on another worker."""
    with booted(tmp_path / "node", guest_image) as lab:
        guest = Guest(lab)
        it_tells_what_the_guest_is(guest)
        it_runs_programs(guest)
        it_carries_much_output(guest)
        it_reads_and_writes_files(guest)
        it_does_little_while_frozen(guest)
        it_sets_a_password(guest)
        clients_see_the_guests_network(lab, tmp_path)
        it_hangs_and_comes_back(guest)
        it_shuts_the_guest_down(lab, guest)


def it_tells_what_the_guest_is(guest: Guest) -> None:
    assert guest.result("POST", "ping") == {}
    commands = {each["name"]: each["enabled"] for each in guest.result("GET", "info")["supported_commands"]}
    assert commands["guest-exec"] is True
    assert guest.result("GET", "get-osinfo")["id"] == "debian"
    assert guest.result("GET", "get-host-name") == {"host-name": "guest"}
    cards = {each["name"]: each for each in guest.result("GET", "network-get-interfaces")}
    assert cards["eth0"]["hardware-address"] == MAC
    assert {"ip-address", "ip-address-type", "prefix"} <= set(cards["eth0"]["ip-addresses"][0])
    assert cards["eth0"]["statistics"]["rx-packets"] > 0
    assert "/" in [each["mountpoint"] for each in guest.result("GET", "get-fsinfo")]
    assert abs(guest.result("GET", "get-time") / 1e9 - time.time()) < 3600
    assert guest.result("GET", "get-timezone")["offset"] == 0
    assert len(guest.result("GET", "get-vcpus")) == 2
    assert guest.result("GET", "get-users") == []
    # A guest whose kernel has no memory blocks answers with an error, which is a result as well.
    for name in ("get-memory-blocks", "get-memory-block-info"):
        found = guest.result("GET", name)
        assert isinstance(found, list) or found.keys() & {"size", "error"}
    assert guest.result("POST", "fsfreeze-status") == "thawed"
    assert "paths" in guest.result("POST", "fstrim")


def it_runs_programs(guest: Guest) -> None:
    assert guest.run("sh", "-c", "echo out; echo err >&2; exit 3") == {
        "exited": 1, "exitcode": 3, "out-data": "out\n", "err-data": "err\n", "out-truncated": 0, "err-truncated": 0,
    }  # fmt: skip
    assert guest.run("sh", "-c", "kill -9 $$") == {"exited": 1, "signal": 9}
    pid = guest.start("true")
    assert guest.end_of(pid) == {"exited": 1, "exitcode": 0}
    again = guest.ask("GET", "exec-status", pid=pid)
    assert (again.status, again.reason.startswith("Agent error: ")) == (500, True)
    missing = guest.ask("POST", "exec", command=["/nope"])
    assert missing.status == 500
    assert missing.reason.startswith("Agent error: ")
    assert "Failed to execute child process '/nope' (No such file or directory)" in missing.reason
    assert missing.json["message"] == f"{missing.reason}\n"
    data = "".join(map(chr, range(256))) * 256
    answer = guest.run("sha256sum", input_data=data)
    assert answer["out-data"].split()[0] == hashlib.sha256(data.encode("latin1")).hexdigest()
    assert guest.run("printf", r"\303\251\377")["out-data"] == "\u00c3\u00a9\u00ff"


def it_carries_much_output(guest: Guest) -> None:
    """A mebibyte; the agent's own limit of 16 takes an emulated guest a minute to reach."""
    pid = guest.start("sh", "-c", "head -c 1048576 /dev/zero | tr '\\0' '\\351'")
    answer = guest.end_of(pid, interval_seconds=1)  # the agent does one thing at a time: each question slows it down
    assert (answer["exitcode"], answer["out-truncated"]) == (0, 0)
    assert answer["out-data"] == "\u00e9" * (1 << 20)


def it_reads_and_writes_files(guest: Guest) -> None:
    def write(**fields: Any) -> None:
        assert guest.ask("POST", "file-write", file="/root/kept", **fields).data is None

    content = bytes(range(256)) * 170
    write(content=base64.b64encode(content).decode(), encode=0)
    told = guest.ask("GET", "file-read", file="/root/kept").data
    assert told == {"content": content.decode("latin1"), "bytes-read": len(content)}
    write(content=told["content"])  # what was read can be written again
    raw = guest.ask("GET", "file-read", file="/root/kept", decode=0).data
    assert base64.b64decode(raw["content"]) == content
    write(content="short")
    assert guest.ask("GET", "file-read", file="/root/kept").data == {"content": "short", "bytes-read": 5}
    part = guest.ask("GET", "file-read", file="/root/kept", count=2, offset=1).data
    assert part == {"content": "ho", "bytes-read": 2, "truncated": 1}
    absent = guest.ask("GET", "file-read", file="/root/absent")
    assert absent.reason.startswith("Agent error: failed to open file '/root/absent'")
    guest.run("truncate", "-s", "17M", "/root/large")
    large = guest.ask("GET", "file-read", file="/root/large").data
    assert (large["bytes-read"], len(large["content"]), large["truncated"]) == (16 << 20, 16 << 20, 1)


def it_does_little_while_frozen(guest: Guest) -> None:
    assert guest.result("POST", "fsfreeze-freeze") > 0
    try:
        assert guest.result("POST", "fsfreeze-status") == "frozen"
        assert guest.result("POST", "ping") == {}
        refused = guest.ask("POST", "exec", command=["true"])
        assert (refused.status, refused.reason.startswith("Agent error: ")) == (500, True)
        assert "error" in guest.result("GET", "get-osinfo")
    finally:
        assert guest.result("POST", "fsfreeze-thaw") > 0
    assert guest.run("true")["exitcode"] == 0


def it_sets_a_password(guest: Guest) -> None:
    def stored() -> str:
        return str(guest.run("getent", "shadow", "agent")["out-data"]).split(":")[1]

    check = "import crypt, sys; kept = sys.argv[1]; sys.exit(crypt.crypt(sys.argv[2], kept) != kept)"
    assert guest.ask("POST", "set-user-password", username="agent", password="new secret").data == {"result": {}}
    assert guest.run("python3", "-c", check, stored(), "new secret")["exitcode"] == 0
    crypted = "$6$salt$IxDD3jeSOb5eB1CX5LBsqZFVkJdido3OUILO5Ifz5iwMuTS4XMS130MTSuDDl3aCI6WouIL9AjRbLCelDCy.g."
    assert guest.ask("POST", "set-user-password", username="agent", password=crypted, crypted=1).status == 200
    assert stored() == crypted
    absent = guest.ask("POST", "set-user-password", username="nobody-here", password="secret")
    assert (absent.status, absent.reason.startswith("Agent error: ")) == (500, True)


def clients_see_the_guests_network(lab: Lab, tmp_path: Path) -> None:
    facts = inventory(lab, tmp_path)["_meta"]["hostvars"]["guest"]
    cards = {each["name"]: each for each in facts["proxmox_agent_interfaces"]}
    assert cards["eth0"]["mac-address"] == MAC
    assert any(address.startswith("10.0.2.") for address in cards["eth0"]["ip-addresses"])
    (tmp_path / "info.yml").write_text(
        json.dumps(
            [
                {
                    "hosts": "localhost",
                    "gather_facts": False,
                    "tasks": [
                        {"community.proxmox.proxmox_vm_info": {"name": "guest", "network": True}, "register": "info"},
                        {"ansible.builtin.assert": {"that": [f"'{MAC}' in (info.proxmox_vms[0].network | to_json)"]}},
                    ],
                }
            ]
        )
    )
    ansible(lab, "ansible-playbook", "-i", "localhost,", "-c", "local", "info.yml", folder=tmp_path)
    user, name, secret = lab.token
    api = ProxmoxAPI(
        lab.node.url.removeprefix("https://"), user=user, token_name=name, token_value=secret, timeout=30,
        verify_ssl=lab.certificate,
    )  # fmt: skip
    agent = api.nodes(NODE).qemu(100).agent
    pid = agent.exec.post(command="sh -c 'echo two words'")["pid"]
    assert Guest(lab).end_of(pid)["out-data"] == "two words\n"


def it_hangs_and_comes_back(guest: Guest) -> None:
    guest.start("sh", "-c", "sleep 2; kill -STOP $(pidof qemu-ga); sleep 10; kill -CONT $(pidof qemu-ga)")
    deadline = time.monotonic() + 60
    while (answer := guest.ask("GET", "get-osinfo")).status == 200:
        assert time.monotonic() < deadline
    assert "QEMU guest agent is not running" in answer.reason or "got timeout" in answer.reason
    while guest.ask("POST", "ping").status != 200:
        assert time.monotonic() < deadline
    # The answers to those who have given up came first, and are nobody's.
    assert guest.run("echo", "mine")["out-data"] == "mine\n"
    assert guest.result("GET", "get-host-name") == {"host-name": "guest"}


def it_shuts_the_guest_down(lab: Lab, guest: Guest) -> None:
    assert guest.ask("POST", "shutdown").data == {"result": None}
    deadline = time.monotonic() + 120
    while lab.qemu.is_running(100):
        assert time.monotonic() < deadline, lab.qemu.console(100)[-4000:]
        time.sleep(0.2)
    assert guest.ask("POST", "ping").reason == "VM 100 is not running"
