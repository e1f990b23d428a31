"""Manifest trees, on both databases: what is written is read, differences are exact, damage is found."""

from __future__ import annotations

import hashlib
import itertools
import random
import threading
from collections.abc import Iterable

import pytest
from sqlalchemy import text

from autovibe.errors import InternalError, InvalidRequest, NotFound
from autovibe.store import Store, nodes
from autovibe.store.trees import EMPTY_ROOT, EMPTY_TIMES, Trees
from autovibe.types import Change, Entry, EntryKind

F, D, L = EntryKind.file, EntryKind.directory, EntryKind.symlink


def file(path: bytes, content: bytes = b"", *, mode: int = 0o644, uid: int = 0, mtime_ns: int = 5) -> Entry:
    return Entry(path, F, mode, uid, 0, len(content), hashlib.sha256(content).digest(), b"", mtime_ns)


def directory(path: bytes, *, mode: int = 0o755, mtime_ns: int = 6) -> Entry:
    return Entry(path, D, mode, 0, 0, 0, b"", b"", mtime_ns)


def link(path: bytes, target: bytes) -> Entry:
    return Entry(path, L, 0o777, 0, 0, 0, b"", target, 7)


def plain(entry: Entry | None) -> Entry | None:
    return entry and entry._replace(mtime_ns=0)


def expected(base: Iterable[Entry], target: Iterable[Entry]) -> list[Change]:
    """The difference by the definition."""
    old, new = ({entry.path: plain(entry) for entry in side} for side in (base, target))
    paths = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    return [Change(path, old.get(path), new.get(path)) for path in paths]


@pytest.fixture
def trees(store: Store) -> Trees:
    return Trees(store)


SOME = [
    directory(b"/etc"),
    file(b"/etc/hosts", b"localhost"),
    directory(b"/workspace"),
    directory(b"/workspace/a"),
    directory(b"/workspace/a/deep"),
    file(b"/workspace/a/deep/x", b"x", mtime_ns=-(2**62)),
    link(b"/workspace/a/link", b"../elsewhere"),
    file(b"/workspace/a-b", b"between 'a' and 'a/'"),
    file(b"/workspace/b", b""),
    directory(b"/workspace/empty"),
    Entry(b"/workspace/fifo", EntryKind.fifo, 0o600, 1, 2, 0, b"", b"", 1),
    Entry(b"/workspace/unreadable", F, 0o000, 0, 0, 12, b"", b"", 1),
    file(b"/workspace/\xff\xfe\nnot utf-8", b"odd"),
]


def test_what_is_written_is_read(trees: Trees) -> None:
    root = trees.write(SOME)
    assert trees.entries(root.digest, root.times) == sorted(SOME)
    assert trees.entries(root.digest) == [entry._replace(mtime_ns=0) for entry in sorted(SOME)]
    files = [entry for entry in SOME if entry.kind == F]
    assert (root.file_count, root.size_bytes) == (len(files), sum(entry.size for entry in files))
    assert trees.write(SOME) == root
    assert trees.verify(root.digest, root.times) == []


def test_every_depth_first_order_gives_the_same_tree(trees: Trees) -> None:
    root = trees.write(SOME)
    assert trees.write(sorted(SOME)) == root  # by path
    assert trees.write(sorted(SOME, key=lambda entry: entry.path.split(b"/"))) == root  # by names
    listed_first = sorted(SOME, key=lambda entry: entry.path.rpartition(b"/")[0].split(b"/"))  # as os.walk
    assert trees.write(listed_first) == root
    groups = [list(group) for _, group in itertools.groupby(SOME, key=lambda entry: entry.path.split(b"/")[1])]
    assert trees.write(itertools.chain(*reversed(groups))) == root  # roots in any order


def test_the_empty_manifest(trees: Trees) -> None:
    root = trees.write([])
    assert (root.digest, root.times, root.file_count) == (EMPTY_ROOT, EMPTY_TIMES, 0)
    assert trees.entries(EMPTY_ROOT, EMPTY_TIMES) == []
    assert trees.verify(EMPTY_ROOT, EMPTY_TIMES) == []
    full = trees.write(SOME).digest
    assert trees.diff(EMPTY_ROOT, full) == expected([], SOME)
    assert trees.diff(full, EMPTY_ROOT) == expected(SOME, [])
    assert trees.diff(EMPTY_ROOT, EMPTY_ROOT) == []


