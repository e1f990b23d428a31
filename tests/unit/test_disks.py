"""The node's disks, on real qcow2 files: what a guest would read at each place of a tree of snapshots and clones.

A disk's content is told apart by a pattern written at a place of its own (`qemu-io`), as a guest's writes would be.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from autovibe.node.disks import DiskError, Disks
from autovibe.node.disks.volume import format_of, is_written

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    return Disks(tmp_path)


def write(disks: Disks, volid: str, place: int, value: int) -> None:
    """Write a pattern into the 64 KiB numbered `place`, as a guest would."""
    path = disks.path(volid)
    command = f"write -q -P {value} {place * 65536} 65536"
    subprocess.run(["qemu-io", "-f", format_of(path), "-c", command, str(path)], check=True, capture_output=True)


def content(path: Path) -> dict[int, int]:
    """The places of an image that hold a pattern, read through its chain by qemu-img itself."""
    with tempfile.NamedTemporaryFile() as target:
        argv = ["qemu-img", "convert", "-U", "-f", format_of(path), "-O", "raw", str(path), target.name]
        subprocess.run(argv, check=True)
        raw = Path(target.name).read_bytes()
    return {place: raw[place * 65536] for place in range(len(raw) // 65536) if raw[place * 65536]}


def read(disks: Disks, volid: str) -> dict[int, int]:
    return content(disks.path(volid))


def layers(disks: Disks, tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "local-lvm" / "layers").iterdir())


def silent(_line: str) -> None:
    pass


@pytest.fixture(params=["local", "local-lvm"])
def volid(request: pytest.FixtureRequest, disks: Disks) -> str:
    """A volume of either storage with 1 at place 0."""
    made = disks.allocate(request.param, 100, size=SIZE)
    write(disks, made, 0, 1)
    return made


class TestNames:
    def test_volids_have_the_recorded_forms(self, disks: Disks) -> None:
        assert disks.allocate("local", 100, size=SIZE) == "local:100/vm-100-disk-0.qcow2"
        assert disks.allocate("local", 100, size=SIZE) == "local:100/vm-100-disk-1.qcow2"
        assert disks.allocate("local", 100, size=SIZE, format="raw") == "local:100/vm-100-disk-2.raw"
        assert disks.allocate("local-lvm", 100, size=SIZE) == "local-lvm:vm-100-disk-0"
        assert disks.allocate("local-lvm", 100, size=SIZE) == "local-lvm:vm-100-disk-1"
        base = disks.make_base("local:100/vm-100-disk-0.qcow2")
        assert base == "local:100/base-100-disk-0.qcow2"
        assert disks.clone(base, 301, snapshot=None) == "local:100/base-100-disk-0.qcow2/301/vm-301-disk-0.qcow2"
        second = disks.make_base("local:100/base-100-disk-0.qcow2/301/vm-301-disk-0.qcow2")
        assert second == "local:100/base-100-disk-0.qcow2/301/base-301-disk-0.qcow2"
        assert disks.clone(second, 302, snapshot=None) == "local:301/base-301-disk-0.qcow2/302/vm-302-disk-0.qcow2"
        assert [volume.volid for volume in disks.volumes("local", vmid=301)] == [second]
        thin_base = disks.make_base("local-lvm:vm-100-disk-0")
        assert thin_base == "local-lvm:base-100-disk-0"
        assert disks.clone(thin_base, 301, snapshot=None) == "local-lvm:vm-301-disk-0"

    def test_cloudinit_volumes(self, disks: Disks) -> None:
        made = disks.allocate("local", 100, size=SIZE, name="vm-100-cloudinit", format="qcow2")
        assert made == "local:100/vm-100-cloudinit.qcow2"
        made = disks.allocate("local-lvm", 100, size=SIZE, name="vm-100-cloudinit")
        assert made == "local-lvm:vm-100-cloudinit"
        assert disks.path(made).suffix == ".raw"
        assert disks.size(made) == SIZE
        disks.snapshot(made, "s1", monitor=None)  # nothing to keep: made anew at every start
        disks.rollback(made, "s1")
        copied = disks.copy(made, 200, storage="local-lvm", snapshot=None, format=None, progress=silent, monitor=None)
        assert copied == "local-lvm:vm-200-cloudinit"

    @pytest.mark.parametrize(
        "volid",
        [
            "",
            "local",
            "local:",
            "nowhere:100/vm-100-disk-0.qcow2",
            "local:../../etc/passwd",
            "local:100/../../../etc/passwd",
            "local:100/vm-100-disk-0.qcow2/../../x",
            "local:100/vm-101-disk-0.qcow2",
            "local:100/vm-100-..qcow2",
            "local:100/vm-100-disk-0.qcow2\n",
            "local:100/vm-100-disk-0.qcow2\0",
            "local:100/.vm-100-disk-0.qcow2",
            "local:099/vm-099-disk-0.qcow2",
            "local:iso/../import/x.qcow2",
            "local:iso//etc/passwd.iso",
            "local:iso/.hidden.iso",
            "local:import/x.vmdk",
            "local:snippets/x",
            "local:/etc/passwd",
            "/etc/passwd",
            "local-lvm:../vm-100-disk-0",
            "local-lvm:vm-100-disk-0/../../x",
            "local-lvm:vm-100-",
            "local-lvm:vm-100-x/y",
            "local-lvm:100/vm-100-disk-0",
            "local-lvm:vm-1-disk-0",
        ],
    )
    def test_hostile_volids_are_refused(self, disks: Disks, volid: str) -> None:
        for call in (disks.path, disks.free, disks.make_base, disks.size):
            with pytest.raises(DiskError):
                call(volid)
        with pytest.raises(DiskError):
            disks.path(volid) if not volid.startswith("local:") else disks.path(volid, must_exist=False)

    @given(st.text(max_size=60))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
    def test_no_text_leads_out_of_the_root(self, tmp_path: Path, text: str) -> None:
        disks = Disks(tmp_path)
        for storage in ("local", "local-lvm"):
            with contextlib.suppress(DiskError):
                path = disks.path(f"{storage}:{text}", must_exist=False)
                assert os.path.realpath(path).startswith(f"{tmp_path}/")

    def test_a_symlink_is_no_volume(self, disks: Disks, tmp_path: Path) -> None:
        (tmp_path / "local/template/iso/x.iso").symlink_to("/etc/passwd")
        with pytest.raises(DiskError, match="does not exist"):
            disks.path("local:iso/x.iso")
        assert disks.volumes("local") == []

    def test_names_of_another_vm_are_refused(self, disks: Disks) -> None:
        for storage in ("local", "local-lvm"):
            with pytest.raises(DiskError, match="illegal name"):
                disks.allocate(storage, 100, size=SIZE, name="vm-200-disk-0")

    def test_names_are_not_given_twice(self, disks: Disks) -> None:
        found: list[str] = []
        threads = [
            threading.Thread(target=lambda storage=storage: found.append(disks.allocate(storage, 100, size=SIZE)))
            for storage in ("local", "local-lvm") * 4
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == 8


class TestEitherStorage:
    def test_listing(self, disks: Disks, volid: str) -> None:
        storage = volid.partition(":")[0]
        [volume] = disks.volumes(storage, content="images", vmid=100)
        assert (volume.volid, volume.size, volume.vmid, volume.parent) == (volid, SIZE, 100, None)
        assert volume.format == ("qcow2" if storage == "local" else "raw")
        assert volume.used > 65536
        assert disks.volumes(storage, vmid=101) == []
        assert disks.volumes(storage, content="iso") == []

    def test_status(self, disks: Disks) -> None:
        local, lvm = disks.statuses()
        assert (local["storage"], local["type"], lvm["storage"], lvm["type"]) == (
            "local",
            "dir",
            "local-lvm",
            "lvmthin",
        )
        assert 0 < local["avail"] <= local["total"]
        assert "import" in local["content"]
        assert lvm["content"] == "images,rootdir"

    def test_rollback_goes_anywhere_in_the_tree(self, disks: Disks, volid: str) -> None:
        disks.snapshot(volid, "one", monitor=None)
        write(disks, volid, 1, 2)
        disks.snapshot(volid, "two", monitor=None)
        write(disks, volid, 2, 3)
        disks.rollback(volid, "one")
        assert read(disks, volid) == {0: 1}
        write(disks, volid, 3, 4)
        disks.snapshot(volid, "three", monitor=None)
        disks.rollback(volid, "two")
        assert read(disks, volid) == {0: 1, 1: 2}
        disks.rollback(volid, "three")
        assert read(disks, volid) == {0: 1, 3: 4}
        assert sorted(disks.snapshots(volid)) == ["one", "three", "two"]

    def test_deleting_snapshots_keeps_the_disk(self, disks: Disks, volid: str) -> None:
        for number in range(1, 5):
            disks.snapshot(volid, f"s{number}", monitor=None)
            write(disks, volid, number, number + 1)
        for name in ("s2", "s1", "s4"):
            disks.delete_snapshot(volid, name, monitor=None)
            assert read(disks, volid) == {0: 1, 1: 2, 2: 3, 3: 4, 4: 5}
        disks.rollback(volid, "s3")
        assert read(disks, volid) == {0: 1, 1: 2, 2: 3}
        assert disks.snapshots(volid) == ["s3"]

    def test_snapshot_errors(self, disks: Disks, volid: str) -> None:
        disks.snapshot(volid, "one", monitor=None)
        with pytest.raises(DiskError, match="already exists"):
            disks.snapshot(volid, "one", monitor=None)
        for call in (lambda name: disks.delete_snapshot(volid, name, monitor=None), lambda n: disks.rollback(volid, n)):
            with pytest.raises(DiskError, match="does not exist"):
                call("other")
        for name in ("", "-l", "1a", "a b", "a" * 41, "../x", "ä"):
            with pytest.raises(DiskError, match="invalid snapshot name"):
                disks.snapshot(volid, name, monitor=None)
        disks.snapshot(volid, "av-" + "0" * 36, monitor=None)

    def test_full_copies(self, disks: Disks, volid: str) -> None:
        disks.snapshot(volid, "one", monitor=None)
        write(disks, volid, 1, 2)
        lines: list[str] = []
        for storage in ("local", "local-lvm"):
            for snapshot, expected in ((None, {0: 1, 1: 2}), ("one", {0: 1})):
                made = disks.copy(
                    volid, 200, storage=storage, snapshot=snapshot, format=None, progress=lines.append, monitor=None
                )
                assert read(disks, made) == expected
                assert disks.size(made) == SIZE
        assert lines[-1] == "transferred 4.0 MiB of 4.0 MiB (100.00%)"
        with pytest.raises(DiskError, match="does not exist"):
            disks.copy(volid, 200, storage="local", snapshot="no", format=None, progress=silent, monitor=None)
        with pytest.raises(DiskError, match="unsupported format"):
            disks.copy(volid, 200, storage="local-lvm", snapshot=None, format="qcow2", progress=silent, monitor=None)

    def test_resize(self, disks: Disks, volid: str) -> None:
        disks.snapshot(volid, "small", monitor=None)
        disks.resize(volid, 2 * SIZE, monitor=None)
        assert disks.size(volid) == 2 * SIZE
        write(disks, volid, 100, 9)
        with pytest.raises(DiskError, match="shrinking disks is not supported"):
            disks.resize(volid, SIZE, monitor=None)
        disks.rollback(volid, "small")
        assert disks.size(volid) == SIZE
        assert read(disks, volid) == {0: 1}

    def test_linked_clones_of_a_base(self, disks: Disks, volid: str) -> None:
        base = disks.make_base(volid)
        clones = [disks.clone(base, 300 + number, snapshot=None) for number in range(3)]
        for number, clone in enumerate(clones):
            write(disks, clone, 1, 10 + number)
        assert [read(disks, clone) for clone in clones] == [{0: 1, 1: 10 + number} for number in range(3)]
        with pytest.raises(DiskError, match=f"base volume '{base}' is still in use by linked cloned"):
            disks.free(base)
        for clone in clones:
            disks.free(clone)
        disks.free(base)
        assert disks.volumes(base.partition(":")[0]) == []

    def test_a_disk_that_is_no_base_is_not_linked(self, disks: Disks, volid: str) -> None:
        with pytest.raises(DiskError, match="Linked clone feature is not supported"):
            disks.clone(volid, 300, snapshot=None)

    def test_freeing_removes_every_file(self, disks: Disks, volid: str, tmp_path: Path) -> None:
        disks.snapshot(volid, "one", monitor=None)
        disks.free(volid)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        with pytest.raises(DiskError):
            disks.free(volid)

    def test_a_full_disk_is_noticed_before(self, disks: Disks, volid: str, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.statvfs

        def full(path: Path) -> os.statvfs_result:
            values = list(real(path))
            values[4] = 10
            return os.statvfs_result(values)

        monkeypatch.setattr(os, "statvfs", full)
        with pytest.raises(DiskError, match="not enough free space on storage"):
            disks.copy(volid, 200, storage="local", snapshot=None, format=None, progress=silent, monitor=None)
        with pytest.raises(DiskError, match="not enough free space"):
            disks.snapshot(volid, "one", monitor=None)


def test_features_as_each_type_answers(disks: Disks) -> None:
    """As with Proxmox: linked from a snapshot only on lvmthin, rbd, btrfs; the recorded dir has snapshot and copy."""

    def ask(volid: str, snapshot: str | None) -> list[str]:
        names = ("snapshot", "clone", "copy")
        return [name for name in names if disks.has_feature(volid, name, snapshot=snapshot, is_running=False)]

    local, lvm = disks.allocate("local", 100, size=SIZE), disks.allocate("local-lvm", 100, size=SIZE)
    assert ask(local, None) == ["snapshot", "copy"]
    assert ask(local, "s1") == ["snapshot", "copy"]
    assert ask(lvm, None) == ["snapshot", "copy"]
    assert ask(lvm, "s1") == ["clone", "copy"]
    assert ask(disks.make_base(local), None) == ["clone", "copy"]
    assert ask(disks.make_base(lvm), None) == ["clone", "copy"]
    raw = disks.allocate("local", 100, size=SIZE, format="raw")
    assert ask(raw, None) == ["copy"]
    with pytest.raises(DiskError, match="not available"):
        disks.snapshot(raw, "s1", monitor=None)


class TestThin:
    @pytest.fixture
    def volid(self, disks: Disks) -> str:
        made = disks.allocate("local-lvm", 100, size=SIZE)
        write(disks, made, 0, 1)
        return made

    def test_linked_clone_of_a_snapshot(self, disks: Disks, volid: str) -> None:
        disks.snapshot(volid, "one", monitor=None)
        write(disks, volid, 1, 2)
        clone = disks.clone(volid, 200, snapshot="one")
        assert read(disks, clone) == {0: 1}
        write(disks, clone, 2, 3)
        disks.snapshot(clone, "own", monitor=None)
        grandchild = disks.clone(clone, 300, snapshot="own")
        assert read(disks, grandchild) == {0: 1, 2: 3}
        assert read(disks, volid) == {0: 1, 1: 2}
        assert [volume.parent for volume in disks.volumes("local-lvm")] == [
            None,
            "local-lvm:vm-100-disk-0@one",
            "local-lvm:vm-200-disk-0@own",
        ]

    def test_the_origin_may_go_before_its_clones(self, disks: Disks, volid: str, tmp_path: Path) -> None:
        disks.snapshot(volid, "one", monitor=None)
        write(disks, volid, 1, 2)
        first, second = (disks.clone(volid, vmid, snapshot="one") for vmid in (200, 300))
        disks.free(volid)
        assert len(layers(disks, tmp_path)) == 3  # the shared one, and a top each
        assert read(disks, first) == read(disks, second) == {0: 1}
        disks.free(first)
        assert len(layers(disks, tmp_path)) == 1  # merged: nobody else needed it
        assert read(disks, second) == {0: 1}

    def test_deleted_snapshots_are_merged_or_removed(self, disks: Disks, volid: str, tmp_path: Path) -> None:
        disks.snapshot(volid, "one", monitor=None)
        write(disks, volid, 1, 2)
        disks.snapshot(volid, "two", monitor=None)
        assert len(layers(disks, tmp_path)) == 3
        disks.delete_snapshot(volid, "one", monitor=None)
        assert len(layers(disks, tmp_path)) == 2
        disks.rollback(volid, "two")
        disks.delete_snapshot(volid, "two", monitor=None)
        assert len(layers(disks, tmp_path)) == 1
        assert read(disks, volid) == {0: 1, 1: 2}

    def test_a_zero_written_over_data_survives_the_merge(self, disks: Disks, volid: str) -> None:
        disks.snapshot(volid, "one", monitor=None)
        path = disks.path(volid)
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -z 0 64k", str(path)], check=True)
        disks.snapshot(volid, "two", monitor=None)
        disks.delete_snapshot(volid, "one", monitor=None)
        disks.delete_snapshot(volid, "two", monitor=None)
        assert read(disks, volid) == {}

    def test_a_grown_disk_survives_the_merge(self, disks: Disks, volid: str) -> None:
        disks.snapshot(volid, "one", monitor=None)
        disks.resize(volid, 2 * SIZE, monitor=None)
        write(disks, volid, 100, 7)
        disks.snapshot(volid, "two", monitor=None)
        disks.delete_snapshot(volid, "one", monitor=None)
        disks.delete_snapshot(volid, "two", monitor=None)
        assert (read(disks, volid), disks.size(volid)) == ({0: 1, 100: 7}, 2 * SIZE)

    def test_a_layer_in_use_is_merged_later(self, disks: Disks, volid: str, tmp_path: Path) -> None:
        disks.snapshot(volid, "one", monitor=None)
        write(disks, volid, 1, 2)
        with held_open(disks.path(volid)):
            assert is_written(disks.path(volid))
            disks.delete_snapshot(volid, "one", monitor=None)  # no monitor: as if another VM's
            assert len(layers(disks, tmp_path)) == 2
            for call in (lambda: disks.snapshot(volid, "later", monitor=None), lambda: disks.make_base(volid)):
                with pytest.raises(DiskError, match="in use by a running VM"):
                    call()
        assert not is_written(disks.path(volid))
        assert any("merged" in line for line in disks.recover())
        assert len(layers(disks, tmp_path)) == 1
        assert read(disks, volid) == {0: 1, 1: 2}

    def test_an_unreadable_header_stops_collecting(self, disks: Disks, volid: str, tmp_path: Path) -> None:
        """Its backing file is unknown, so any layer might be it."""
        disks.snapshot(volid, "one", monitor=None)
        (tmp_path / "local-lvm/layers/strange.qcow2").write_bytes(b"x" * 200)
        disks.delete_snapshot(volid, "one", monitor=None)
        assert disks.snapshots(volid) == []
        assert len(layers(disks, tmp_path)) == 3


@contextlib.contextmanager
def held_open(path: Path) -> Iterator[None]:
    """A process that has the image open for writing, as a running VM has."""
    process = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("write -P 0 128k 512\n")
    process.stdin.flush()
    while "wrote" not in process.stdout.readline():
        pass
    try:
        yield
    finally:
        process.kill()
        process.communicate()


class TestImport:
    @staticmethod
    def image(path: Path, *options: str) -> Path:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), "1M"], check=True)
        return path

    def test_imports(self, disks: Disks, tmp_path: Path) -> None:
        source = self.image(tmp_path / "local/import/x.qcow2")
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 5 0 64k", str(source)], check=True)
        assert disks.path("local:import/x.qcow2") == source
        raw = tmp_path / "y.raw"
        raw.write_bytes(b"\x05" * 65536 + bytes(MIB - 65536))
        for storage in ("local", "local-lvm"):
            for each in (source, raw):
                lines: list[str] = []
                made = disks.import_image(storage, 100, each, progress=lines.append)
                assert read(disks, made) == {0: 5}
                assert lines[-1] == "transferred 1.0 MiB of 1.0 MiB (100.00%)"
        assert [volume.format for volume in disks.volumes("local", content="import")] == ["qcow2"]

    def test_hostile_images_are_refused(self, disks: Disks, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_bytes(b"s" * MIB)
        backed = self.image(tmp_path / "a.qcow2", "-b", str(secret), "-F", "raw")
        data = self.image(tmp_path / "b.qcow2", "-o", f"data_file={tmp_path}/data,data_file_raw=on")
        disguised = tmp_path / "c.qcow2"
        disguised.write_bytes(secret.read_bytes())
        vmdk = tmp_path / "d.vmdk"
        vmdk.write_text('# Disk DescriptorFile\nRW 2048 FLAT "secret" 0\n')
        giant = self.image(tmp_path / "f.qcow2")
        with giant.open("r+b") as file:
            file.seek(24)
            file.write(struct.pack(">Q", 1 << 60))
        encrypted = self.image(tmp_path / "g.qcow2")
        with encrypted.open("r+b") as file:
            file.seek(32)
            file.write(struct.pack(">I", 2))
        qed = tmp_path / "h.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qed", str(qed), "1M"], check=True)
        described = tmp_path / "i.qcow2"
        described.write_text('json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}')
        truncated = tmp_path / "e.qcow2"
        truncated.write_bytes(b"QFI\xfb" + struct.pack(">I", 3) + bytes(500))
        for source, text in (
            (backed, "backing file"),
            (data, "external data file"),
            (disguised, "not a qcow2 image"),
            (vmdk, "neither qcow2 nor raw"),
            (truncated, "failed"),
            (giant, "claims a size of 1048576.0 TiB, which is too large"),
            (encrypted, "is encrypted"),
            (qed, "not a qcow2 image"),
            (described, "not a qcow2 image"),
            (tmp_path / "missing.qcow2", "cannot be read"),
        ):
            with pytest.raises(DiskError, match=text):
                disks.import_image("local-lvm", 100, source, progress=silent)
        assert disks.volumes("local-lvm") == []
        assert layers(disks, tmp_path) == []

    def test_a_raw_disk_that_looks_like_qcow2_stays_raw(self, disks: Disks, tmp_path: Path) -> None:
        """A guest may write any header into its disk; it must never make the host open the file it names."""
        source = self.image(tmp_path / "x.qcow2")
        raw = source.rename(tmp_path / "x.raw")
        made = disks.import_image("local", 100, raw, progress=silent)
        assert raw.stat().st_size <= disks.size(made) < raw.stat().st_size + 512 < MIB

    def test_a_raw_disk_that_looks_like_vmdk_stays_raw(self, disks: Disks, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_bytes(b"s" * MIB)
        raw = tmp_path / "x.raw"
        raw.write_bytes(f'# Disk DescriptorFile\nversion=1\nRW 2048 FLAT "{secret}" 0\n'.encode().ljust(65536, b"\0"))
        made = disks.import_image("local-lvm", 100, raw, progress=silent)
        assert disks.size(made) == 65536

    def test_an_import_stops_when_the_disk_fills(
        self, disks: Disks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A few compressed bytes may become gigabytes: space is looked at while the copy runs, too."""
        source, real, asked = self.image(tmp_path / "x.qcow2"), os.statvfs, [0]

        def filling(path: Path) -> os.statvfs_result:
            values = list(real(path))
            asked[0] += 1
            if asked[0] > 1:
                values[4] = 10
            return os.statvfs_result(values)

        monkeypatch.setattr(os, "statvfs", filling)
        with pytest.raises(DiskError, match="not enough free space"):
            disks.import_image("local-lvm", 100, source, progress=silent)
        assert layers(disks, tmp_path) == []

    def test_a_stopped_import_leaves_nothing(self, disks: Disks, tmp_path: Path) -> None:
        source = self.image(tmp_path / "x.qcow2")

        def stop(_line: str) -> None:
            raise InterruptedError

        with pytest.raises(InterruptedError):
            disks.import_image("local-lvm", 100, source, progress=stop)
        assert layers(disks, tmp_path) == []


