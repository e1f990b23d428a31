"""Uploading an image to a node and making the template of it, against the node with the stub hypervisor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import pytest

from autovibe.errors import ConfigurationError, HypervisorTaskFailed, LimitExceeded, NotFound
from autovibe.hypervisor import Proxmox, change, read
from autovibe.node.disks import DiskError
from autovibe.workflows import image
from tests.stub import node as stub

pytestmark = pytest.mark.stub

HEADER = b"QFI\xfb\x00\x00\x00\x03" + bytes(504)


@pytest.fixture(scope="module")
def node() -> Iterator[stub.StubNode]:
    found = stub.start()
    yield found
    found.stop()


@pytest.fixture
def px(node: stub.StubNode) -> Iterator[Proxmox]:
    px = node.proxmox()
    yield px
    px.close()


def upload(px: Proxmox, path: Path, **changes: Any) -> int:
    order: dict[str, Any] = {
        "storage": "local-lvm",
        "import_storage": "local",
        "bridge": "vmbr0",
        "image": "small",
        "path": path,
        "vmid_first": 9100,
        "vmid_last": 9199,
    }
    return image.upload(px, **{**order, **changes})


def write(path: Path, content: bytes = HEADER) -> Path:
    path.write_bytes(content)
    return path


def imports(px: Proxmox) -> list[str]:
    found = px.get(f"nodes/{px.node}/storage/local/content", content="import")
    return [str(each["volid"]) for each in found]


def test_an_image_becomes_a_template_and_is_found_the_next_time(px: Proxmox, tmp_path: Path) -> None:
    path = write(tmp_path / "small-0123456789ab.qcow2")
    told: list[tuple[str, float | None]] = []
    vmid = upload(px, path, progress=lambda phase, fraction: told.append((phase, fraction)))
    assert vmid == 9199
    vm = read.find_vm(px, vmid)
    assert vm is not None
    assert (vm.name, vm.is_template, vm.tags) == ("av-image-small-01234567", True, ("autovibe-image",))
    assert read.find_image(px, "small") == vm
    config = read.config(px, vmid)
    assert str(config["scsi0"]).startswith("local-lvm:base-9199-disk-")
    assert "cloudinit" in str(config["ide2"])
    assert (config["serial0"], config["ostype"], config["boot"]) == ("socket", "l26", "order=scsi0")
    assert imports(px) == []
    phases = list(dict.fromkeys(phase for phase, _ in told))
    assert phases == ["uploading the image", "importing the disk", "making the template", "ready"]
    assert upload(px, path) == vmid


def test_another_content_becomes_another_template(px: Proxmox, tmp_path: Path) -> None:
    first = upload(px, write(tmp_path / "mine.qcow2"), image="other")
    second = upload(px, write(tmp_path / "mine.qcow2", HEADER + bytes(512)), image="other")
    assert first != second
    assert upload(px, tmp_path / "mine.qcow2", image="other") == second


def test_what_a_killed_upload_left_is_removed(px: Proxmox, tmp_path: Path) -> None:
    name = "av-image-killed-0123abcd"
    half = change.create(px, 9150, owner=uuid5(NAMESPACE_URL, f"autovibe:{name}"), name=name)
    assert half is not None
    read.await_task(px, half)
    vmid = upload(px, write(tmp_path / "killed-0123abcd4567.qcow2"), image="killed")
    assert [vm.vmid for vm in read.vms(px) if vm.name == name] == [vmid]
    assert vmid != 9150


def test_a_failed_creation_leaves_nothing(
    px: Proxmox, tmp_path: Path, node: stub.StubNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise DiskError("no space left on device")

    before = {vm.vmid for vm in read.vms(px)}
    monkeypatch.setattr(node.disks, "make_base", refuse)
    with pytest.raises(HypervisorTaskFailed, match="no space left"):
        upload(px, write(tmp_path / "bad-0123456789ab.qcow2"), image="bad")
    assert {vm.vmid for vm in read.vms(px)} == before
    assert imports(px) == []


def test_wrong_orders_are_refused_before_anything_is_sent(px: Proxmox, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"autovibe image build small"):
        upload(px, tmp_path / "small-none.qcow2")
    path = write(tmp_path / "new-0123456789ab.qcow2")
    with pytest.raises(ConfigurationError, match=r"pvesm set local-lvm --content .*import"):
        upload(px, path, image="new", import_storage="local-lvm")
    taken = upload(px, write(tmp_path / "small-ffffffffffff.qcow2"))
    with pytest.raises(LimitExceeded, match=f"from {taken} to {taken} is taken"):
        upload(px, path, image="new", vmid_first=taken, vmid_last=taken)
    assert read.find_image(px, "new") is None
    assert imports(px) == []
