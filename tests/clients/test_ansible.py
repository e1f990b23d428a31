"""Ansible's collection community.proxmox: its modules make, change and remove VMs that run under real QEMU."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.clients.parts import HERE, NODE, Lab, ansible


def play(lab: Lab, name: str, folder: Path, *more: str, image: Path | None = None) -> dict[str, int]:
    """Run a playbook: how many tasks were ok, changed, failed."""
    words = ["-i", "localhost,", "-c", "local", "-e", json.dumps({"image": str(image or "")}), *more]
    printed = ansible(lab, "ansible-playbook", *words, str(HERE / "playbooks" / f"{name}.yml"), folder=folder)
    recap = re.search(r"^localhost +: +(.*)$", printed, re.MULTILINE)
    assert recap, printed
    counts = {key: int(count) for key, count in re.findall(r"(\w+)=(\d+)", recap[1])}
    assert counts["failed"] == counts["unreachable"] == 0, printed
    return counts


def test_the_life_of_a_vm(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "small.iso"
    image.write_bytes(b"\0" * (1 << 16))
    assert play(lab, "present", tmp_path, image=image)["changed"] == 4
    config = lab.config(200)
    assert (config["name"], config["memory"], config["cores"]) == ("web", "64", 1)
    assert config["tags"] in ("lab;web", "lab,web")
    assert config["description"] == "Two lines\nand \u00fcmlauts"
    assert config["scsi0"] == "local-lvm:vm-200-disk-0,discard=on,size=1G"
    assert config["sshkeys"].startswith("ssh-ed25519%20AAAA")
    assert lab.qemu.running() == [200]
    assert play(lab, "present", tmp_path, image=image)["changed"] == 0

    assert play(lab, "change", tmp_path, image=image)["changed"] == 9
    assert lab.qemu.running() == []
    assert lab.config(200)["template"] == 1
    assert [entry["name"] for entry in lab.client.get(f"/nodes/{NODE}/qemu/200/snapshot")] == ["current"]
    assert lab.config(201)["name"] == "web-1"
    assert lab.config(202)["scsi0"].startswith("local:202/vm-202-disk-0.qcow2")

    assert play(lab, "absent", tmp_path, image=image)["changed"] == 2
    assert lab.client.get(f"/nodes/{NODE}/qemu") == []
    assert lab.client.get(f"/nodes/{NODE}/storage/local/content") == []
    assert lab.client.get(f"/nodes/{NODE}/storage/local-lvm/content") == []
    assert play(lab, "absent", tmp_path, image=image)["changed"] == 0


def test_what_stands_around_vms(lab: Lab, tmp_path: Path) -> None:
    assert play(lab, "around", tmp_path)["changed"] == 9
    config = lab.config(300)
    assert config["scsi1"] == "local-lvm:vm-300-disk-0,size=3G"
    assert config["net1"] == "virtio=BC:24:11:00:03:01,bridge=vmbr0,firewall=1,tag=12"
    assert play(lab, "around", tmp_path, "--skip-tags", "told")["changed"] == 0
    assert lab.client.get("/pools/red")["members"][0]["vmid"] == 300
    lab.client.do("DELETE", f"/nodes/{NODE}/qemu/300", purge=1)
