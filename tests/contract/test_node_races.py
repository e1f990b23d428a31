"""Calls at the same moment: each ends as on a real Proxmox, well or with a clean refusal, and nothing is half made."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.contract.node_parts import Client

N = "/nodes/pvetest"
CLEAN = re.compile(
    r"unable to create VM \d+ - VM \d+ already exists on node 'pvetest'"
    r"|unable to create VM \d+: config file already exists"
    r"|VM is locked \([a-z-]+\)"
    r"|can't lock file '/var/lock/qemu-server/lock-\d+\.conf' - got timeout"
    r"|snapshot '\w+' does not exist"
    r"|snapshot name '\w+' already used"
    r"|checksum mismatch \(file change by other user\?\)"
    r"|Configuration file 'nodes/pvetest/qemu-server/\d+\.conf' does not exist"
    r"|clone failed: .*(does not exist|no such).*"
    r"|base volume '.*' is still in use by linked cloned?"
)


def at_once(calls: list[Callable[[], str]]) -> list[str]:
    """What each call came to, when all begin at one moment."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], str]) -> str:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def outcome(client: Client, method: str, path: str, **fields: Any) -> str:
    """`OK`, or the refusal's words, whether they came at once or at the task's end."""
    answer = client.ask(method, path, fields)
    if answer.status != 200:
        assert answer.status in (400, 500), (answer.status, answer.reason)
        return answer.reason
    upid = answer.data
    return client.end_of(upid) if isinstance(upid, str) and upid.startswith("UPID:") else "OK"


def vmids(client: Client) -> set[int]:
    return {vm["vmid"] for vm in client.get(f"{N}/qemu")}


def volumes_of(client: Client, vmid: int) -> list[str]:
    storages = [entry["storage"] for entry in client.get(f"{N}/storage")]
    return [
        volume["volid"]
        for storage in storages
        for volume in client.get(f"{N}/storage/{storage}/content", vmid=vmid)
        if volume["content"] == "images"
    ]


def assert_clean(results: list[str]) -> None:
    assert not [text for text in results if text != "OK" and not CLEAN.fullmatch(text)], results


@pytest.mark.parametrize("storage", ["local", "local-lvm"])
def test_eight_linked_clones_of_one_template(client: Client, storage: str) -> None:
    client.do("POST", f"{N}/qemu", vmid=100, memory=64, scsi0=f"{storage}:1", scsi1=f"{storage}:1")
    client.do("POST", f"{N}/qemu/100/template")
    clones = range(200, 208)
    results = at_once(
        [
            lambda new=new: outcome(client, "POST", f"{N}/qemu/100/clone", newid=new)  # type: ignore[misc]
            for new in clones
        ]
    )
    assert results == ["OK"] * 8
    configs = {new: client.get(f"{N}/qemu/{new}/config") for new in clones}
    assert not [new for new, config in configs.items() if "lock" in config]
    assert all(len(volumes_of(client, new)) == 2 for new in clones)
    assert len({config["smbios1"] for config in configs.values()}) == 8
    assert_clean([outcome(client, "DELETE", f"{N}/qemu/{new}") for new in clones])
    client.do("DELETE", f"{N}/qemu/100")
    assert client.get(f"{N}/storage/{storage}/content", content="images") == []


def test_six_races_for_the_next_vmid(client: Client) -> None:
    def create() -> str:
        vmid = client.get("/cluster/nextid")
        return outcome(client, "POST", f"{N}/qemu", vmid=vmid, memory=64, scsi0="local-lvm:1")

    tries = at_once([create] * 6)
    made = tries.count("OK")
    assert made >= 1
    for text in tries:
        assert text == "OK" or re.fullmatch(r"unable to create VM \d+ - VM \d+ already exists on node 'pvetest'", text)
    assert len(vmids(client)) == made
    for _ in range(6 - made):  # a second try, alone, finds a free one
        assert create() == "OK"
    assert vmids(client) == set(range(100, 106))


def test_one_vmid_is_taken_once(client: Client) -> None:
    results = at_once([lambda: outcome(client, "POST", f"{N}/qemu", vmid=100, scsi0="local-lvm:1")] * 6)
    assert sorted(results)[0] == "OK"
    assert sorted(results)[1:] == ["unable to create VM 100 - VM 100 already exists on node 'pvetest'"] * 5
    assert len(volumes_of(client, 100)) == 1


