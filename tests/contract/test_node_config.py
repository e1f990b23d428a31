"""A VM's configuration in depth: rules of setting, deleting, reverting, rights, hotplug by the book, disks that move.

What QEMU itself does is in tests/e2e/test_node_hotplug.py; here a monitor only writes down what it is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autovibe.node.access.passwords import hashed, sha256_crypt
from autovibe.node.vm import firmware
from autovibe.node.vm.monitor import MonitorError
from tests.contract.node_parts import Answer, Client, FlagQemu, make_node

N = "/nodes/pvetest"
V = f"{N}/qemu/100"


class Listener:
    """A monitor that keeps the commands it is given, and knows which devices there are."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.devices = {"net0", "scsi0", "ide2"}
        self.refuses = ""

    def execute(self, command: str, /, **arguments: Any) -> Any:
        return self.send(command, {key.replace("_", "-"): value for key, value in arguments.items()})

    def send(self, command: str, arguments: dict[str, Any]) -> Any:
        if command == self.refuses:
            raise MonitorError(f"VM 100 qmp command '{command}' failed - no")
        match command:
            case "qom-list":
                return [{"name": name} for name in self.devices]
            case "query-block" | "query-blockstats" | "query-iothreads" | "query-named-block-nodes":
                return []
            case "query-hotpluggable-cpus":
                return [{"type": "max-x86_64-cpu", "props": {"core-id": 0}, "qom-path": "/x"}, *self._free()]
            case "device_add":
                self.devices.add(arguments["id"])
            case "device_del":
                self.devices.discard(arguments["id"])
        self.told.append((command, arguments))
        return {}

    def _free(self) -> list[dict[str, Any]]:
        return [{"type": "max-x86_64-cpu", "props": {"core-id": number}} for number in (1, 2, 3)]

    def names(self) -> list[str]:
        return [command for command, _ in self.told]


class TalkingQemu(FlagQemu):
    """VMs that run and take what they are told."""

    forward_port = 1

    def __init__(self) -> None:
        super().__init__()
        self.listener = Listener()

    def monitor(self, _vmid: int) -> Any:
        return self.listener

    def starts(self, client: Client) -> Listener:
        self.started[100] = 1.0
        self.listener.told.clear()
        return self.listener


@pytest.fixture
def qemu() -> TalkingQemu:
    return TalkingQemu()


@pytest.fixture
def client(tmp_path: Path, qemu: TalkingQemu) -> Iterator[Client]:
    node = make_node(tmp_path / "node", qemu)
    yield Client(node)
    node.stop()


def make_vm(client: Client, vmid: int = 100, **options: Any) -> None:
    given = {"name": "vm", "memory": 512, "scsi0": "local-lvm:1", "net0": "virtio,bridge=vmbr0", **options}
    client.do("POST", f"{N}/qemu", vmid=vmid, **given)


def put(client: Client, **fields: Any) -> Answer:
    return client.ask("PUT", f"{V}/config", fields)


def current(client: Client, vmid: int = 100) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"{N}/qemu/{vmid}/config", current=1)
    return found


def waiting(client: Client) -> dict[str, Any]:
    entries = client.get(f"{V}/pending")
    return {
        entry["key"]: entry.get("pending", entry.get("delete"))
        for entry in entries
        if entry.keys() & {"pending", "delete"}
    }


def as_root(client: Client, method: str, path: str, fields: dict[str, Any]) -> Answer:
    """By a ticket of root's, which may what no token may."""
    password = (client.node.home / "password").read_text().strip()
    login = client.ask("POST", "/access/ticket", {"username": "root@pam", "password": password}, headers={}).data
    headers = {"Cookie": f"PVEAuthCookie={login['ticket']}", "CSRFPreventionToken": login["CSRFPreventionToken"]}
    return client.ask(method, path, fields, headers=headers)


# Setting and deleting