KILL = """
import os, signal, sys
from pathlib import Path
from autovibe.node.disks import qemu_img, volume
from autovibe.node.disks import Disks

root, place, *call = sys.argv[1:]
calls = 0

def dying(real):
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == int(place):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    return call

for name in ("rename", "replace", "unlink"):
    setattr(Path, name, dying(getattr(Path, name)))
os.fsync = dying(os.fsync)
qemu_img.subprocess.Popen.__init__ = dying(qemu_img.subprocess.Popen.__init__)
disks = Disks(Path(root))
getattr(disks, call[0])(*eval(call[1]), **eval(call[2]))
"""


class TestCrash:
    """The node is killed before each rename, unlink, fsync and program that an operation makes."""

    @pytest.mark.parametrize(
        ("call", "arguments", "keywords"),
        [
            ("allocate", ("local-lvm", 100), {"size": SIZE}),
            ("snapshot", ("local-lvm:vm-100-disk-0", "new"), {"monitor": None}),
            ("delete_snapshot", ("local-lvm:vm-100-disk-0", "one"), {"monitor": None}),
            ("delete_snapshot", ("local-lvm:vm-100-disk-0", "two"), {"monitor": None}),
            ("rollback", ("local-lvm:vm-100-disk-0", "one"), {}),
            ("clone", ("local-lvm:vm-100-disk-0", 300), {"snapshot": "two"}),
            ("free", ("local-lvm:vm-100-disk-0",), {}),
            ("free", ("local-lvm:vm-200-disk-0",), {}),
            ("allocate", ("local", 100), {"size": SIZE}),
        ],
    )
    def test_recover_mends(
        self, tmp_path: Path, call: str, arguments: tuple[object, ...], keywords: dict[str, object]
    ) -> None:
        prepared = tmp_path / "prepared"
        disks = Disks(prepared)
        disk = disks.allocate("local-lvm", 100, size=SIZE)
        write(disks, disk, 0, 1)
        disks.snapshot(disk, "one", monitor=None)
        write(disks, disk, 1, 2)
        clone = disks.clone(disk, 200, snapshot="one")
        write(disks, clone, 5, 6)
        disks.snapshot(disk, "two", monitor=None)
        write(disks, disk, 2, 3)
        for place in range(1, 40):
            root = shutil.copytree(prepared, tmp_path / str(place))
            argv = [sys.executable, "-c", KILL, str(root), str(place), call, repr(arguments), repr(keywords)]
            ended = subprocess.run(argv, check=False, capture_output=True, text=True)
            assert ended.returncode in (0, -9), ended.stderr
            self.check(root, call, str(arguments[0]))
            if ended.returncode == 0:
                return
        pytest.fail("the operation has no end")

    @staticmethod
    def check(root: Path, call: str, volid: str) -> None:
        disks = Disks(root)
        disks.recover()
        assert disks.recover() == []  # there is nothing left to mend
        found = {volume.volid: volume for volume in disks.volumes("local-lvm")}
        disk, clone = "local-lvm:vm-100-disk-0", "local-lvm:vm-200-disk-0"
        if disk in found:
            assert read(disks, disk) in ({0: 1, 1: 2, 2: 3}, *([{0: 1}] if call == "rollback" else []))
            for name, expected in (("one", {0: 1}), ("two", {0: 1, 1: 2})):
                if name in disks.snapshots(disk):
                    assert read(disks, disks.clone(disk, 999, snapshot=name)) == expected
                    disks.free("local-lvm:vm-999-disk-0")
        else:
            assert (call, volid) == ("free", disk)
        if clone in found:
            assert read(disks, clone) == {0: 1, 5: 6}
        else:
            assert (call, volid) == ("free", clone)
        for volume in (*disks.volumes("local-lvm"), *disks.volumes("local")):
            disks.free(volume.volid)
        assert not [path for path in root.rglob("*") if path.is_file()]

    @pytest.mark.parametrize("switched", [True, False])
    def test_a_snapshot_of_a_running_vm_is_finished_or_undone(
        self, disks: Disks, tmp_path: Path, switched: bool
    ) -> None:
        """The node died between telling QEMU and writing it down; QEMU's lock tells which file it writes to."""
        disk = disks.allocate("local-lvm", 100, size=SIZE)
        write(disks, disk, 0, 1)
        top = disks.path(disk)
        disks.snapshot(disk, "kept", monitor=None)
        new = disks.path(disk)
        record = tmp_path / "local-lvm/volumes/vm-100-disk-0.json"
        value = json.loads(record.read_text())
        value |= {"top": top.name, "snapshots": {}, "pending": ["kept", new.name]}
        record.write_text(json.dumps(value))
        with held_open(new if switched else top):
            done = disks.recover()
        assert disks.path(disk) == (new if switched else top)
        assert disks.snapshots(disk) == (["kept"] if switched else [])
        assert any(("finished" if switched else "undid") in line for line in done)

    def test_half_made_files_are_removed(self, disks: Disks, tmp_path: Path) -> None:
        (tmp_path / "local-lvm/layers/partial-1.qcow2").write_bytes(b"x")
        (tmp_path / "local/images/partial-2.qcow2").write_bytes(b"x")
        assert len(disks.recover()) == 2
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


