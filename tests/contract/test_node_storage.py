"""Storages over HTTP with real images: their configuration, volumes, uploads, and what is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from autovibe.node.disks import Disks
from tests.contract.node_parts import Answer, Client

N = "/nodes/pvetest"
L = f"{N}/storage/local"
MIB = 1 << 20


def root(client: Client) -> Path:
    return client.node.home / "storage"


def faults(answer: Answer) -> Any:
    assert answer.status == 400, (answer.status, answer.reason)
    return answer.json["errors"]


def upload(client: Client, content: str, name: str, data: bytes, storage: str = "local", **fields: str) -> Answer:
    body = b""
    for key, value in {"content": content, **fields}.items():
        body += f'--b0\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
    place = name.replace('"', '\\"')
    body += f'--b0\r\nContent-Disposition: form-data; name="filename"; filename="{place}"\r\n'.encode()
    body += b"Content-Type: application/octet-stream\r\n\r\n" + data + b"\r\n--b0--\r\n"
    headers = {"Authorization": client.authorization, "Content-Type": "multipart/form-data; boundary=b0"}
    return client.ask("POST", f"{N}/storage/{storage}/upload", body=body, headers=headers)


def image(path: Path, *options: str, size: str = "1M") -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), size], check=True)
    return path


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    def full(path: Any) -> os.statvfs_result:
        values = list(real(path))
        values[4] = 10
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", full)


def leftovers(client: Client) -> list[str]:
    found = [*root(client).rglob("partial-*"), *(client.node.home / "uploads").iterdir()]
    return [str(path) for path in found]


class TestConfiguration:
    """`/storage`"""

    def add(self, client: Client, name: str = "data", **fields: Any) -> Answer:
        given = {"type": "dir", "path": str(root(client) / name), "content": "images,iso", **fields}
        return client.ask("POST", "/storage", {"storage": name, **given})

    def test_what_a_fresh_node_has(self, client: Client) -> None:
        found = {storage["storage"]: storage for storage in client.get("/storage")}
        assert found["local"]["path"] == str(root(client) / "local")
        assert (found["local-lvm"]["vgname"], found["local-lvm"]["thinpool"]) == ("pve", "data")
        assert [storage["storage"] for storage in client.get("/storage", type="lvmthin")] == ["local-lvm"]
        assert client.ask("GET", "/storage/nope").reason == "storage 'nope' does not exist"

    def test_the_recorded_change(self, client: Client) -> None:
        content = "iso,import,images,rootdir,vztmpl,backup,snippets"
        assert client.ask("PUT", "/storage/local", {"content": content}).data == {"storage": "local", "type": "dir"}
        assert client.get("/storage/local")["content"] == content

    def test_a_new_directory_holds_disks(self, client: Client, tmp_path: Path) -> None:
        assert self.add(client).data == {"storage": "data", "type": "dir"}
        client.do("POST", f"{N}/qemu", vmid=100, scsi0="data:1", scsi1="data:1,format=raw")
        assert client.get(f"{N}/qemu/100/config")["scsi0"].startswith("data:100/vm-100-disk-0.qcow2")
        client.do("POST", f"{N}/qemu/100/clone", newid=101, full=1, storage="data")
        client.do("POST", f"{N}/qemu/101/template")
        client.do("POST", f"{N}/qemu/101/clone", newid=102)
        listed = {volume["volid"] for volume in client.get(f"{N}/storage/data/content", vmid=102)}
        assert "data:101/base-101-disk-0.qcow2/102/vm-102-disk-0.qcow2" in listed
        client.do("POST", f"{N}/qemu", vmid=103, scsi0="data:1")
        client.do("POST", f"{N}/qemu/103/snapshot", snapname="s1")
        client.do("POST", f"{N}/qemu/103/snapshot/s1/rollback")
        assert client.end_of(upload(client, "iso", "t.iso", b"x" * 4096, "data").data) == "OK"
        assert (root(client) / "data" / "template" / "iso" / "t.iso").stat().st_size == 4096
        again = Disks(root(client))
        assert {volume.volid for volume in again.volumes("data")} == {
            volume["volid"] for volume in client.get(f"{N}/storage/data/content")
        }
        client.do("DELETE", f"{N}/qemu/102")
        assert client.get(f"{N}/storage/data/content", vmid=102) == []

    @pytest.mark.parametrize(
        "path",
        ["/srv/x", "{root}/../x", "{root}", "{root}/local/images", "{root}/local-lvm", "{root}/.x", "{home}/tasks"],
    )
    def test_a_directory_lies_below_the_others(self, client: Client, path: str) -> None:
        path = path.format(root=root(client), home=client.node.home)
        answer = self.add(client, path=path)
        assert answer.reason.startswith("create storage failed: unable to activate storage 'data' - directory '")
        assert client.ask("GET", "/storage/data").status == 500

    def test_a_link_is_no_directory(self, client: Client, tmp_path: Path) -> None:
        (root(client) / "data").symlink_to(tmp_path)
        assert self.add(client).status == 500

    def test_refusals(self, client: Client) -> None:
        assert self.add(client).status == 200
        assert self.add(client).reason == "create storage failed: storage ID 'data' already defined"
        assert self.add(client, "d2", vgname="pve").reason == "unexpected property 'vgname'"
        assert self.add(client, "d2", path=str(root(client) / "data" / "sub")).reason.endswith(
            "belongs to another storage"
        )
        missing = client.ask("POST", "/storage", {"storage": "d2", "type": "dir"})
        assert missing.reason == "missing value for required option 'path'"
        nfs = {"storage": "n1", "type": "nfs", "server": "192.0.2.1", "export": "/x"}
        assert client.ask("POST", "/storage", nfs).reason == "create storage failed: storage 'n1' is not online"
        thin = {"storage": "t1", "type": "lvmthin", "vgname": "pve", "thinpool": "other"}
        assert client.ask("POST", "/storage", thin).reason == "create storage failed: no such logical volume pve/other"
        fixed = client.ask("PUT", "/storage/data", {"delete": "path"})
        assert fixed.reason == "update storage failed: unable to delete required option 'path'"
        stale = client.ask("PUT", "/storage/data", {"disable": 1, "digest": "0" * 40})
        assert stale.reason.startswith("update storage failed: detected modified configuration")
        assert (
            client.ask("PUT", "/storage/nope", {"disable": 1}).reason
            == "update storage failed: storage 'nope' does not exist"
        )

    def test_content_decides_what_may_be_made(self, client: Client) -> None:
        assert self.add(client, content="snippets").status == 200
        refused = client.ask("POST", f"{N}/storage/data/content", {"vmid": 100, "filename": "", "size": "1M"})
        assert refused.reason == "storage 'data' does not support content type 'images'"
        assert upload(client, "iso", "t.iso", b"x", "data").reason == "storage 'data' does not support 'iso' content"
        assert client.end_of(upload(client, "snippets", "user.yaml", b"x", "data").data) == "OK"
        assert client.ask("PUT", "/storage/local", {"content": "iso,images"}).status == 200
        assert (
            upload(client, "snippets", "u.yaml", b"x").reason == "storage 'local' does not support 'snippets' content"
        )

    def test_a_disabled_storage_gives_nothing_out(self, client: Client) -> None:
        self.add(client)
        client.do("POST", f"{N}/qemu", vmid=100, scsi0="data:1")
        assert client.ask("PUT", "/storage/data", {"disable": 1}).status == 200
        listed = {storage["storage"]: storage for storage in client.get(f"{N}/storage")}
        assert (listed["data"]["enabled"], listed["data"]["active"], listed["data"]["total"]) == (0, 0, 0)
        assert "data" not in {storage["storage"] for storage in client.get(f"{N}/storage", enabled=1)}
        assert client.run("POST", f"{N}/qemu/100/status/start") == "storage 'data' is disabled"
        assert client.ask("POST", f"{N}/qemu", {"vmid": 101, "scsi0": "data:1"}).reason == "storage 'data' is disabled"
        assert len(client.get(f"{N}/storage/data/content")) == 1
        client.do("DELETE", f"{N}/qemu/100")
        assert client.ask("PUT", "/storage/data", {"delete": "disable", "nodes": "other"}).status == 200
        elsewhere = client.ask("POST", f"{N}/qemu", {"vmid": 101, "scsi0": "data:1"})
        assert elsewhere.reason == "storage 'data' is not available on node 'pvetest'"

    def test_a_storage_goes_and_comes_back_with_its_files(self, client: Client) -> None:
        """As in Proxmox, VMs on it do not keep it from going; and `local` is always there."""
        self.add(client)
        client.do("POST", f"{N}/qemu", vmid=100, scsi0="data:1")
        assert client.ask("DELETE", "/storage/data").data is None
        assert client.run("POST", f"{N}/qemu/100/status/start") == "storage 'data' does not exist"
        assert client.ask("DELETE", "/storage/data").reason == "delete storage failed: storage 'data' does not exist"
        self.add(client)
        client.do("POST", f"{N}/qemu/100/status/start")
        assert client.ask("DELETE", "/storage/local").data is None
        assert client.get("/storage/local")["type"] == "dir"
        assert client.ask("DELETE", "/storage/local-lvm").data is None
        thin = {"storage": "local-lvm", "type": "lvmthin", "vgname": "pve", "thinpool": "data"}
        assert client.ask("POST", "/storage", thin).status == 200
        client.do("POST", f"{N}/qemu", vmid=101, scsi0="local-lvm:1")

    def test_moving_a_disk_to_it(self, client: Client) -> None:
        self.add(client)
        client.do("POST", f"{N}/qemu", vmid=100, scsi0="local-lvm:1")
        client.do("POST", f"{N}/qemu/100/move_disk", disk="scsi0", storage="data", delete=1)
        assert client.get(f"{N}/qemu/100/config")["scsi0"].startswith("data:100/vm-100-disk-0.qcow2")
        assert client.get(f"{N}/storage/local-lvm/content") == []

    def test_preallocation(self, client: Client) -> None:
        self.add(client, preallocation="full", format="raw")
        made = client.ask("POST", f"{N}/storage/data/content", {"vmid": 100, "filename": "vm-100-a", "size": "2M"}).data
        found = client.get(f"{N}/storage/data/content/{made}")
        assert (found["format"], found["used"] >= 2 * MIB) == ("raw", True)
        sparse = client.ask("POST", f"{L}/content", {"vmid": 100, "filename": "vm-100-b.raw", "size": "2M"}).data
        assert client.get(f"{L}/content/{sparse}")["used"] < MIB

    def test_what_cannot_be_made_is_not_kept(self, client: Client) -> None:
        place = root(client) / "data" / "template"
        place.parent.mkdir()
        place.write_text("a file where a folder is needed")
        assert self.add(client).reason.startswith("create storage failed: unable to activate storage 'data'")
        assert [storage["storage"] for storage in client.get("/storage")] == ["local", "local-lvm"]

    def test_leftovers_go_at_the_next_start(self, client: Client) -> None:
        self.add(client)
        for folder in ("import", "template/iso", "snippets", "images"):
            (root(client) / "data" / folder / "partial-1").write_bytes(b"x")
        assert len(Disks(root(client)).recover()) == 4
        assert leftovers(client) == []

    def test_lists_by_what_is_asked_for(self, client: Client) -> None:
        assert [each["storage"] for each in client.get(f"{N}/storage", content="vztmpl,import")] == ["local"]
        local = client.get(f"{N}/storage", storage="local", format=1)[0]
        assert local["formats"] == {"supported": ["raw", "qcow2"], "default": "qcow2"}
        assert faults(client.ask("GET", f"{N}/storage", {"storage": "nope"})) == {"storage": "No such storage."}
        assert client.get(f"{N}/storage", target="other") == []


class TestVolumes:
    def test_made_of_a_size_and_a_name(self, client: Client) -> None:
        made = client.ask("POST", f"{L}/content", {"vmid": 100, "filename": "vm-100-disk-0.qcow2", "size": "2M"})
        assert made.data == "local:100/vm-100-disk-0.qcow2"
        found = client.get(f"{L}/content/{made.data}")
        assert (found["size"], found["format"]) == (2 * MIB, "qcow2")
        assert Path(found["path"]).is_file()
        small = client.ask(
            "POST", f"{N}/storage/local-lvm/content", {"vmid": 100, "filename": "vm-100-x", "size": "1024"}
        )
        assert small.data == "local-lvm:vm-100-x"
        assert client.get(f"{N}/storage/local-lvm/content/{small.data}")["size"] == MIB

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({"filename": "vm-100-disk-0.qcow2", "format": "raw"}, "different storage formats (raw != qcow2)"),
            ({"filename": "vm-101-disk-0.qcow2"}, "illegal name 'vm-101-disk-0.qcow2' - should be 'vm-100-*'"),
            ({"filename": "../vm-100-disk-0.qcow2"}, "illegal name '../vm-100-disk-0.qcow2' - should be 'vm-100-*'"),
            ({"filename": "vm-100-x", "format": "vmdk"}, "unsupported format 'vmdk'"),
            ({"filename": "vm-100-x.raw", "size": "0"}, "a volume's size must be positive"),
            ({"filename": "vm-100-x.raw", "size": "9999999999G"}, "not enough free space"),
        ],
    )
    def test_refused(self, client: Client, fields: dict[str, str], text: str) -> None:
        answer = client.ask("POST", f"{L}/content", {"vmid": 100, "size": "1M", **fields})
        assert answer.status in (400, 500)
        assert text in answer.json.get("message", "") + str(answer.json.get("errors"))
        assert client.get(f"{L}/content") == []

    def test_attributes_are_for_backups(self, client: Client) -> None:
        client.do("POST", f"{N}/qemu", vmid=100, scsi0="local:1", scsi1="local-lvm:1")
        on_dir = client.ask("PUT", f"{L}/content/local:100/vm-100-disk-0.qcow2", {"notes": "x"})
        assert on_dir.reason == "only backups support attribute 'notes'"
        on_lvm = client.ask("PUT", f"{N}/storage/local-lvm/content/vm-100-disk-0", {"protected": 1})
        assert on_lvm.reason == "attribute 'protected' is not supported for storage type 'lvmthin'"

    def test_copies(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        """Root's own ticket is needed, as for all methods without a permission in the schema."""
        client.do("POST", f"{N}/qemu", vmid=100, scsi0="local:1")
        password = (client.node.home / "password").read_text().strip()
        login = client.ask("POST", "/access/ticket", {"username": "root@pam", "password": password}, headers={}).data
        headers = {"Cookie": f"PVEAuthCookie={login['ticket']}", "CSRFPreventionToken": login["CSRFPreventionToken"]}
        at = f"{L}/content/local:100/vm-100-disk-0.qcow2"

        def copy(target: str) -> Answer:
            return client.ask("POST", at, {"target": target}, headers=headers)

        assert client.end_of(copy("100/vm-100-disk-7.raw").data) == "OK"
        assert client.end_of(copy("local-lvm:vm-100-disk-3").data) == "OK"
        assert client.get(f"{N}/storage/local-lvm/content", vmid=100)[0]["size"] == 1 << 30
        assert copy("100/vm-100-disk-7.raw").reason == "volume 'local:100/vm-100-disk-7.raw' already exists"
        assert "unable to parse" in copy("../x").reason
        assert leftovers(client) == []

    def test_a_base_with_clones_stays(self, client: Client) -> None:
        client.do("POST", f"{N}/qemu", vmid=100, scsi0="local:1")
        client.do("POST", f"{N}/qemu/100/template")
        client.do("POST", f"{N}/qemu/100/clone", newid=101)
        at = f"{L}/content/local:100/base-100-disk-0.qcow2"
        text = "base volume 'local:100/base-100-disk-0.qcow2' is still in use by linked cloned"
        assert client.run("DELETE", at) == text
        assert client.ask("DELETE", f"{at}?delay=30").reason == text
        clone = quote("local:100/base-100-disk-0.qcow2/101/vm-101-disk-0.qcow2", safe="")
        assert client.ask("DELETE", f"{L}/content/{clone}?delay=30").data is None
        assert client.ask("DELETE", f"{at}?delay=30").data is None
        assert client.get(f"{L}/content") == []

    def test_who_may_see_and_delete(self, client: Client) -> None:
        client.do("POST", f"{N}/qemu", vmid=100, scsi0="local:1")
        client.do("POST", f"{N}/qemu", vmid=101, scsi0="local:1")
        client.end_of(upload(client, "iso", "t.iso", b"x").data)
        assert client.ask("POST", "/access/users", {"userid": "joe@pve"}).status == 200
        token = client.ask("POST", "/access/users/joe@pve/token/t1", {"privsep": 0}).data
        for path, role in (("/storage/local", "PVEDatastoreUser"), ("/vms/101", "PVEVMAdmin")):
            assert client.ask("PUT", "/access/acl", {"path": path, "roles": role, "users": "joe@pve"}).status == 200
        joe = Client(client.node)
        joe.authorization = f"PVEAPIToken={token['full-tokenid']}={token['value']}"
        assert [each["storage"] for each in joe.get(f"{N}/storage")] == ["local"]
        assert [each["storage"] for each in joe.get("/storage")] == ["local"]
        assert {each["volid"] for each in joe.get(f"{L}/content")} == {
            "local:101/vm-101-disk-0.qcow2",
            "local:iso/t.iso",
        }
        hidden = joe.ask("GET", f"{L}/content/local:100/vm-100-disk-0.qcow2")
        assert (hidden.status, hidden.reason) == (403, "Permission check failed (/vms/100, VM.Config.Disk)")
        kept = joe.ask("DELETE", f"{L}/content/local:101/vm-101-disk-0.qcow2")
        assert (kept.status, kept.reason) == (403, "Permission check failed (/storage/local, Datastore.Allocate)")
        assert joe.ask("POST", "/storage", {"storage": "x1", "type": "dir", "path": "/x"}).status == 403

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(text=st.one_of(st.text(max_size=60), st.from_regex(r"(local:)?[a-z0-9/.-]{1,40}", fullmatch=True)))
    @example(text="local:100/../../../qemu-server/100.conf")
    @example(text="local:iso/..")
    @example(text="iso/%2e%2e/%2e%2e/password")
    @example(text="local:iso/a\nb.iso")
    @example(text="local:iso/$(id).iso")
    def test_no_volid_leads_out(self, client: Client, text: str) -> None:
        for method in ("GET", "DELETE"):
            answer = client.ask(method, f"{L}/content/{quote(text, safe='')}")
            if answer.status == 200 and answer.json["data"] is not None:
                assert not text.strip("/"), (text, answer.body)  # the list of all
            else:
                assert answer.status in (400, 500, 501), (text, answer.status)
        assert (client.node.home / "password").exists()