def test_directories_above_the_roots_are_implied(trees: Trees) -> None:
    deep = [directory(b"/usr/local"), file(b"/usr/local/x", b"1")]
    implied, named = trees.write(deep), trees.write([directory(b"/usr"), *deep])
    assert trees.entries(implied.digest, implied.times) == deep
    assert trees.entries(implied.digest, prefix=b"/usr") == trees.entries(implied.digest)
    assert trees.diff(implied.digest, named.digest) == expected([], [directory(b"/usr")])
    assert trees.diff(named.digest, implied.digest) == expected([directory(b"/usr")], [])


def test_the_root_directory_itself_can_be_an_entry(trees: Trees) -> None:
    one, other = ([directory(b"/", mode=mode), directory(b"/a"), file(b"/a/b")] for mode in (0o755, 0o700))
    root, second = trees.write(one), trees.write(other)
    assert trees.entries(root.digest, root.times) == one
    assert trees.diff(root.digest, second.digest) == expected(one, other)
    assert trees.diff(EMPTY_ROOT, root.digest) == expected([], one)
    assert trees.verify(root.digest, root.times) == []


def test_a_touched_file_is_no_change(trees: Trees) -> None:
    touched = [entry._replace(mtime_ns=99) for entry in SOME]
    root, after = trees.write(SOME), trees.write(touched)
    assert after.digest == root.digest
    assert after.times != root.times
    assert trees.entries(after.digest, after.times) == sorted(touched)


def test_what_differs_is_told(trees: Trees) -> None:
    base = [file(b"/a", b"1"), file(b"/b", b"1"), file(b"/c"), file(b"/d"), directory(b"/e"), file(b"/e/x")]
    target = [
        file(b"/a", b"2"),
        file(b"/b", b"1", mode=0o755),
        file(b"/c", uid=7),
        directory(b"/d"),
        file(b"/d/y"),
        link(b"/e", b"d"),
    ]
    changes = trees.diff(trees.write(base).digest, trees.write(target).digest)
    assert changes == expected(base, target)
    assert {change.path: change.what for change in changes if change.what} == {
        b"/a": ["content"],
        b"/b": ["mode"],
        b"/c": ["owner"],
        b"/d": ["type", "content", "mode"],
        b"/e": ["type", "content", "mode"],
    }


@pytest.mark.parametrize(
    "path", [b"", b"a", b"a/b", b"/a//b", b"/a/", b"/.", b"/..", b"/a/../b", b"/a/./b", b"//a", b"/a\0b", b"/../x"]
)
def test_hostile_names_are_refused(trees: Trees, path: bytes) -> None:
    with pytest.raises(InvalidRequest):
        trees.write([file(path)])


@pytest.mark.parametrize(
    "entries",
    [
        [file(b"/a"), file(b"/a")],
        [file(b"/a"), file(b"/a/b")],
        [directory(b"/a"), file(b"/a/x"), directory(b"/b"), file(b"/b/x"), file(b"/a/y")],
        [file(b"/a/x"), directory(b"/a")],
        [file(b"/a", mode=-1)],
        [file(b"/a", mode=70000)],
        [file(b"/a", uid=2**32)],
        [file(b"/a")._replace(size=-1)],
        [file(b"/a")._replace(size=2**64)],
        [file(b"/a")._replace(digest=b"short")],
        [file(b"/" + b"n" * 70000)],
    ],
)
def test_malformed_streams_are_refused(trees: Trees, entries: list[Entry]) -> None:
    with pytest.raises(InvalidRequest):
        trees.write(entries)


def test_figures_of_hostile_guests_do_not_overflow(trees: Trees) -> None:
    huge = [file(b"/%d" % n, b"%d" % n, mtime_ns=2**80)._replace(size=2**63 - 1) for n in range(3)]
    root = trees.write(huge)
    assert root.size_bytes == 2**63 - 1
    assert trees.new_bytes(EMPTY_ROOT, root.digest) == 2**63 - 1
    assert trees.entries(root.digest, root.times)[0].mtime_ns == 2**63 - 1


