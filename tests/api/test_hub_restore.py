"""Checkpoints of the Hub while it is written to, put back, tampered with, and made by processes that die."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlmodel import col, func, select

from autovibe import app, premises, schemas
from autovibe.domain import Event, Experiment, HubCheckpoint, HubState, Operation, Project
from autovibe.domain.actor import Actor
from autovibe.domain.columns import now
from autovibe.errors import AutovibeError, ConfigurationError, Conflict, InvalidRequest, NotFound, OperationFailed
from autovibe.hub import Hub, backups
from autovibe.settings import Settings
from autovibe.store import Store, bundles, copies
from tests.api.conftest import settings_of, until

ACTOR = Actor("test")
SUBJECT = uuid4()

PROGRAM = """
import json, os, signal, sys
from autovibe import app, schemas
from autovibe.domain.actor import Actor
from autovibe.hub import backups
from autovibe.settings import load
from autovibe.store import bundles

settings, moment, is_asked = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3] == "ask"
seal = bundles.seal


def deadly(*arguments):
    if moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    found = seal(*arguments)
    if moment == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return found


bundles.seal = deadly
parts = app.build(load(**settings))
parts.start()
if is_asked:
    made = backups.create(parts.hub, Actor("test"), schemas.HubCheckpointOrder(reason="deadly"))
