"""Access and upkeep without a node: keys, forgotten orders, what is pruned."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from sqlmodel import select

from autovibe.domain import ApiKey, Event, IdempotencyKey, Machine, Operation
from autovibe.domain.columns import now
from autovibe.errors import ConfigurationError, Unauthorized
from autovibe.hub import upkeep
from autovibe.hub.access import Keys, ensure_key
from autovibe.store import Store
from autovibe.store.keys import Keyring
from autovibe.types import MachineStatus, OperationKind
from tests.api.conftest import Served

KEYRING = Keyring(b"s" * 32)


def test_a_key_is_made_kept_or_given(store: Store) -> None:
    made = ensure_key(store, KEYRING, None, None)
    assert made.startswith("av_")
    assert ensure_key(store, KEYRING, None, made) == made
    given = ensure_key(store, KEYRING, "a-key-of-my-own-choice", made)
    keys = Keys(store, KEYRING)
    assert keys.authenticate(made).name == keys.authenticate(given).name == "operator"
    with store.reading() as session:
        rows = session.exec(select(ApiKey)).all()
    assert len(rows) == 2
    assert not any(made.split("_", 2)[2] in str(row) or given in str(row) for row in rows)
    for wrong in ("", "av_", made[:-1], made + "x", made.replace("av_", "av_0"), "a-key-of-my-own-choicf", "ü" * 20):
        with pytest.raises(Unauthorized):
            keys.authenticate(wrong)
    for weak in ("short", "has spaces in the key", "ü" * 20):
        with pytest.raises(ConfigurationError):
            ensure_key(store, KEYRING, weak, None)


def test_a_key_is_remembered_for_a_moment_only(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    key, keys = ensure_key(store, KEYRING, None, None), Keys(store, KEYRING)
    assert keys.cached(key) is None
    keys.authenticate(key)
    assert keys.cached(key) is not None
    assert keys.cached(key + "x") is None
    moment = __import__("time").monotonic()
    monkeypatch.setattr("autovibe.hub.access.time.monotonic", lambda: moment + 6)
    assert keys.cached(key) is None


def test_a_forgotten_order_is_started(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[UUID] = []
    monkeypatch.setattr(served.hub.workflows, "start", lambda uuid, kind: started.append(uuid))
    machine = served.machine(status=MachineStatus.spawning)
    ages = {"old": 6, "young": 1}
    made = {}
    with served.hub.store.transaction() as session:
        for name, age in ages.items():
            made[name] = Operation(
                kind=OperationKind.spawn,
                object_uuid=machine,
                machine_uuid=machine,
                created_at=now() - timedelta(seconds=age),
            )
            session.add(made[name])
    upkeep.start_forgotten(served.hub)
    assert made["old"].uuid in started
    assert made["young"].uuid not in started
    with served.hub.store.transaction() as session:  # or the hub of this module would begin to carry them out
        for operation in made.values():
            session.delete(session.get(Operation, operation.uuid))


def test_what_nobody_can_ask_for_is_pruned(served: Served) -> None:
    old, young = uuid4(), uuid4()
    with served.hub.store.transaction() as session:
        for uuid, age in ((old, timedelta(days=8)), (young, timedelta(days=6))):
            session.add(Event(kind="test", object_uuid=uuid, created_at=now() - age))
            session.add(
                IdempotencyKey(
                    actor="test",
                    key=str(uuid),
                    request_hash="",
                    object_kind="machine",
                    object_uuid=uuid,
                    created_at=now() - (timedelta(hours=25) if uuid == old else timedelta(hours=23)),
                )
            )
    served.project()
    served.machine()
    upkeep.prune(served.hub)
    with served.hub.store.reading() as session:
        events = set(session.exec(select(Event.object_uuid).where(Event.kind == "test")))
        keys = set(session.exec(select(IdempotencyKey.object_uuid).where(IdempotencyKey.actor == "test")))
    assert young in events & keys
    assert old not in events | keys


def test_the_newest_event_is_never_pruned(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.transaction() as session:
        for age in (9, 8):
            session.add(Event(kind="test", object_uuid=uuid4(), created_at=now() - timedelta(days=age)))
    upkeep.prune(type("Hub", (), {"store": store, "audit_days": 90})())
    with store.reading() as session:
        assert len(session.exec(select(Event)).all()) == 1


def test_a_prompt_is_followed_by_one_hub_at_a_time(served: Served) -> None:
    machine = served.machine(status=MachineStatus.working)
    row = served.row(Machine, machine)
    served.change(machine, watched_by="another-hub", watched_until=now() + timedelta(seconds=20))
    assert machine not in upkeep.working(served.hub)
    assert not upkeep._claim(served.hub, row), "what was read before another hub claimed it cannot be claimed"
    served.change(machine, watched_until=now() - timedelta(seconds=1))
    assert machine in upkeep.working(served.hub)
    assert upkeep._claim(served.hub, served.row(Machine, machine))
    assert served.row(Machine, machine).watched_by == served.hub.name
    served.change(machine, status=MachineStatus.active)
