"""Differences of random trees are exact, and mirror each other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autovibe.store import Store
from autovibe.store.trees import Trees
from autovibe.types import Change, Entry
from tests.unit.test_trees import directory, expected, file, link, many, plain

# Random trees: names that sort around the slash, shared names on both sides, all kinds.

NAMES = st.sampled_from([b"a", b"a-", b"a.b", b"a0", b"b", b"\xff", b" ", b"ab", b".x"])
LEAVES = st.one_of(
    st.builds(lambda c, m: ("f", c, m), st.sampled_from([b"", b"1", b"22"]), st.sampled_from([0o644, 0o755])),
    st.builds(lambda t: ("l", t, 0o777), st.sampled_from([b"x", b"f", b"target"])),
)
TREES = st.recursive(LEAVES, lambda below: st.dictionaries(NAMES, below, max_size=6), max_leaves=25)
ROOTS = st.dictionaries(NAMES, TREES, max_size=5)


def flatten(tree: object, path: bytes = b"") -> list[Entry]:
    found: list[Entry] = []
    if isinstance(tree, dict):
        if path:
            found.append(directory(path))
        for name, below in tree.items():
            found += flatten(below, path + b"/" + name)
    else:
        kind, content, mode = tree  # type: ignore[misc]
        found.append(file(path, content, mode=mode) if kind == "f" else link(path, content))
    return found


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterable[Trees]:
    """One SQLite store for the many small trees of the property tests; the format does not depend on the database."""
    home = tmp_path_factory.mktemp("trees")
    store = Store(f"sqlite:///{home / 'trees.db'}")
    store.migrate(Path(home))
    yield Trees(store)
    store.close()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(base=ROOTS, target=ROOTS)
def test_a_diff_is_exact_and_mirrors(kept: Trees, base: object, target: object) -> None:
    old, new = flatten(base), flatten(target)
    a, b = kept.write(old), kept.write(new)
    changes = kept.diff(a.digest, b.digest)
    assert changes == expected(old, new)
    assert kept.diff(b.digest, a.digest) == [Change(path, after, before) for path, before, after in changes]
    assert kept.diff(a.digest, a.digest) == []
    applied = {entry.path: plain(entry) for entry in old}
    for path, _, after in changes:
        applied.pop(path, None)
        if after is not None:
            applied[path] = after
    assert [applied[path] for path in sorted(applied)] == kept.entries(b.digest)
    assert kept.entries(b.digest, b.times) == sorted(new)
    for entry in new:
        assert kept.entries(b.digest, b.times, after=entry.path) == [e for e in sorted(new) if e.path > entry.path]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(40, 400),
    changed=st.sets(st.integers(0, 399), max_size=40),
    removed=st.sets(st.integers(0, 399), max_size=40),
)
def test_a_diff_of_cut_directories_is_exact(kept: Trees, count: int, changed: set[int], removed: set[int]) -> None:
    base, target = many(count), many(count, changed, removed)
    a, b = kept.write(base), kept.write(target)
    assert kept.diff(a.digest, b.digest) == expected(base, target)
    assert kept.diff(b.digest, a.digest) == expected(target, base)