print("ready", flush=True)
sys.stdin.read()
os._exit(0 if parts.close() else 1)
"""


def url_of(database_url: str, home: Path) -> dict[str, str]:
    """The database of a hub: on SQLite its own."""
    return {} if database_url.startswith("sqlite") else {"database_url": database_url}


@pytest.fixture
def settings(home: Path, database_url: str) -> Settings:
    return settings_of(home, **url_of(database_url, home))


@contextmanager
def running(settings: Settings) -> Iterator[Hub]:
    parts = app.build(settings)
    parts.start()
    try:
        yield parts.hub
    finally:
        assert parts.close()


def checkpointed(hub: Hub, **order: Any) -> schemas.HubCheckpoint:
    uuid = backups.create(hub, ACTOR, schemas.HubCheckpointOrder(**order)).uuid
    until(lambda: backups.show(hub, uuid).status != "creating", 60)
    found = backups.show(hub, uuid)
    assert found.status == "ready", found.error_message
    return found


def restore(settings: Settings, bundle: str | Path, *, is_saved: bool = True) -> Path | None:
    return premises.restore(settings, Path(bundle), lambda *_: None, is_saved=is_saved)


def add_project(hub: Hub, name: str) -> None:
    with hub.store.transaction() as session:
        session.add(Project(name=name))


def names_in(settings: Settings) -> list[str]:
    store = Store(settings.hub_database_url)
    with store.reading() as session:
        found = sorted(session.exec(select(Project.name)))
    store.close()
    return found


class Writer:
    """Keeps an invariant over two tables: the state counts the events of its subject."""

    def __init__(self, store: Store) -> None:
        self._store, self._is_over = store, threading.Event()
        self._thread = threading.Thread(target=self._write)
        self.count = 0

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(60)

    def _write(self) -> None:
        while not self._is_over.is_set():
            with self._store.transaction() as session:
                state = session.get(HubState, "count") or HubState(key="count", value={"n": 0})
                state.value = {"n": int(state.value["n"]) + 1, "filler": "x" * 2000}
                session.add(state)
                session.flush()
                session.add(Event(kind="test", object_uuid=SUBJECT, body={"filler": "x" * 2000}))
            self.count += 1


def counts(store: Store) -> tuple[int, int]:
    with store.reading() as session:
        events = session.exec(select(func.count()).select_from(Event).where(Event.object_uuid == SUBJECT)).one()
        state = session.get(HubState, "count")
    return events, int(state.value["n"]) if state is not None else 0


def test_a_checkpoint_under_load_is_consistent_and_comes_back(settings: Settings) -> None:
    with running(settings) as hub:
        add_project(hub, "before")
        with Writer(hub.store) as writer:
            until(lambda: writer.count > 20, 30)
            first = checkpointed(hub)
            second = checkpointed(hub, reason="again")
            at_the_end = writer.count
        add_project(hub, "after")
        uuid, key = hub.uuid, settings.read_api_key()
    saved = restore(settings, first.path)
    assert saved is not None
    store = Store(settings.hub_database_url)
    events, counted = counts(store)
    assert events == counted
    assert 20 < events < at_the_end
    store.close()
    assert names_in(settings) == ["before"]
    with running(settings) as hub:
        assert hub.uuid == uuid
        assert settings.read_api_key() == key
        listed = {item.uuid: item for item in backups.index(hub, backups.Cut()).checkpoints}
        assert {item.status for item in listed.values()} == {"ready"}
        assert set(listed) == {first.uuid, second.uuid, UUID(saved.name)}  # also what was made after it
        assert listed[UUID(saved.name)].type == "recovery"
        assert Path(listed[second.uuid].path) == Path(second.path)
        with hub.store.reading() as session:
            unfinished = session.exec(select(Operation.uuid).where(col(Operation.finished_at).is_(None))).all()
        assert unfinished == []
        checkpointed(hub)  # the journal works
    restore(settings, saved)  # and back again
    assert names_in(settings) == ["after", "before"]


def test_what_ran_is_begun_again(settings: Settings) -> None:
    """The journal and the database are of moments that differ; an operation that neither would go on with is begun."""
    with running(settings) as hub:
        with hub.store.transaction() as session:
            lost = Operation(
                kind="hub_checkpoint", status="running", step="copy", object_uuid=uuid4(), steps=["copy", "record"]
            )
            session.add(HubCheckpoint(uuid=lost.object_uuid, type="manual", operation_uuid=uuid4()))
            session.add(lost)
        base = checkpointed(hub)
        with hub.store.transaction() as session:
            experiment = Experiment(name="e", checkpoint_uuid=base.uuid, place="elsewhere", ends_at=now())
            session.add(experiment)
        made = checkpointed(hub)
    restore(settings, made.path, is_saved=False)
    store = Store(settings.hub_database_url)
    with store.reading() as session:
        found = session.get_one(Operation, lost.uuid)
        assert (found.status, found.step) == ("accepted", None)
        assert session.get_one(Experiment, experiment.uuid).is_stop_wanted
        row = session.get_one(HubCheckpoint, lost.object_uuid)
        assert (row.status, row.error_message) == ("failed", "The Hub was restored before it was made.")
    store.close()
    with running(settings) as hub:
        until(lambda: _is_over(hub, lost.uuid), 60)


def _is_over(hub: Hub, operation: UUID) -> bool:
    with hub.store.reading() as session:
        return session.get_one(Operation, operation).finished_at is not None


def test_a_running_hub_is_not_restored(settings: Settings, home: Path, database_url: str) -> None:
    with running(settings) as hub:
        made = checkpointed(hub)
        with pytest.raises(Conflict, match="autovibe down"):
            restore(settings, made.path)
        if not hub.store.is_sqlite:
            other = settings_of(home / "other", **url_of(database_url, home))
            with pytest.raises(Conflict, match=hub.name):
                restore(other, made.path)
    assert names_in(settings) == []


def _change(bundle: Path) -> None:
    [database] = bundle.glob("database.*")
    content = bytearray(database.read_bytes())
    content[len(content) // 2] ^= 1
    database.write_bytes(content)


def _shorten(bundle: Path) -> None:
    path = bundle / "home" / "credentials"
    path.write_bytes(path.read_bytes()[:-1])


def _remove(bundle: Path) -> None:
    (bundle / "settings.json").unlink()


def _add(bundle: Path) -> None:
    (bundle / "home" / "hub" / "ssh" / "authorized_keys").write_text("ssh-ed25519 AAAA")


def _link(bundle: Path) -> None:
    path = bundle / "home" / "credentials"
    path.rename(bundle.parent / "credentials")
    path.symlink_to(bundle.parent / "credentials")


def _escape(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["home/../../../etc/x"] = manifest["files"]["settings.json"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def _break(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{")


def _seal_with(bundle: Path, name: str, path: str) -> None:
    """A file at `path` that a manifest which is right in all else calls `name`."""
    place = bundle / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("LD_PRELOAD=/tmp/x")
    manifest = json.loads((bundle / "manifest.json").read_text())
    seen = {"size": place.stat().st_size, "sha256": bundles.digest_of(place)}
    manifest["files"] |= {name: seen, path: seen}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def _climb(bundle: Path) -> None:
    """Beside the home: ~/.ssh/authorized_keys of a home in ~."""
    _seal_with(bundle, "home/../.ssh/authorized_keys", ".ssh/authorized_keys")


def _put_elsewhere(bundle: Path) -> None:
    """What systemd gives the Hub as its environment."""
    _seal_with(bundle, "home/environment", "home/environment")


def _empty(bundle: Path) -> None:
    [database] = bundle.glob("database.*")
    database.unlink()
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"][database.name]
    (bundle / "manifest.json").write_text(json.dumps(manifest))


TAMPERINGS = (_change, _shorten, _remove, _add, _link, _escape, _break, _climb, _put_elsewhere, _empty)


def test_what_does_not_fit_is_refused_and_changes_nothing(settings: Settings, home: Path) -> None:
    with running(settings) as hub:
        made = checkpointed(hub)
        add_project(hub, "kept")
    before = sorted(settings.hub_home.rglob("*"))
    for tamper in TAMPERINGS:
        copy = shutil.copytree(made.path, home / "copies" / tamper.__name__ / "bundle")
        tamper(copy)
        with pytest.raises(OperationFailed, match=r"is not as it was made|is damaged|which no|holds no"):
            restore(settings, copy)
    path = shutil.copytree(made.path, home / "copies" / "newer") / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["facts"] |= {"schema_revision": "9999", "version": "7.8.9"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigurationError, match=r"install autovibe 7\.8\.9 or newer"):
        restore(settings, path.parent)
    assert names_in(settings) == ["kept"]
    assert not (home.parent / ".ssh").exists()
    assert [path for path in sorted(settings.hub_home.rglob("*")) if path not in before] == []
    other = {} if "database_url" in settings.model_fields_set else {"database_url": "postgresql://u@127.0.0.1:1/x"}
    with pytest.raises(AutovibeError):
        restore(settings_of(home / "other", **other), made.path)


def test_a_word_names_a_checkpoint(home: Path) -> None:
    settings = settings_of(home)
    made = settings.hub_home / "checkpoints" / str(uuid4())
    bundles.seal(bundles.begin(made), made, {})
    assert premises.find_checkpoint(settings, made.name[:6]) == premises.find_checkpoint(settings, str(made)) == made
    with pytest.raises(NotFound, match="name its directory"):
        premises.find_checkpoint(settings, "zzz")
    for number in (1, 2):
        shutil.copytree(made, made.with_name(f"zz{number}"))
    with pytest.raises(InvalidRequest, match="2 checkpoints"):
        premises.find_checkpoint(settings, "zz")


def test_a_damaged_checkpoint_does_not_stand_in_the_way_of_another(settings: Settings) -> None:
    with running(settings) as hub:
        damaged, made = checkpointed(hub), checkpointed(hub)
    (Path(damaged.path) / "manifest.json").write_text("{")
    restore(settings, made.path, is_saved=False)
    with running(settings) as hub:
        assert [backups.show(hub, found.uuid).status for found in (damaged, made)] == ["failed", "ready"]


def test_a_damaged_database_is_replaced_when_that_is_wanted(home: Path) -> None:
    settings = settings_of(home)
    with running(settings) as hub:
        add_project(hub, "kept")
        made = checkpointed(hub)
    (settings.hub_home / "autovibe.db").write_bytes(b"no database" * 1000)
    with pytest.raises(OperationFailed, match="--without-recovery"):
        restore(settings, made.path)
    assert restore(settings, made.path, is_saved=False) is None
    assert names_in(settings) == ["kept"]


def test_the_words_restore_into_another_home(settings: Settings, home: Path, request: pytest.FixtureRequest) -> None:
    (settings.home / "config.toml").write_text('log_level = "warning"\ndatabase_url = ""\n')
    with running(settings) as hub:
        add_project(hub, "kept")
        made = checkpointed(hub)
        uuid, key = hub.uuid, settings.read_api_key()
    (settings.credentials).write_text("av_" + "0" * 40)  # the old home is left alone
    other = home / "other"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUTOVIBE_")}
    more: dict[str, str] = {}
    if "database_url" in settings.model_fields_set:
        server = request.getfixturevalue("postgres")
        more["database_url"] = server.create(is_migrated=False, backups=home / "backups")
        environment["AUTOVIBE_DATABASE_URL"] = more["database_url"]
    argv = [sys.executable, "-m", "autovibe.cli", "hub", "restore", str(made.uuid), "--home", str(settings.home)]
    ended = subprocess.run([*argv, "--into", str(other), "--json"], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["recovery_checkpoint"] is None  # there was nothing
    assert (other / "config.toml").read_text().startswith('log_level = "warning"')
    assert (other / "credentials").stat().st_mode & 0o777 == 0o600
    there = settings_of(other, **more)
    assert (other / "credentials").read_text().strip() == key
    with running(there) as hub:
        assert hub.uuid == uuid
    assert names_in(there) == ["kept"]
    if more:
        server.drop(more["database_url"])


def test_a_missing_or_old_pg_dump_is_said_with_the_remedy(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(settings) as hub:
        if hub.store.is_sqlite:
            monkeypatch.setenv("PATH", str(tmp_path))
            checkpointed(hub)  # it needs no program
            return
        monkeypatch.setattr(copies, "_VERSIONED", tmp_path)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ConfigurationError, match=r"'pg_dump' is not installed.*install postgresql-client-"):
            checkpointed(hub)
        (tmp_path / "pg_dump").write_text("#!/bin/sh\necho 'pg_dump (PostgreSQL) 9.6.24'\n")
        (tmp_path / "pg_dump").chmod(0o755)
        with pytest.raises(ConfigurationError, match=r"of version 9 .*install postgresql-client-"):
            checkpointed(hub)
        assert backups.index(hub, backups.Cut()).total_count == 0


@contextmanager
def process(settings: Settings, moment: str, word: str) -> Iterator[subprocess.Popen[str]]:
    given = settings.model_dump(mode="json", include={*settings.model_fields_set, "home"})
    given |= {"api_key": settings.read_api_key(), "hub_checkpoint_daily": False}
    argv = [sys.executable, "-c", PROGRAM, json.dumps(given), moment, word]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_hub_killed_over_a_checkpoint_goes_on_with_it(settings: Settings, moment: str) -> None:
    with process(settings, moment, "ask") as dying:
        assert dying.wait(60) == -9
    store = Store(settings.hub_database_url)
    with store.reading() as session:
        [row] = session.exec(select(HubCheckpoint)).all()
    assert row.status == "creating"
    assert bundles.partials_of(settings.hub_home / "checkpoints" / str(row.uuid)) or moment == "after"
    with process(settings, "never", "look") as successor:
        assert successor.stdout is not None
        assert successor.stdout.readline() == "ready\n"
        until(lambda: _status(store, row.uuid) != "creating", 60)
        assert successor.stdin is not None
        successor.stdin.close()
        assert successor.wait(30) == 0
    assert _status(store, row.uuid) == "ready"
    store.close()
    place = settings.hub_home / "checkpoints" / str(row.uuid)
    bundles.verify(place)
    assert [path.name for path in place.parent.iterdir()] == [str(row.uuid)]
    restore(settings, place, is_saved=False)


def _status(store: Store, uuid: UUID) -> str:
    with store.reading() as session:
        return session.get_one(HubCheckpoint, uuid).status