class TestUploads:
    @pytest.mark.parametrize(
        ("content", "name"),
        [
            ("iso", "t.iso"),
            ("iso", "T.ISO"),
            ("vztmpl", "debian-12.tar.zst"),
            ("snippets", "user.yaml"),
            ("import", "d.raw"),
        ],
    )
    def test_kinds(self, client: Client, content: str, name: str) -> None:
        data = os.urandom(5000)
        answer = upload(
            client, content, name, data, checksum=hashlib.sha512(data).hexdigest(), **{"checksum-algorithm": "sha512"}
        )
        assert client.end_of(answer.data) == "OK"
        listed = client.get(f"{L}/content", content=content)
        assert [(each["volid"], each["size"]) for each in listed] == [(f"local:{content}/{name}", 5000)]
        assert client.node.state.disks.path(listed[0]["volid"]).read_bytes() == data
        assert client.end_of(upload(client, content, name, b"y").data) == "OK"
        assert client.get(f"{L}/content", content=content)[0]["size"] == 1

    @pytest.mark.parametrize("name", ["t.txt", "iso", ".iso", "t.iso.", "t.qcow2"])
    def test_wrong_extensions(self, client: Client, name: str) -> None:
        assert upload(client, "iso", name, b"x").status == 400
        assert leftovers(client) == []

    @pytest.mark.parametrize(
        "name",
        [
            "a\tb.iso",
            "a'b.iso",
            "a$b.iso",
            "a;b.iso",
            "a|b.iso",
            "a`b`.iso",
            "ä.iso",
            "..iso",
            "a*.iso",
            "-a.iso",
            "a" * 252 + ".iso",
        ],
    )
    def test_names_that_are_refused(self, client: Client, name: str) -> None:
        assert "filename" in faults(upload(client, "iso", name, b"x"))
        assert leftovers(client) == []

    def test_a_wrong_checksum(self, client: Client) -> None:
        answer = upload(client, "iso", "t.iso", b"x", checksum="0" * 40, **{"checksum-algorithm": "sha1"})
        assert client.end_of(answer.data).startswith("checksum mismatch: got '11f6ad8e")
        assert leftovers(client) == []
        assert client.get(f"{L}/content") == []

    def test_hostile_images_get_no_place(self, client: Client, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_bytes(b"s" * MIB)
        backed = image(tmp_path / "a.qcow2", "-b", str(secret), "-F", "raw")
        data = image(tmp_path / "b.qcow2", "-o", f"data_file={tmp_path}/data,data_file_raw=on")
        vmdk = b'# Disk DescriptorFile\nversion=1\nRW 2048 FLAT "/etc/passwd" 0\n'
        for bytes_, text in (
            (backed.read_bytes(), "has a backing file"),
            (data.read_bytes(), "has an external data file"),
            (vmdk, "is not a qcow2 image"),
            (b"", "is not a qcow2 image"),
        ):
            assert text in client.end_of(upload(client, "import", "x.qcow2", bytes_).data)
        assert upload(client, "import", "x.vmdk", vmdk).json["errors"] == {
            "filename": "invalid filename or wrong extension"
        }
        assert client.get(f"{L}/content") == []
        assert leftovers(client) == []

    def test_a_full_disk(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        fill_disk(monkeypatch)
        assert upload(client, "iso", "t.iso", b"x").reason == "upload failed - No space left on device"
        assert leftovers(client) == []


@pytest.mark.parametrize(
    "path", ["GET prunebackups", "GET file-restore/list", "POST oci-registry-pull", "GET import-metadata"]
)
def test_what_the_node_lacks(client: Client, path: str) -> None:
    method, _, name = path.partition(" ")
    assert client.ask(method, f"{L}/{name}").status == 501