@pytest.mark.parametrize(
    ("fields", "parameter", "fault"),
    [
        ({"delete": "cores", "cores": 2}, "delete", "you can't use '-cores' and -delete cores' at the same time"),
        ({"revert": "cores", "cores": 2}, "delete", "you can't use '-cores' and -revert cores' at the same time"),
        ({"revert": "kvm", "delete": "kvm"}, "revert", "you can't use '-delete kvm' and -revert kvm' at the same time"),
        ({"revert": "nope"}, "revert", "unknown option 'nope'"),
        ({"delete": "nope"}, "delete", "unknown option 'nope'"),
        ({"force": 1, "cores": 2}, "delete", "missing property - 'force' requires this property"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(client: Client, fields: dict[str, Any], parameter: str, fault: str) -> None:
    make_vm(client)
    before = client.get(f"{V}/config")
    answer = put(client, **fields)
    assert (answer.status, answer.json["errors"]) == (400, {parameter: fault})
    assert client.get(f"{V}/config") == before


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "no options specified"),
        ({"digest": "0" * 40}, "no options specified"),
        ({"balloon": 1024}, "balloon value too large (must be smaller than assigned memory)"),
        ({"boot": "order=scsi5"}, "invalid bootorder: device 'scsi5' does not exist'"),
        ({"boot": "order=scsi0", "delete": "scsi0"}, "invalid bootorder: device 'scsi0' does not exist'"),
        ({"sshkeys": "ssh-nope%20xx%20yy"}, "SSH public key validation error"),
        ({"hostpci0": "00:01.0"}, "only root can set 'hostpci0' config for non-mapped devices"),
        ({"usb0": "1234:5678"}, "only root can set 'usb0' config for real devices"),
        ({"usb0": "usb3=1"}, "either 'host' or 'mapping' must be set."),
        ({"serial0": "/dev/ttyS0"}, "only root can modify 'serial0' config for real devices"),
        ({"hookscript": "local:snippets/x.sh"}, "only root can set 'hookscript' config"),
        ({"hugepages": "2"}, "only root can set 'hugepages' config"),
        ({"delete": "lock"}, "only root can set 'lock' config"),
        ({"scsi1": "nope:1"}, "storage 'nope' does not exist"),
        ({"scsi1": "local:100/vm-100-disk-7.qcow2"}, "volume 'local:100/vm-100-disk-7.qcow2' does not exist"),
    ],
)
def test_what_is_refused_in_words(client: Client, fields: dict[str, Any], reason: str) -> None:
    make_vm(client)
    before = client.get(f"{V}/config")
    answer = put(client, **fields)
    assert (answer.status, answer.reason) == (500, reason)
    assert client.get(f"{V}/config") == before


def test_root_itself_may_all(client: Client) -> None:
    make_vm(client)
    given = {"hostpci0": "00:01.0", "serial0": "/dev/ttyS0", "hugepages": "2", "affinity": "0", "args": "-S"}
    assert as_root(client, "PUT", f"{V}/config", given).data is None
    assert given.items() <= client.get(f"{V}/config").items()
    assert as_root(client, "PUT", f"{V}/config", {"lock": "backup"}).data is None
    refused = as_root(client, "PUT", f"{V}/config", {"name": "x"})
    assert refused.reason == "VM is locked (backup)"
    assert as_root(client, "PUT", f"{V}/config", {"delete": "lock", "skiplock": 1}).data is None
    assert "lock" not in client.get(f"{V}/config")


def test_every_option_is_held(client: Client) -> None:
    given: dict[str, Any] = {
        "agent": "enabled=1,fstrim_cloned_disks=1,type=virtio", "balloon": 256, "cpulimit": 1.5, "cpuunits": 50,
        "keyboard": "de", "localtime": 1, "machine": "pc-i440fx-9.2+pve1", "migrate_downtime": 0.5, "numa": 1,
        "numa0": "cpus=0,memory=512", "rng0": "source=/dev/urandom", "startdate": "now", "tablet": 0, "vcpus": 1,
        "vga": "type=virtio,memory=32", "watchdog": "model=i6300esb,action=reset", "usb3": "spice",
        "virtiofs0": "shared", "spice_enhancements": "foldersharing=1", "ostype": "l26", "tags": "a;b",
        "audio0": "device=AC97,driver=none", "cpu": "x86-64-v3,flags=+aes;-pcid", "startup": "order=2,up=30",
    }  # fmt: skip
    make_vm(client)
    assert put(client, **{key: value for key, value in given.items() if key != "virtiofs0"}).data is None
    held = client.get(f"{V}/config")
    assert {key: held[key] for key in given if key != "virtiofs0"} == {
        key: value for key, value in given.items() if key != "virtiofs0"
    }
    names = ",".join(key for key in given if key != "virtiofs0")
    assert put(client, delete=names).data is None
    assert not given.keys() & client.get(f"{V}/config").keys()