class Tree(RuleBasedStateMachine):
    """Any order of operations on thin volumes, against a model that keeps each disk's content in a dictionary."""

    make: Callable[[], Path]

    def __init__(self) -> None:
        super().__init__()
        self.root = type(self).make()
        self.disks = Disks(self.root)
        self.model: dict[str, dict[int, int]] = {}
        self.kept: dict[str, dict[str, dict[int, int]]] = {}
        self.count = 100

    def one(self, number: int) -> str:
        return sorted(self.model)[number % len(self.model)]

    @precondition(lambda self: len(self.model) < 2)
    @rule()
    def allocate(self) -> None:
        self.count += 1
        volid = self.disks.allocate("local-lvm", self.count, size=MIB)
        self.model[volid], self.kept[volid] = {}, {}

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 9), place=st.integers(0, 3), value=st.integers(1, 255))
    def write(self, number: int, place: int, value: int) -> None:
        volid = self.one(number)
        write(self.disks, volid, place, value)
        self.model[volid] = self.model[volid] | {place: value}

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 9))
    def snapshot(self, number: int) -> None:
        volid = self.one(number)
        self.count += 1
        self.disks.snapshot(volid, f"s{self.count}", monitor=None)
        self.kept[volid][f"s{self.count}"] = self.model[volid]

    @precondition(lambda self: any(self.kept.values()))
    @rule(number=st.integers(0, 9), what=st.sampled_from(["rollback", "delete", "clone"]))
    def use_snapshot(self, number: int, what: str) -> None:
        volid, name = sorted((volid, name) for volid, names in self.kept.items() for name in names)[
            number % sum(map(len, self.kept.values()))
        ]
        if what == "rollback":
            self.disks.rollback(volid, name)
            self.model[volid] = self.kept[volid][name]
        elif what == "delete":
            self.disks.delete_snapshot(volid, name, monitor=None)
            del self.kept[volid][name]
        else:
            self.count += 1
            made = self.disks.clone(volid, self.count, snapshot=name)
            self.model[made], self.kept[made] = self.kept[volid][name], {}

    @precondition(lambda self: len(self.model) > 2)
    @rule(number=st.integers(0, 9))
    def free(self, number: int) -> None:
        volid = self.one(number)
        self.disks.free(volid)
        del self.model[volid], self.kept[volid]

    @invariant()
    def disks_read_as_the_model(self) -> None:
        for volid, expected in self.model.items():
            assert read(self.disks, volid) == expected
        tops = len(self.model)
        named = sum(map(len, self.kept.values()))
        assert len(list((self.root / "local-lvm/layers").iterdir())) <= 2 * (tops + named)  # branches at most double it


def test_any_order_of_operations(tmp_path: Path) -> None:
    roots = iter(range(10_000))
    machine = type("Machine", (Tree,), {"make": staticmethod(lambda: tmp_path / str(next(roots)))})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=8, stateful_step_count=20, deadline=None, derandomize=True)
    )
