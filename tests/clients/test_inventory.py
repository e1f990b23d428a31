"""Ansible's inventory plugin of community.proxmox: hosts, groups and facts are those of the node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.clients.parts import NODE, Lab, ansible

PLUGIN = """\
plugin: community.proxmox.proxmox
validate_certs: true
want_facts: true
want_proxmox_nodes_ansible_host: true
qemu_extended_statuses: true
keyed_groups:
  - key: proxmox_tags_parsed
    prefix: tag
    separator: "_"
"""


def inventory(lab: Lab, folder: Path) -> dict[str, Any]:
    """What ansible-inventory lists, with token authentication; its marks of foreign text are taken off."""
    (folder / "proxmox.yml").write_text(PLUGIN)
    printed = ansible(lab, "ansible-inventory", "-i", "proxmox.yml", "--list", folder=folder)
    found: dict[str, Any] = json.loads(printed, object_hook=lambda found: found.get("__ansible_unsafe", found))
    return found


def test_hosts_groups_and_facts(lab: Lab, tmp_path: Path) -> None:
    client = lab.client
    client.ask("POST", "/pools", {"poolid": "blue"})
    for vmid, name, more in (
        (100, "web", {"tags": "front;lab", "pool": "blue", "scsi0": "local-lvm:1", "description": "a=b,c=d"}),
        (101, "db", {"tags": "lab", "agent": 1}),
        (102, "idle", {"pool": "blue"}),
        (103, "mould", {}),
    ):
        client.do("POST", f"/nodes/{NODE}/qemu", vmid=vmid, name=name, memory=64, **more)
    client.do("POST", f"/nodes/{NODE}/qemu/103/template")
    client.do("POST", f"/nodes/{NODE}/qemu/100/snapshot", snapname="s1")
    for vmid in (100, 101):
        client.do("POST", f"/nodes/{NODE}/qemu/{vmid}/status/start")
    client.do("POST", f"/nodes/{NODE}/qemu/101/status/suspend")

    found = inventory(lab, tmp_path)
    groups = {name: set(group.get("hosts", [])) for name, group in found.items() if name != "_meta"}
    assert groups["proxmox_nodes"] == {NODE}
    assert groups["proxmox_all_qemu"] == groups[f"proxmox_{NODE}_qemu"] == {"web", "db", "idle"}
    assert groups["proxmox_all_running"] == {"web"}
    assert groups["proxmox_all_paused"] == {"db"}
    assert groups["proxmox_all_stopped"] == {"idle"}
    assert groups["proxmox_pool_blue"] == {"web", "idle"}
    assert (groups["tag_lab"], groups["tag_front"]) == ({"web", "db"}, {"web"})
    assert groups.get("proxmox_all_lxc", set()) == set()
    facts = found["_meta"]["hostvars"]["web"]
    assert (facts["proxmox_vmid"], facts["proxmox_status"], facts["proxmox_qmpstatus"]) == (100, "running", "running")
    assert (facts["proxmox_memory"], facts["proxmox_node"], facts["proxmox_snapshots"]) == ("64", NODE, ["s1"])
    assert facts["proxmox_scsi0"]["disk_image"] == "local-lvm:vm-100-disk-0"
    assert facts["proxmox_description"] == "a=b,c=d"
    # Its agent does not answer: 500, which the plugin passes over.
    assert "proxmox_agent_interfaces" not in found["_meta"]["hostvars"]["db"]