def test_a_config_is_read_in_one_way_at_a_time(client: Client) -> None:
    make_vm(client)
    fault = "cannot use 'snapshot' parameter with 'current'"
    answer = client.ask("GET", f"{V}/config", {"snapshot": "s1", "current": 1})
    assert answer.json["errors"] == {"snapshot": fault, "current": fault}


def test_a_password_is_kept_as_its_hash(client: Client) -> None:
    make_vm(client, ide2="local:cloudinit", cipassword="secret")
    stored = client.node.state.configs.load(100).values["cipassword"]
    assert stored == sha256_crypt("secret", stored.split("$")[2])
    assert client.get(f"{V}/config")["cipassword"] == "**********"
    assert f"password: {stored}" in client.get(f"{V}/cloudinit/dump", type="user")
    assert hashed(stored) == stored
    assert sha256_crypt("pä ss" * 20, "abcdefgh") == "$5$abcdefgh$ac1C/1O2/J34SpXIZy3d64QV72I6JeaAZ/B.Zo9phu6"


def test_a_change_in_the_background(client: Client) -> None:
    make_vm(client)
    assert client.ask("POST", f"{V}/config", {"cores": 2, "background_delay": 20}).data is None
    answer = client.ask("POST", f"{V}/config", {"scsi1": "local:1,format=vmdk", "background_delay": 20})
    assert answer.reason == "failed to update VM 100: unsupported format 'vmdk'"
    assert client.get(f"{V}/config")["cores"] == 2


def test_protection_keeps_disks(client: Client) -> None:
    make_vm(client)
    put(client, delete="scsi0")
    put(client, scsi1="local:1", protection=1)
    for name, what in (("scsi1", "drive 'scsi1'"), ("unused0", "unused disk 'local-lvm:vm-100-disk-0'")):
        answer = client.ask("PUT", f"{V}/unlink", {"idlist": name, "force": 1})
        assert answer.reason == f"can't remove {what} - protection mode enabled"


# What a running VM takes


def test_a_running_vm_takes_some_at_once(client: Client, qemu: TalkingQemu) -> None:
    make_vm(client, cores=2, vcpus=1, agent=1)
    listener = qemu.starts(client)
    given = {"name": "new", "onboot": 1, "tags": "x", "shares": 500, "cpulimit": 1, "agent": "1,fstrim_cloned_disks=1"}
    assert put(client, **given, memory=1024, cores=4, ostype="l26").data is None
    assert given.items() <= {**current(client), "cpulimit": 1}.items()
    assert waiting(client) == {"memory": "1024", "cores": 4, "ostype": "l26"}
    assert listener.told == []
    assert put(client, balloon=256).data is None
    assert listener.told == [("balloon", {"value": 256 << 20})]
    assert put(client, delete="balloon", revert="memory,cores,ostype").data is None
    assert listener.told[-1] == ("balloon", {"value": 512 << 20})
    assert waiting(client) == {}


def test_processors_are_plugged_where_hotplug_says_so(client: Client, qemu: TalkingQemu) -> None:
    make_vm(client, cores=4, vcpus=1)
    listener = qemu.starts(client)
    put(client, vcpus=2)
    assert waiting(client) == {"vcpus": 2}
    put(client, hotplug="disk,cpu", vcpus=3)
    assert waiting(client) == {}
    assert listener.devices >= {"cpu2", "cpu3"}
    answer = put(client, vcpus=5)
    assert answer.json["errors"] == {"vcpus": "hotplug problem - maximum vcpus is limited by sockets and cores"}


