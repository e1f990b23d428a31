"""prometheus-pve-exporter as a process: what it says of the node is what the node is."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.clients.parts import NODE, Lab
from tests.stub.node import free_port


@pytest.fixture
def exporter(lab: Lab, tmp_path: Path) -> Iterator[str]:
    """The address of a running exporter: as root by token and by password, and as somebody who may only look."""
    lab.client.ask("POST", "/access/users", {"userid": "watcher@pve", "password": "only looking"})
    lab.client.ask("PUT", "/access/acl", {"path": "/", "roles": "PVEAuditor", "users": "watcher@pve"})
    token = lab.client.ask("POST", "/access/users/watcher@pve/token/exporter", {"privsep": 0}).data
    user, name, secret = lab.token
    modules = {
        "default": {"user": user, "token_name": name, "token_value": secret, "verify_ssl": lab.certificate},
        "by_password": {"user": user, "password": lab.password, "verify_ssl": lab.certificate},
        "auditor": {
            "user": "watcher@pve",
            "token_name": "exporter",
            "token_value": token["value"],
            "verify_ssl": lab.certificate,
        },
    }
    (tmp_path / "pve.yml").write_text(yaml.safe_dump(modules))
    address = f"127.0.0.1:{free_port()}"
    argv = [sys.executable, "-m", "pve_exporter", "--config.file", str(tmp_path / "pve.yml")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*argv, "--web.listen-address", address], cwd=tmp_path, env=lab.environment, stdout=log, stderr=log
        )
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://{address}/", timeout=5).close()
                break
            except urllib.error.URLError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def scrape(lab: Lab, exporter: str, module: str = "default") -> dict[str, dict[str, float]]:
    """Each metric's values by the id of what they are about; info metrics by their labels, sorted."""
    query = f"target=127.0.0.1:{lab.node.port}&module={module}&cluster=1&node=1"
    with urllib.request.urlopen(f"{exporter}/pve?{query}", timeout=60) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            key = labels.pop("id", "")
            key += "".join(f" {name}={value}" for name, value in sorted(labels.items()) if name != "content")
            found.setdefault(sample.name, {})[key] = sample.value
    return found


def test_metrics_are_the_nodes_state(lab: Lab, exporter: str) -> None:
    client = lab.client
    client.do("POST", f"/nodes/{NODE}/qemu", vmid=100, name="one", memory=64, onboot=1, tags="a;b", scsi0="local-lvm:1")
    client.do("POST", f"/nodes/{NODE}/qemu", vmid=101, name="two", memory=128, cores=2, onboot=0)
    client.do("POST", f"/nodes/{NODE}/qemu/101/template")
    client.do("POST", f"/nodes/{NODE}/qemu/100/status/start")
    try:
        found = scrape(lab, exporter)
        node = f"node/{NODE}"
        storages = {f"storage/{NODE}/local", f"storage/{NODE}/local-lvm"}
        assert found["pve_up"] == {node: 1, "qemu/100": 1, "qemu/101": 0, **dict.fromkeys(storages, 1)}
        version = client.get("/version")
        labels = "".join(f" {name}={version[name]}" for name in ("release", "repoid", "version"))
        assert found["pve_version_info"] == {labels: 1}
        assert found["pve_node_info"] == {f"{node} level= name={NODE} nodeid=0": 1}
        assert "pve_cluster_info" not in found
        assert set(found["pve_guest_info"]) == {
            f"qemu/100 name=one node={NODE} tags=a;b template=0 type=qemu",
            f"qemu/101 name=two node={NODE} tags= template=1 type=qemu",
        }
        assert found["pve_onboot_status"] == {
            f"qemu/100 node={NODE} type=qemu": 1,
            f"qemu/101 node={NODE} type=qemu": 0,
        }
        assert found["pve_memory_size_bytes"]["qemu/100"] == 64 << 20
        assert found["pve_memory_size_bytes"]["qemu/101"] == 128 << 20
        assert found["pve_cpu_usage_limit"]["qemu/101"] == 2
        assert found["pve_disk_size_bytes"]["qemu/100"] == 1 << 30
        assert found["pve_uptime_seconds"]["qemu/101"] == 0
        status = {storage["storage"]: storage for storage in client.get(f"/nodes/{NODE}/storage")}
        for name in ("local", "local-lvm"):
            assert found["pve_disk_size_bytes"][f"storage/{NODE}/{name}"] == status[name]["total"]
            assert found["pve_storage_shared"][f"storage/{NODE}/{name}"] == 0
        assert set(found["pve_storage_info"]) == {
            f"storage/{NODE}/local node={NODE} plugintype=dir storage=local",
            f"storage/{NODE}/local-lvm node={NODE} plugintype=lvmthin storage=local-lvm",
        }
        assert set(found["pve_lock_state"].values()) == {0}
        # No job backs anything up, so every VM is without a backup.
        assert set(found["pve_not_backed_up_info"]) <= {"qemu/100", "qemu/101"}
        assert found["pve_not_backed_up_total"] == {f"cluster/{NODE}": len(found.get("pve_not_backed_up_info", {}))}
        assert found["pve_subscription_status"][f"{node} status=notfound"] == 1
        for module in ("by_password", "auditor"):
            assert scrape(lab, exporter, module)["pve_up"] == found["pve_up"]
        client.do("POST", f"/nodes/{NODE}/qemu/100/status/stop")
        assert scrape(lab, exporter)["pve_up"]["qemu/100"] == 0
    finally:
        lab.qemu.stop(100)
