"""Checkpoints over HTTP: manifests by pages, comparisons, summaries."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from uuid import UUID, uuid4

import pytest

from autovibe import schemas
from autovibe.domain import Checkpoint
from autovibe.hub import diffs
from autovibe.types import Change, CheckpointStatus, CheckpointType, Entry, EntryKind, MachineStatus
from tests.api.conftest import Served, error_of


def file(path: bytes, content: bytes = b"x", *, size: int | None = None, mode: int = 0o644, uid: int = 0) -> Entry:
    length = len(content) if size is None else size
    return Entry(
        path, EntryKind.file, mode, uid, 0, length, hashlib.sha256(content).digest(), b"", 1_700_000_000 * 10**9
    )


def directory(path: bytes) -> Entry:
    return Entry(path, EntryKind.directory, 0o755, 0, 0, 0, b"", b"", 0)


def checkpoint(served: Served, project: UUID, entries: Iterable[Entry] | None, **fields: object) -> UUID:
    """A ready checkpoint with that manifest, or one that has none yet."""
    row = Checkpoint(project_uuid=project, type=CheckpointType.manual, **fields)
    if entries is not None:
        root = served.hub.trees.write(entries)
        row.root_digest, row.times_digest = root.digest, root.times
        row.file_count, row.size_bytes = root.file_count, root.size_bytes
        row.status = CheckpointStatus.ready
    with served.hub.store.transaction() as session:
        session.add(row)
    return row.uuid


def test_a_checkpoint_is_shown_without_and_with_its_manifest(served: Served) -> None:
    link = Entry(b"/workspace/z", EntryKind.symlink, 0o777, 0, 0, 0, b"", b"/etc/passwd", 0)
    entries = [
        directory(b"/workspace"),
        file(b"/workspace/a", b"abc", mode=0o4755, uid=7),
        file(b"/workspace/\xff"),
        link,
    ]
    uuid = checkpoint(served, served.project(), sorted(entries), vmid=9001, snapshot=f"av-{uuid4()}")
    plain = served.get(f"/checkpoints/{uuid}").json()
    assert plain["manifest"] is None
    assert (plain["file_count"], plain["size_bytes"], plain["size_mb"]) == (2, 4, 0.0)
    assert plain["proxmox_snapshot_id"].startswith("av-")
    manifest = served.get(f"/checkpoints/{uuid}", include="manifest").json()["manifest"]
    assert manifest["/workspace/a"] == {
        "size": 3,
        "sha256": hashlib.sha256(b"abc").hexdigest(),
        "kind": "file",
        "mode": "4755",
        "uid": 7,
        "gid": 0,
        "mtime": "2023-11-14T22:13:20Z",
        "target": None,
        "path_base64": None,
    }
    assert manifest["/workspace/\\xff"]["path_base64"] == base64.b64encode(b"/workspace/\xff").decode()
    assert manifest["/workspace/z"]["target"] == "/etc/passwd"
    error_of(served.get(f"/checkpoints/{uuid}", include="everything"), 400, "INVALID_REQUEST")


def test_a_manifest_comes_in_pages(served: Served) -> None:
    entries = [directory(b"/srv"), *(file(b"/srv/%04d" % i) for i in range(250)), file(b"/workspace/a")]
    uuid = checkpoint(served, served.project(), entries)
    seen: list[str] = []
    cursor: str | None = None
    while True:
        given = {"cursor": cursor} if cursor else {}
        page = served.get(f"/checkpoints/{uuid}", include="manifest", limit=100, **given).json()
        seen += page["manifest"]
        assert len(page["manifest"]) <= 100
        if (cursor := page["manifest_next"]) is None:
            break
    assert len(seen) == len(set(seen))
    assert {"/srv/0000", "/srv/0249", "/workspace/a"} <= set(seen)
    below = served.get(f"/checkpoints/{uuid}", include="manifest", path="/workspace").json()
    assert "/workspace/a" in below["manifest"]
    assert not any(path.startswith("/srv") for path in below["manifest"])
    for bad in ("!!", "abc", "é"):
        error_of(served.get(f"/checkpoints/{uuid}", include="manifest", cursor=bad), 400, "INVALID_REQUEST")
    creating = checkpoint(served, served.project(), None)
    error_of(served.get(f"/checkpoints/{creating}", include="manifest"), 409, "CONFLICT")


def test_checkpoints_of_a_project_are_listed_by_type(served: Served) -> None:
    project = served.project()
    made = [checkpoint(served, project, [file(b"/srv/a")], label=f"l{i}") for i in range(3)]
    page = schemas.CheckpointPage.model_validate(served.get(f"/projects/{project}/checkpoints", limit=2).json())
    assert [c.uuid for c in page.checkpoints] == [made[2], made[1]]
    assert (page.total_count, page.has_more, page.next_offset) == (4, True, 2)
    genesis = served.get(f"/projects/{project}/checkpoints", type="genesis").json()
    assert [c["type"] for c in genesis["checkpoints"]] == ["genesis"]
    error_of(served.get(f"/projects/{project}/checkpoints", type="weekly"), 400, "INVALID_REQUEST")


def test_two_checkpoints_are_compared(served: Served) -> None:
    project = served.project()
    old = [
        directory(b"/workspace"),
        file(b"/workspace/b", b"b", mode=0o600),
        file(b"/workspace/gone", b"same content"),
        directory(b"/workspace/src"),
        file(b"/workspace/src/1", b"1"),
        file(b"/workspace/src/2", b"2"),
    ]
    new = [
        directory(b"/workspace"),
        file(b"/workspace/a\xfe", b"new"),
        file(b"/workspace/b", b"b", mode=0o644, uid=1),
        directory(b"/workspace/src"),
        file(b"/workspace/src/1", b"one"),
        file(b"/workspace/src/2", b"two"),
        file(b"/workspace/src/moved", b"same content"),
    ]
    base, target = checkpoint(served, project, old), checkpoint(served, project, new)
    diff = schemas.Diff.model_validate(served.get(f"/checkpoints/{base}/diff/{target}").json())
    assert (diff.base, diff.target, diff.is_cross_project) == (base, target, False)
    assert [entry.path for entry in diff.added] == ["/workspace/a\\xfe", "/workspace/src/moved"]
    assert diff.added[0].path_base64 == base64.b64encode(b"/workspace/a\xfe").decode()
    assert [entry.path for entry in diff.deleted] == ["/workspace/gone"]
    assert [(change.path, change.what) for change in diff.modified] == [
        ("/workspace/b", ["mode", "owner"]),
        ("/workspace/src/1", ["content"]),
        ("/workspace/src/2", ["content"]),
    ]
    assert [(r.old_path, r.new_path) for r in diff.renamed] == [("/workspace/gone", "/workspace/src/moved")]
    assert diff.total_changes == 6
    assert diff.summary == "6 changes: 2 added, 3 modified, 1 deleted (+7 B)"
    back = schemas.Diff.model_validate(served.get(f"/checkpoints/{target}/diff/{base}").json())
    assert [entry.path for entry in back.added] == ["/workspace/gone"]
    same = served.get(f"/checkpoints/{base}/diff/{base}").json()
    assert (same["total_changes"], same["summary"], same["added"]) == (0, "No changes", [])
    foreign = checkpoint(served, served.project(), old)
    assert served.get(f"/checkpoints/{base}/diff/{foreign}").json()["is_cross_project"] is True
    error_of(served.get(f"/checkpoints/{base}/diff/{uuid4()}"), 404, "NOT_FOUND")
    error_of(served.get(f"/checkpoints/{base}/diff/{checkpoint(served, project, None)}"), 409, "CONFLICT")


def added(path: bytes, size: int = 1) -> Change:
    return Change(path, None, file(path, size=size))


@pytest.mark.parametrize(
    ("changes", "summary"),
    [
        ([], "No changes"),
        ([added(b"/w/a", 3)], "1 change: 1 added, 0 modified, 0 deleted (+3 B)"),
        (
            [
                *(added(b"/w/src/%d" % i, 1000) for i in range(9)),
                added(b"/w/README"),
                added(b"/w/doc/a"),
                added(b"/w/doc/b"),
            ],
            "12 changes: 12 added, 0 modified, 0 deleted (+9.0 KB); mostly src/ (9)",
        ),
        (
            [
                Change(b"/w/a", file(b"/w/a", size=5_000_000), None),
                Change(b"/w/b", file(b"/w/b"), file(b"/w/b", b"yy")),
            ],
            "2 changes: 0 added, 1 modified, 1 deleted (-5.0 MB)",
        ),
        (
            [added(b"/etc/a"), added(b"/etc/b"), added(b"/srv/c")],
            "3 changes: 3 added, 0 modified, 0 deleted (+3 B); mostly /etc/ (2)",
        ),
        (
            [added(b"/w/\x1b[2J\n/a"), added(b"/w/\x1b[2J\n/b"), added(b"/w/c")],
            r"3 changes: 3 added, 0 modified, 0 deleted (+3 B); mostly \x1b[2J\n/ (2)",
        ),
    ],
)
def test_the_summary_is_one_stable_line(changes: list[Change], summary: str) -> None:
    assert diffs.summary(changes) == summary


def test_a_checkpoint_says_why_it_was_made_and_what_its_machine_was_about(served: Served) -> None:
    machine = served.machine(
        name=f"m-{uuid4().hex[:6]}", prompt="echo 1\n" + "x" * 500, status=MachineStatus.working, progress="half way"
    )
    name = served.get(f"/machines/{machine}").json()["name"]
    made = served.post(f"/machines/{machine}/checkpoint", {"context": "c0ffee", "description": "before the test"})
    assert made.status_code == 201, made.text
    shown = schemas.Checkpoint.model_validate(served.get(f"/checkpoints/{made.json()['uuid']}").json())
    assert (shown.context, shown.description, shown.machine_uuid) == ("c0ffee", "before the test", machine)
    assert shown.metadata["trigger"] == "request"
    assert shown.metadata["actor"] == "operator"
    assert shown.metadata["machine"] == {
        "name": name,
        "type": "shell",
        "status": "working",
        "prompt": "echo 1\n" + "x" * 193,
        "exit_status": None,
        "progress": "half way",
    }