def test_cards_come_change_and_go(client: Client, qemu: TalkingQemu) -> None:
    make_vm(client)
    listener = qemu.starts(client)
    mac = current(client)["net0"]
    put(client, net0=f"{mac.replace('vmbr0', 'vmbr1')},link_down=1,firewall=1,rate=5")
    assert listener.told == [("set_link", {"name": "net0", "up": False})]
    listener.told.clear()
    put(client, net1="e1000=BC:24:11:00:00:01,bridge=vmbr0")
    assert listener.names() == ["netdev_add", "device_add", "set_link"]
    device = listener.told[1][1]
    assert (device["bus"], device["addr"], device["mac"]) == ("pci.0", "0x13", "BC:24:11:00:00:01")
    put(client, net1="virtio=BC:24:11:00:00:01,bridge=vmbr0")
    assert listener.names()[3:] == ["device_del", "netdev_del", "netdev_add", "device_add", "set_link"]
    put(client, net9="virtio,bridge=vmbr0")  # on a bus that this start did not make
    assert waiting(client).keys() == {"net9"}
    put(client, delete="net1,net9")
    assert "net1" not in listener.devices
    assert waiting(client) == {}
    listener.refuses = "device_add"
    answer = put(client, net2="virtio,bridge=vmbr0")
    reason = "hotplug problem - VM 100 qmp command 'device_add' failed - no"
    assert (answer.status, answer.json["errors"]) == (400, {"net2": reason})
    assert waiting(client).keys() == {"net2"}
    assert listener.told[-1] == ("netdev_del", {"id": "net2"})


def test_disks_come_and_go_on_buses_that_can(client: Client, qemu: TalkingQemu) -> None:
    make_vm(client, scsihw="virtio-scsi-pci", ide2="none,media=cdrom")
    listener = qemu.starts(client)
    listener.devices.add("scsihw0")
    put(client, scsi1="local:1", sata0="local:1")
    assert listener.names() == ["blockdev-add", "device_add"]
    assert listener.told[1][1]["lun"] == 1
    assert waiting(client).keys() == {"sata0"}
    put(client, revert="sata0")
    assert current(client)["unused0"].startswith("local:100/")
    put(client, scsi1=current(client)["scsi1"].partition(",")[0] + ",backup=0")
    assert waiting(client) == {}
    put(client, scsi1=current(client)["scsi1"].partition(",")[0] + ",discard=on")
    assert waiting(client).keys() == {"scsi1"}
    put(client, delete="scsi1")
    assert current(client)["unused1"].startswith("local:100/")
    listener.told.clear()
    iso = client.node.state.disks.path("local:iso/t.iso", must_exist=False)
    iso.write_bytes(b"x" * 4096)
    put(client, ide2="local:iso/t.iso,media=cdrom")
    assert listener.names()[-1] == "blockdev-close-tray"
    assert "blockdev-insert-medium" in listener.names()
    put(client, hotplug="network")
    put(client, delete="scsi0", force=1)
    assert waiting(client)["scsi0"] == 2
    qemu.started.clear()
    put(client, onboot=1)
    assert "local-lvm:vm-100-disk-0" not in current(client).values()
    assert client.get(f"{N}/storage/local-lvm/content") == []


def test_the_cloudinit_drive_of_a_running_vm_is_exchanged(client: Client, qemu: TalkingQemu) -> None:
    make_vm(client, ide2="local:cloudinit", ciuser="lab")
    client.do("POST", f"{V}/status/start")
    qemu.listener.told.clear()
    put(client, ciuser="other")
    assert client.get(f"{V}/cloudinit") == [{"key": "ciuser", "value": "lab", "pending": "other"}]
    assert client.ask("PUT", f"{V}/cloudinit").data is None
    assert client.get(f"{V}/cloudinit") == [{"key": "ciuser", "value": "other"}]
    assert qemu.listener.names()[-2:] == ["blockdev-insert-medium", "blockdev-close-tray"]
    put(client, hotplug="cloudinit", ciuser="third")
    assert waiting(client) == {}
    second = put(client, ide3="local:cloudinit")
    assert second.reason == "ide3 - cloud-init drive is already attached at 'ide2'"