def test_unknown_and_malformed_roots(trees: Trees) -> None:
    root, missing = trees.write(SOME).digest, "ab" * 32
    for call in (
        lambda: trees.diff(root, missing),
        lambda: trees.diff(missing, missing),
        lambda: trees.entries(missing),
    ):
        with pytest.raises(NotFound, match="no manifest"):
            call()
    for wrong in ("", "xyz", root[:-2], root + "00", "g" * 64):
        with pytest.raises(InvalidRequest, match="digest"):
            trees.diff(root, wrong)
    with pytest.raises(InternalError, match="do not belong"):
        trees.entries(root, EMPTY_TIMES)


def many(count: int, changed: Iterable[int] = (), removed: Iterable[int] = ()) -> list[Entry]:
    changed, removed = set(changed), set(removed)
    files = [
        file(b"/big/f%05d" % n, b"%d %d" % (n, n in changed), mtime_ns=n) for n in range(count) if n not in removed
    ]
    return [directory(b"/big"), *files]


@pytest.mark.parametrize("count", [nodes.LONGEST - 1, nodes.LONGEST, nodes.LONGEST + 1, 5000])
def test_large_directories(trees: Trees, count: int) -> None:
    base = many(count)
    root = trees.write(base)
    assert trees.entries(root.digest, root.times) == base
    for target in (
        many(count, changed=[count // 2, count - 1]),
        many(count, removed=[0, count // 3]),
        many(count + 1),
        many(count * 3, changed=[1]),
        [*base[:5], directory(b"/big/f00004x"), file(b"/big/f00004x/in"), *base[5:]],
    ):
        other = trees.write(target)
        assert trees.diff(root.digest, other.digest) == expected(base, target)
        assert trees.diff(other.digest, root.digest) == expected(target, base)
        assert trees.entries(other.digest, other.times) == sorted(target)
        assert trees.verify(other.digest, other.times) == []


def test_a_change_in_a_large_directory_stores_little(store: Store, trees: Trees) -> None:
    def stored() -> int:
        with store.connection() as connection:
            query = "SELECT (SELECT sum(length(body)) FROM tree) + (SELECT sum(length(body)) FROM tree_times)"
            return int(connection.execute(text(query)).scalar_one())

    trees.write(many(20_000))
    first = stored()
    trees.write(many(20_000, changed=[7000]))
    assert stored() - first < first / 200
    trees.write(many(20_000, removed=[7000]))
    assert stored() - first < first / 80


def test_names_no_hash_cuts_are_cut_all_the_same() -> None:
    names = [b"%d" % n for n in range(20_000)]
    firsts = {names[first] for first, _ in nodes.cuts(names, 0)}
    stubborn = [name for name in names if name not in firsts]
    for _ in range(6):  # leave out whatever cuts, until nothing does
        firsts = {stubborn[first] for first, _ in nodes.cuts(stubborn, 0)}
        stubborn = [name for name in stubborn if name not in firsts]
    spans = list(nodes.cuts(stubborn, 0))
    assert max(last - first for first, last in spans) <= nodes.MOST
    assert [first for first, _ in spans[1:]] == [last for _, last in spans[:-1]]


def test_pages_cover_everything_once(trees: Trees) -> None:
    entries = sorted([*SOME, *many(500), *(file(b"/workspace/a!%d" % n) for n in range(5))])
    by_name = sorted(entries, key=lambda entry: entry.path.split(b"/"))
    root = trees.write(by_name)
    for size in (1, 7, 100):
        found: list[Entry] = []
        while page := trees.entries(root.digest, root.times, after=found[-1].path if found else None, limit=size):
            assert len(page) <= size
            found += page
            if size == 1 and len(found) > 60:
                break
        assert found == entries[: len(found)]
    for after in (
        b"/workspace/a",
        b"/workspace/a/",
        b"/workspace/a/d",
        b"/workspace/a-",
        b"/workspace/zzz",
        b"/",
        b"/c",
        b"~",
    ):
        assert trees.entries(root.digest, root.times, after=after) == [entry for entry in entries if entry.path > after]


@pytest.mark.parametrize(
    "prefix",
    [
        b"/",
        b"/workspace",
        b"/workspace/",
        b"/workspace/a",
        b"/workspace/a-b",
        b"/workspace/empty",
        b"/work",
        b"/etc/hosts/x",
        b"/big",
        b"/.",
        b"/big/f00003",
    ],
)
def test_a_prefix_is_a_path_with_all_below_it(trees: Trees, prefix: bytes) -> None:
    entries = sorted([*SOME, *many(100)])
    root = trees.write(sorted(entries, key=lambda entry: entry.path.split(b"/")))
    bare = prefix.rstrip(b"/")
    below = [entry for entry in entries if entry.path == bare or entry.path.startswith(bare + b"/")]
    assert trees.entries(root.digest, root.times, prefix=prefix) == below
    for after in (b"/workspace/a/deep", b"/workspace/a-b", b"/a", b"/big/f00050", b"/z"):
        assert trees.entries(root.digest, root.times, prefix=prefix, after=after) == [
            e for e in below if e.path > after
        ]


def test_new_bytes_counts_each_content_once(trees: Trees) -> None:
    base = trees.write([file(b"/a", b"old"), file(b"/b", b"moved")]).digest
    target = trees.write(
        [file(b"/a", b"newer"), file(b"/c", b"moved"), file(b"/d", b"newer"), file(b"/e", b"12")]
    ).digest
    assert trees.new_bytes(base, target) == len(b"newer") + len(b"12")
    assert trees.new_bytes(base, base) == 0
    assert trees.new_bytes(EMPTY_ROOT, base) == len(b"old") + len(b"moved")


def test_deep_trees_need_no_deep_stack(trees: Trees) -> None:
    paths = [b"/d" * depth for depth in range(1, 1500)]
    entries = [*map(directory, paths), file(paths[-1] + b"/x", b"1")]
    root = trees.write(entries)
    assert trees.entries(root.digest, root.times) == entries
    other = trees.write([*entries[:-1], file(paths[-1] + b"/x", b"2")])
    assert [change.path for change in trees.diff(root.digest, other.digest)] == [paths[-1] + b"/x"]


@pytest.mark.parametrize("table", ["tree", "tree_times"])
@pytest.mark.parametrize("position", [0, 3, -1, 20])
def test_a_flipped_byte_is_found(store: Store, trees: Trees, table: str, position: int) -> None:
    root = trees.write([*SOME, *many(1000)])
    with store.transaction() as session:
        connection = session.connection()
        rows = connection.exec_driver_sql(f"SELECT digest, body FROM {table} ORDER BY length(body), digest").fetchall()
        digest, body = rows[len(rows) // 2]
        damaged = bytearray(body)
        damaged[position] ^= 1
        connection.execute(
            text(f"UPDATE {table} SET body = :body WHERE digest = :digest"), {"body": bytes(damaged), "digest": digest}
        )
    faults = trees.verify(root.digest, root.times)
    assert any(digest.hex() in fault for fault in faults)
    with store.transaction() as session:
        session.connection().execute(text(f"DELETE FROM {table} WHERE digest = :digest"), {"digest": digest})
    assert any("missing" in fault for fault in trees.verify(root.digest, root.times))
    with pytest.raises(InternalError, match="damaged"):
        trees.entries(root.digest, root.times)


def test_many_writers_of_one_manifest(store: Store) -> None:
    orders = [random.Random(seed) for seed in range(6)]
    roots, failed = [], []

    def write(order: random.Random) -> None:
        groups = [
            [directory(b"/p%d" % n), *(file(b"/p%d/%d" % (n, k), b"%d" % k) for k in range(400))] for n in range(40)
        ]
        order.shuffle(groups)
        try:
            roots.append(Trees(store).write(itertools.chain(*groups)))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert len(roots) == 6
    assert len(set(roots)) == 1
    assert Trees(store).verify(roots[0].digest, roots[0].times) == []


def test_a_writer_holds_nothing_while_it_waits(store: Store) -> None:
    def slow() -> Iterable[Entry]:
        for n in range(3000):
            if n == 2500:
                with store.transaction() as session:  # would fail within a transaction of the writer
                    session.connection().execute(text("DELETE FROM event"))
            yield directory(b"/d%05d" % n)
            for k in range(20):
                yield file(b"/d%05d/%d" % (n, k), b"%d %d" % (n, k))

    assert Trees(store).write(slow()).file_count == 60_000
