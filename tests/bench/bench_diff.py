"""Manifests: the diff of two, from opening the store to a sorted list in process, against `git diff-tree -r` as a child
process on equal trees; and how much the store grows with a checkpoint.

AUTOVIBE_BENCH_FILES sets the size (200,000 by default; directories of 100 files).
"""

from __future__ import annotations

import hashlib
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from autovibe.store import Store
from autovibe.store.trees import Root, Trees
from autovibe.types import Entry, EntryKind
from tests.bench.figure import Figure

FILES = int(os.environ.get("AUTOVIBE_BENCH_FILES", "200000"))
CHANGES = 100
ROUNDS = 30
CHECKPOINTS = 20


def figures() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="av-bench-") as home:
        yield from _diff_figures(Path(home))
        for shape, per_directory in ((f"{FILES:,} files", 100), ("one directory of 100,000", 100_000)):
            yield _growth(Path(home), shape, FILES if per_directory == 100 else 100_000, per_directory)


def _diff_figures(home: Path) -> Iterator[Figure]:
    changed = _sample(FILES, CHANGES, 1)
    url = f"sqlite:///{home / 'diff.db'}"
    store = Store(url)
    store.migrate(home / "backups")
    trees = Trees(store)
    began = time.perf_counter()
    base = trees.write(manifest(FILES))
    written = time.perf_counter() - began
    target = trees.write(manifest(FILES, changed))
    store.close()
    git = _git_trees(home / "git", changed)

    def ours() -> list[bytes]:
        opened = Store(url)
        try:
            return [change.path for change in Trees(opened).diff(base.digest, target.digest)]
        finally:
            opened.close()

    def peer() -> list[bytes]:
        argv = ["git", "-C", str(home / "git"), "diff-tree", "-r", *git]
        lines = subprocess.run(argv, check=True, capture_output=True).stdout.splitlines()
        return [b"/" + line.partition(b"\t")[2] for line in lines]

    if ours() != peer() or len(ours()) != CHANGES:
        raise AssertionError("autovibe and git do not see the same changes.")
    mine, theirs = interleaved(ours, peer)
    yield Figure(f"diff of {FILES:,} files, {CHANGES} changes", mine, theirs, "ms", 2.0)
    yield Figure(f"writing a manifest of {FILES:,} files", written * 1000, 0, "ms")


def interleaved(ours: Callable[[], object], peer: Callable[[], object], rounds: int = ROUNDS) -> tuple[float, float]:
    """The medians in milliseconds, measured turn by turn so that both meet the same machine."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for measured, call in zip(times, (ours, peer), strict=True):
            began = time.perf_counter()
            call()
            measured.append((time.perf_counter() - began) * 1000)
    return statistics.median(times[0]), statistics.median(times[1])


def _growth(home: Path, shape: str, count: int, per_directory: int) -> Figure:
    """By how much a checkpoint of 10 changes makes the store grow, in percent of the first one."""
    path = home / f"growth-{per_directory}.db"
    store = Store(f"sqlite:///{path}")
    store.migrate(home / "backups")
    before = _size(store)
    versions: dict[int, int] = {}
    roots: list[Root] = []
    sizes = []
    for number in range(CHECKPOINTS + 1):
        if number:
            versions.update(dict.fromkeys(_sample(count, 10, number), number))
        roots.append(Trees(store).write(manifest(count, versions, per_directory)))
        sizes.append(_size(store))
    store.close()
    percent = 100 * (sizes[-1] - sizes[0]) / CHECKPOINTS / (sizes[0] - before)
    if len({root.digest for root in roots}) != len(roots):
        raise AssertionError("A change made no new root.")
    return Figure(f"growth by a checkpoint of 10 changes, {shape}", percent, 0, "%", 1.0)


def _size(store: Store) -> int:
    with store.connection() as connection:
        query = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
        return int(connection.exec_driver_sql(query).scalar_one())


def _sample(count: int, some: int, seed: int) -> frozenset[int]:
    return frozenset(random.Random(seed).sample(range(count), some))


def manifest(
    count: int, versions: dict[int, int] | Collection[int] = (), per_directory: int = 100, top: int = 100
) -> Iterator[Entry]:
    """`count` files, so many a directory, so many directories in another; those in `versions` have another content and
    time.
    """
    directory = EntryKind.directory
    yield Entry(b"/workspace", directory, 0o755, 1000, 1000, 0, b"", b"", 1)
    for path, numbers in _layout(count, per_directory, top):
        yield Entry(path, directory, 0o755, 1000, 1000, 0, b"", b"", 1)
        for number in numbers:
            version = versions.get(number, 0) if isinstance(versions, dict) else int(number in versions)
            content = b"%d %d" % (number, version)
            digest = hashlib.sha256(content).digest()
            name = b"%s/file%06d.txt" % (path, number)
            yield Entry(name, EntryKind.file, 0o644, 1000, 1000, len(content), digest, b"", 10**18 + number + version)


def _layout(count: int, per_directory: int, top: int) -> Iterator[tuple[bytes, Iterable[int]]]:
    for index, start in enumerate(range(0, count, per_directory)):
        part = b"/workspace/part%04d" % (index // top)
        if index % top == 0:
            yield part, ()
        yield part + b"/dir%05d" % index, range(start, min(start + per_directory, count))


def _git_trees(repository: Path, changed: Collection[int]) -> list[str]:
    """The same two trees in git, packed; the names of their commits."""
    git = ["git", "-C", str(repository)]
    subprocess.run(["git", "init", "--quiet", "--bare", str(repository)], check=True)
    with subprocess.Popen([*git, "fast-import", "--quiet"], stdin=subprocess.PIPE) as process:
        stream = process.stdin
        assert stream is not None
        for branch, versions in (("base", frozenset[int]()), ("target", changed)):
            stream.write(b"commit refs/heads/%s\ncommitter a <a@b> 0 +0000\ndata 0\n" % branch.encode())
            for entry in manifest(FILES, versions):
                if entry.kind == EntryKind.file:
                    number = int(entry.path[-10:-4])
                    content = b"%d %d" % (number, number in versions)
                    stream.write(b"M 100644 inline %s\ndata %d\n%s\n" % (entry.path[1:], len(content), content))
        stream.close()
    if process.returncode != 0:
        raise AssertionError("git fast-import failed.")
    subprocess.run([*git, "gc", "--quiet", "--prune=now"], check=True)
    parsed = subprocess.run(
        [*git, "rev-parse", "base^{tree}", "target^{tree}"], check=True, capture_output=True, text=True
    )
    return parsed.stdout.split()