def test_keys_and_the_monitor(client: Client, qemu: TalkingQemu) -> None:
    make_vm(client)
    assert client.ask("PUT", f"{V}/sendkey", {"key": "ret"}).reason == "VM 100 not running"
    qemu.starts(client)
    assert client.ask("PUT", f"{V}/sendkey", {"key": "ctrl-alt-0x53"}).data is None
    keys = [{"type": "qcode", "data": "ctrl"}, {"type": "qcode", "data": "alt"}, {"type": "number", "data": 0x53}]
    assert qemu.agent_calls == [f"press 100 {keys}"]
    for name in ("-", "0xzz"):
        assert client.ask("PUT", f"{V}/sendkey", {"key": name}).status == 400
    assert client.ask("POST", f"{V}/monitor", {"command": "info status"}).data == "VM status: running\r\n"
    assert client.ask("POST", f"{V}/migrate", {"target": "pvetest"}).json["errors"] == {
        "target": "target is local node."
    }
    assert client.ask("POST", f"{V}/migrate", {"target": "other"}).reason == "no such cluster node 'other'"
    told = client.get(f"{V}/migrate")
    assert (told["running"], [disk["drivename"] for disk in told["local_disks"]]) == (1, ["scsi0"])
    for name in ("dbus-vmstate", "mtunnel", "remote_migrate"):
        assert client.ask("POST", f"{V}/{name}", {}).status == 501


# Who may


def test_each_option_wants_its_privilege(client: Client) -> None:
    make_vm(client)
    make_vm(client, 101)
    privileges = "VM.Config.Memory,VM.Config.Disk,VM.Audit"
    assert client.ask("POST", "/access/roles", {"roleid": "Tuner", "privs": privileges}).data is None
    assert client.ask("POST", "/access/users", {"userid": "joe@pve", "password": "long enough"}).data is None
    for path in ("/vms/100", "/vms/101"):
        assert client.ask("PUT", "/access/acl", {"path": path, "users": "joe@pve", "roles": "Tuner"}).data is None
    login = client.ask("POST", "/access/ticket", {"username": "joe@pve", "password": "long enough"}, headers={}).data
    headers = {"Cookie": f"PVEAuthCookie={login['ticket']}", "CSRFPreventionToken": login["CSRFPreventionToken"]}
    assert client.ask("PUT", f"{V}/config", {"memory": 768}, headers=headers).data is None
    for fields, missing in (
        ({"cores": 2}, "(/vms/100, VM.Config.CPU)"),
        ({"delete": "name"}, "(/vms/100, VM.Config.Options)"),
        ({"ciuser": "x"}, "(/vms/100, VM.Config.Cloudinit|VM.Config.Network)"),
        ({"ide2": "none,media=cdrom"}, "(/vms/100, VM.Config.CDROM)"),
        ({"scsi1": "local:1"}, "(/storage/local, Datastore.AllocateSpace)"),
        ({"scsi1": "local-lvm:vm-101-disk-0"}, "(/storage/local-lvm, Datastore.Audit)"),
    ):
        answer = client.ask("PUT", f"{V}/config", fields, headers=headers)
        assert (answer.status, answer.reason) == (403, f"Permission check failed {missing}")
    move = client.ask("POST", f"{V}/move_disk", {"disk": "scsi0", "storage": "local"}, headers=headers)
    assert move.reason == "Permission check failed (/storage/local, Datastore.AllocateSpace)"
    assert client.ask("POST", f"{N}/qemu", {"vmid": 102}, headers=headers).status == 403
    acl = {"path": "/vms/101", "users": "joe@pve", "roles": "Tuner", "delete": 1}
    assert client.ask("PUT", "/access/acl", acl).data is None
    listed = client.ask("GET", f"{N}/qemu", headers=headers).data
    assert [vm["vmid"] for vm in listed] == [100]


# Disks that move