def test_no_update_with_a_digest_is_lost(client: Client) -> None:
    client.do("POST", f"{N}/qemu", vmid=100, memory=64, description="-")

    def write(mark: str) -> str:
        while True:
            config = client.get(f"{N}/qemu/100/config")
            text = f"{config['description'].strip()}{mark}"
            answer = client.ask("PUT", f"{N}/qemu/100/config", {"description": text, "digest": config["digest"]})
            if answer.status == 200:
                return "OK"
            assert answer.reason == "checksum mismatch (file change by other user?)"

    marks = [f"[{number}]" for number in range(8)]
    assert at_once([lambda mark=mark: write(mark) for mark in marks]) == ["OK"] * 8  # type: ignore[misc]
    written = client.get(f"{N}/qemu/100/config")["description"]
    assert sorted(re.findall(r"\[\d\]", written)) == marks


def test_different_options_written_at_once_are_all_kept(client: Client) -> None:
    client.do("POST", f"{N}/qemu", vmid=100, memory=64)
    path = f"{N}/qemu/100/config"
    calls = [
        lambda key=key: outcome(client, "PUT", path, **{key: "local-lvm:1"}) for key in ("scsi1", "scsi2", "virtio1")
    ]  # type: ignore[misc]
    calls += [lambda: outcome(client, "POST", path, cores=2), lambda: outcome(client, "POST", path, tags="a")]
    assert at_once(calls) == ["OK"] * 5
    config = client.get(path)
    assert {"scsi1", "scsi2", "virtio1"} <= config.keys()
    assert (config["cores"], config["tags"]) == (2, "a")
    assert len(volumes_of(client, 100)) == 3


def test_snapshots_taken_and_deleted_at_once(client: Client) -> None:
    client.do("POST", f"{N}/qemu", vmid=100, memory=64, scsi0="local-lvm:1", scsi1="local:1,format=qcow2")
    path = f"{N}/qemu/100/snapshot"
    taken = at_once(
        [
            lambda name=name: outcome(client, "POST", path, snapname=name)  # type: ignore[misc]
            for name in ("s1", "s2", "s3", "s3")
        ]
    )
    assert_clean(taken)
    present = {entry["name"] for entry in client.get(path)} - {"current"}
    assert len(present) == taken.count("OK") >= 1
    for name in sorted({"s1", "s2", "s3"} - present):
        client.do("POST", path, snapname=name)
    deleted = at_once(
        [
            *[lambda: outcome(client, "DELETE", f"{path}/s2")] * 3,
            lambda: outcome(client, "POST", path, snapname="s4"),
            lambda: outcome(client, "POST", f"{path}/s1/rollback"),
        ]
    )
    assert_clean(deleted)
    assert deleted[:3].count("OK") <= 1
    left = {entry["name"] for entry in client.get(path)} - {"current"}
    assert ("s2" in left) == (deleted[:3].count("OK") == 0)
    assert ("s4" in left) == (deleted[3] == "OK")
    assert "lock" not in client.get(f"{N}/qemu/100/config")
    for name in sorted(left):
        client.do("DELETE", f"{path}/{name}")
    client.do("DELETE", f"{N}/qemu/100")
    assert volumes_of(client, 100) == []


@pytest.mark.parametrize("is_template", [False, True])
def test_a_vm_is_destroyed_while_it_is_cloned(client: Client, is_template: bool) -> None:
    for round_ in range(4):
        client.do("POST", f"{N}/qemu", vmid=100, memory=64, scsi0="local-lvm:1", scsi1="local:1,format=qcow2")
        if is_template:
            client.do("POST", f"{N}/qemu/100/template")
        clone, destroy = at_once(
            [
                lambda: outcome(client, "POST", f"{N}/qemu/100/clone", newid=200, full=int(not is_template)),
                lambda: outcome(client, "DELETE", f"{N}/qemu/100"),
            ]
        )
        assert_clean([clone, destroy])
        assert (200 in vmids(client)) == (clone == "OK"), (round_, clone, destroy)
        assert len(volumes_of(client, 200)) == (2 if clone == "OK" else 0), (round_, clone, destroy)
        assert (100 in vmids(client)) == (destroy != "OK"), (round_, clone, destroy)
        for vmid in sorted(vmids(client), reverse=True):
            client.do("DELETE", f"{N}/qemu/{vmid}")
        assert volumes_of(client, 100) == []
