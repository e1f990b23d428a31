"""Cloud-init data against a dump recorded from Proxmox VE 9.2.11, and the ISO a guest reads."""

from __future__ import annotations

import hashlib
import io
import subprocess
from pathlib import Path
from urllib.parse import quote

import pycdlib
import pytest
import yaml

from autovibe.node.disks.volume import DiskError
from autovibe.node.vm import cloudinit

NET = "virtio=BC:24:11:5A:FD:7F,bridge=vmbr0"


def test_user_data_as_recorded() -> None:
    """From pve/exchanges.jsonl: GET …/cloudinit/dump?type=user."""
    expected = (
        "#cloud-config\nhostname: tpl\nmanage_etc_hosts: true\nfqdn: tpl\nuser: lab\nchpasswd:\n  expire: False\n"
        "users:\n  - default\npackage_upgrade: true\n"
    )
    assert cloudinit.dump({"name": "tpl", "ciuser": "lab"}, "user") == expected


def test_user_data_of_every_key() -> None:
    keys = ["ssh-ed25519 AAAAC3Nz+/= me@host: #1", "ssh-rsa AAAA'quoted'"]
    told = yaml.safe_load(
        cloudinit.dump(
            {
                "name": "web",
                "searchdomain": "lab.example other.example",
                "ciuser": "true",
                "cipassword": "pa: ss'#\n- x",
                "sshkeys": quote("\n".join(keys) + "\n", safe=""),
                "ciupgrade": "0",
            },
            "user",
        )
    )
    assert told["fqdn"] == "web.lab.example"
    assert told["user"] == "true"
    assert told["password"] == "pa: ss'# - x"
    assert told["ssh_authorized_keys"] == keys
    assert told["users"] == ["default"]
    assert "package_upgrade" not in told


def test_network_config() -> None:
    config = {
        "net0": NET,
        "net1": "e1000=BC:24:11:00:00:01,bridge=vmbr1",
        "ipconfig0": "ip=10.99.0.50/24,gw=10.99.0.1,ip6=auto",
        "ipconfig1": "ip=dhcp,ip6=fd00::5/64,gw6=fd00::1",
        "nameserver": "1.1.1.1 9.9.9.9",
        "searchdomain": "lab",
    }
    told = yaml.safe_load(cloudinit.dump(config, "network"))
    assert told["version"] == 1
    first, second, servers = told["config"]
    assert first["mac_address"] == "bc:24:11:5a:fd:7f"
    static = {"type": "static", "address": "10.99.0.50", "netmask": "255.255.255.0", "gateway": "10.99.0.1"}
    assert first["subnets"] == [static, {"type": "ipv6_slaac"}]
    assert second["subnets"] == [
        {"type": "dhcp4"},
        {"type": "static6", "address": "fd00::5/64", "gateway": "fd00::1"},
    ]
    assert servers == {"type": "nameserver", "address": ["1.1.1.1", "9.9.9.9"], "search": ["lab"]}


def test_the_instance_id_follows_user_and_network_data() -> None:
    config = {"name": "web", "net0": NET, "ipconfig0": "ip=dhcp"}
    data = cloudinit.dump(config, "user") + cloudinit.dump(config, "network")
    assert cloudinit.dump(config, "meta") == f"instance-id: {hashlib.sha1(data.encode()).hexdigest()}\n"
    assert cloudinit.dump(config, "meta") != cloudinit.dump({**config, "name": "other"}, "meta")
    assert cloudinit.dump(config, "meta") == cloudinit.dump({**config, "memory": "4096"}, "meta")


def test_snippets_take_the_place_of_what_is_made(tmp_path: Path) -> None:
    snippet = tmp_path / "x.yaml"
    snippet.write_text("#cloud-config\nfoo: bar\n")
    config = {"name": "web", "cicustom": "user=local:snippets/x.yaml"}
    assert cloudinit.dump(config, "user", snippet=lambda volid: snippet) == "#cloud-config\nfoo: bar\n"
    assert "version: 1" in cloudinit.dump(config, "network", snippet=lambda volid: snippet)
    with pytest.raises(DiskError, match="is no snippet"):
        cloudinit.dump({"cicustom": "user=local:iso/x.iso"}, "user", snippet=lambda volid: snippet)


@pytest.mark.parametrize("name", ["vm-100-cloudinit.raw", "vm-100-cloudinit.qcow2"])
def test_the_iso(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    config = {"net0": NET, "ipconfig0": "ip=dhcp"}
    for _ in range(2):  # made anew at every start
        cloudinit.build(path, 100, config)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    raw = path
    if path.suffix == ".qcow2":
        raw = tmp_path / "raw"
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)], check=True)
    assert raw.stat().st_size == cloudinit.SIZE_BYTES
    iso = pycdlib.PyCdlib()
    iso.open(str(raw))
    assert iso.pvd.volume_identifier.strip() == b"cidata"
    read = {}
    for file in ("user-data", "meta-data", "network-config", "vendor-data"):
        data = io.BytesIO()
        iso.get_file_from_iso_fp(data, rr_path=f"/{file}")
        read[file] = data.getvalue().decode()
    iso.close()
    assert "hostname: VM100\n" in read["user-data"]
    assert read["network-config"] == cloudinit.dump(config, "network")
    assert read["meta-data"] == cloudinit.dump({"name": "VM100", **config}, "meta")