def test_a_disk_moves_to_another_storage(client: Client) -> None:
    make_vm(client, scsi1="local:1")
    only = "only configured disks can be moved to another storage"
    for fields, reason in (
        ({"disk": "scsi1", "storage": "local"}, "you can't move to the same storage with same format"),
        ({"disk": "scsi5", "storage": "local"}, "disk 'scsi5' does not exist"),
        ({"disk": "unused0", "storage": "local"}, f"cannot move disk 'unused0', {only}"),
        ({"disk": "scsi0", "storage": "nope"}, "storage 'nope' does not exist"),
        ({"disk": "scsi0", "storage": "local", "digest": "0" * 40}, "checksum mismatch (file change by other user?)"),
    ):  # fmt: skip
        assert client.ask("POST", f"{V}/move_disk", fields).reason == reason
    for fields in ({"disk": "scsi0"}, {"disk": "scsi0", "storage": "local", "target-vmid": 101}):
        assert set(client.ask("POST", f"{V}/move_disk", fields).json["errors"]) == {"storage", "target-vmid"}
    client.do("POST", f"{V}/move_disk", disk="scsi0", storage="local")
    config = current(client)
    assert config["scsi0"] == "local:100/vm-100-disk-1.qcow2,size=1G"
    assert config["unused0"] == "local-lvm:vm-100-disk-0"
    client.do("POST", f"{V}/move_disk", disk="scsi0", storage="local", format="raw", delete=1)
    assert current(client)["scsi0"] == "local:100/vm-100-disk-2.raw,size=1G"
    volids = {each["volid"] for each in client.get(f"{N}/storage/local/content")}
    assert volids == {"local:100/vm-100-disk-0.qcow2", "local:100/vm-100-disk-2.raw"}
    client.do("POST", f"{N}/qemu", vmid=102, scsi0="local:1")
    client.do("POST", f"{N}/qemu/102/snapshot", snapname="s1")
    refused = client.ask("POST", f"{N}/qemu/102/move_disk", {"disk": "scsi0", "storage": "local-lvm", "delete": 1})
    assert refused.reason == "you can't move a disk with snapshots and delete the source"


def test_a_suspended_vm_forgets_its_state(client: Client) -> None:
    make_vm(client)
    state = client.node.state
    config = state.configs.load(100)
    volid = state.disks.allocate("local", 100, size=1 << 20, name="vm-100-state-suspend-2026-01-01", format="raw")
    config.values |= {"lock": "suspended", "vmstate": volid, "runningmachine": "pc-i440fx-7.2", "runningcpu": "max"}
    state.configs.save(100, config)
    assert put(client, memory=768).reason == "VM is locked (suspended)"
    assert put(client, delete="vmstate").data is None
    assert not {"lock", "vmstate", "runningmachine", "runningcpu"} & current(client).keys()
    assert client.get(f"{N}/storage/local/content") == []


@pytest.mark.parametrize("storage", ["local", "local-lvm"])
def test_a_disk_is_given_to_another_vm(client: Client, qemu: TalkingQemu, storage: str) -> None:
    make_vm(client, scsi0=f"{storage}:1", boot="order=scsi0;net0")
    make_vm(client, 101, scsi0=f"{storage}:1")
    give = {"disk": "scsi0", "target-vmid": 101}
    for fields, reason in (
        ({"target-vmid": 102}, "could not find target VM 102"),
        ({}, "Target disk key 'scsi0' is already in use for VM '101'"),
        ({"disk": "scsi5", "target-disk": "scsi3"}, "Disk 'scsi5' for VM '100' does not exist"),
        ({"target-disk": "scsi3", "target-digest": "0" * 40}, "VM 101: checksum mismatch (file change by other user?)"),
    ):
        assert client.ask("POST", f"{V}/move_disk", {**give, **fields}).reason == reason
    same = client.ask("POST", f"{V}/move_disk", {**give, "target-vmid": 100})
    assert same.json["errors"] == {"target-vmid": "must be different than source VMID to reassign disk"}
    upid = client.ask("POST", f"{V}/move_disk", {**give, "target-disk": "sata1"}).data
    assert client.end_of(upid) == "OK", client.log(upid)
    assert ":qmmove:100-scsi0>101-sata1:" in upid
    source, taker = current(client), current(client, 101)
    assert ("scsi0" not in source, source["boot"]) == (True, "order=net0")
    name = "101/vm-101-disk-1.qcow2" if storage == "local" else "vm-101-disk-1"
    assert taker["sata1"] == f"{storage}:{name},size=1G"
    qemu.started[101] = 1.0
    refused = client.ask("POST", f"{N}/qemu/101/move_disk", {"disk": "sata1", "target-vmid": 100})
    assert refused.reason == "Cannot move disk to another VM while the source VM is running - detach first"


def test_a_disk_is_made_of_another_vms(client: Client) -> None:
    make_vm(client)
    make_vm(client, 101, scsi0="local:0,import-from=local-lvm:vm-100-disk-0,format=raw")
    assert current(client, 101)["scsi0"] == "local:101/vm-101-disk-0.raw,size=1G"
    answer = client.ask("POST", f"{N}/qemu", {"vmid": 102, "scsi0": "local:1,import-from=local-lvm:vm-100-disk-0"})
    assert "'import-from' requires special syntax" in answer.json["errors"]["scsi0"]


def test_firmware_disks_need_their_programs(
    client: Client, qemu: TalkingQemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_vm(client)
    monkeypatch.setattr(firmware, "_FOLDERS", (tmp_path,))
    absent = put(client, efidisk0="local:1,efitype=4m,format=raw")
    assert absent.reason == "efidisk0: OVMF is not installed on this node; run: apt install ovmf"
    assert client.get(f"{N}/storage/local/content") == []
    (tmp_path / "OVMF_CODE_4M.fd").write_bytes(b"code")
    (tmp_path / "OVMF_VARS_4M.fd").write_bytes(b"VARS".ljust(firmware.VARIABLES_BYTES, b"\xff"))
    put(client, efidisk0="local:1,efitype=4m,format=raw")
    assert current(client)["efidisk0"] == "local:100/vm-100-disk-0.raw,efitype=4m,size=528K"
    paths = {"efidisk0": client.node.state.disks.path("local:100/vm-100-disk-0.raw")}
    assert paths["efidisk0"].read_bytes().startswith(b"VARS\xff")
    chips = " ".join(firmware.arguments({"bios": "ovmf"}, paths))
    assert f'"filename": "{tmp_path}/OVMF_CODE_4M.fd"' in chips
    assert "pflash1=drive-efidisk0" in chips
    assert "snapshot=on" in " ".join(firmware.arguments({"bios": "ovmf"}, {}))
    put(client, delete="efidisk0", force=1)
    put(client, tpmstate0="local:1,version=v2.0", bios="ovmf")
    assert current(client)["tpmstate0"] == "local:100/vm-100-disk-0.qcow2,size=4M,version=v2.0"
    client.do("DELETE", V)
    assert client.get(f"{N}/storage/local/content") == []


# Pools


def test_a_pool_is_joined_and_left(client: Client) -> None:
    assert client.ask("POST", "/pools", {"poolid": "lab"}).data is None
    absent = "Permission check failed (pool 'nope' does not exist)"
    assert client.ask("POST", f"{N}/qemu", {"vmid": 100, "pool": "nope"}).reason == absent
    make_vm(client, pool="lab")
    assert client.ask("POST", f"{V}/clone", {"newid": 101, "pool": "nope"}).reason == absent
    client.do("POST", f"{V}/clone", newid=101, pool="lab", full=1)
    access = client.node.state.access
    assert (access.pool_of(100), access.pool_of(101)) == ("lab", "lab")
    client.do("DELETE", f"{N}/qemu/101", purge=1)
    assert access.pool_of(101) is None
    status = client.run("POST", f"{N}/qemu", vmid=102, pool="lab", scsi0="local:1,format=vmdk")
    assert status == "unable to create VM 102 - unsupported format 'vmdk'"
    assert access.pool_of(102) is None
