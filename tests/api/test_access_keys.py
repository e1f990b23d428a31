"""API keys: made once, listed without their text, ended; and the operator's own key."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
from sqlalchemy import text
from sqlmodel import select

from autovibe import Client
from autovibe.api import guard
from autovibe.domain import ApiKey, Machine, Output
from autovibe.domain.actor import PLAIN, Actor, hash_secret, new_key, split_key
from autovibe.domain.columns import now
from autovibe.errors import ConfigurationError, Conflict, Forbidden, NotFound, Unauthorized
from autovibe.hub import keys, rules
from autovibe.hub.access import Keys, ensure_key
from autovibe.store import Store, rows, schema
from autovibe.store.keys import Keyring, open_keyring
from autovibe.types import Role
from tests.api.conftest import KEY, Served, error_of, until


def client_of(served: Served, key: str | None) -> httpx2.Client:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx2.Client(base_url=f"{served.url}/api/v1", headers=headers, timeout=30, trust_env=False)


def create(served: Served, **order: Any) -> dict[str, Any]:
    answer = served.post("/keys", {"name": f"k-{uuid4().hex[:8]}", **order})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def test_a_key_is_told_once_and_kept_as_a_hash(served: Served) -> None:
    made = create(served, name="ci", role="viewer", expires_in_days=1)
    key = made.pop("key")
    assert key.startswith(f"av_{made['id']}_")
    assert made["created_by"] == "operator"
    assert made["status"] == "usable"
    shown = served.get(f"/keys/{made['uuid']}").json()
    assert "key" not in shown
    assert {name: value for name, value in shown.items() if name != "last_used_at"} == {
        name: value for name, value in made.items() if name != "last_used_at"
    }
    assert made["uuid"] in [item["uuid"] for item in served.get("/keys").json()["keys"]]
    with served.hub.store.reading() as session:
        row = session.get(ApiKey, made["id"])
        dump = str(session.execute(text("SELECT * FROM api_key")).all())
    assert row is not None
    assert row.scheme == served.hub.keyring.scheme
    assert row.secret_hash != hash_secret(split_key(key)[1])
    assert split_key(key)[1] not in dump
    with client_of(served, key) as http:
        assert http.get("/projects").status_code == 200
        error_of(http.post("/projects", json={"name": "x"}), 403, "FORBIDDEN")


def test_a_repeat_makes_no_second_key_and_tells_no_text(served: Served) -> None:
    order = {"name": f"once-{uuid4().hex[:8]}"}
    first = served.post("/keys", order, key="key-once").json()
    again = served.post("/keys", order, key="key-once").json()
    assert first["key"]
    assert again["key"] is None
    assert again["uuid"] == first["uuid"]


@pytest.mark.parametrize(
    ("order", "field"),
    [
        ({"role": "machine"}, "role"),
        ({"role": "root"}, "role"),
        ({"role": "admin", "project_uuid": str(uuid4())}, "one project"),
        ({"scopes": ["machines"]}, "scopes"),
        ({"scopes": ["moons:write"]}, "moons"),
        ({"expires_in_days": -1}, "expires_in_days"),
        ({"expires_in_days": 1, "expires_at": "2999-01-01T00:00:00Z"}, "not both"),
        ({"expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "2999-01-01T00:00:00"}, "expires_at"),
        ({"name": "two words"}, "name"),
    ],
)
def test_a_malformed_order_says_what_is_wrong(served: Served, order: dict[str, Any], field: str) -> None:
    before = served.get("/keys").json()["total_count"]
    answer = served.post("/keys", {"name": "k", **order})
    assert field in error_of(answer, 400, "INVALID_REQUEST").message
    assert served.get("/keys").json()["total_count"] == before


def test_a_key_of_an_unknown_project_is_404(served: Served) -> None:
    error_of(served.post("/keys", {"name": "k", "project_uuid": str(uuid4())}), 404, "NOT_FOUND")
    error_of(served.get(f"/keys/{uuid4()}"), 404, "NOT_FOUND")
    error_of(served.post(f"/keys/{uuid4()}/revoke"), 404, "NOT_FOUND")


def test_a_revoked_key_is_refused_at_once_and_says_why(served: Served) -> None:
    made = create(served)
    with client_of(served, made["key"]) as http:
        assert http.get("/projects").status_code == 200
        ended = served.post(f"/keys/{made['uuid']}/revoke").json()
        assert ended["status"] == "revoked"
        error = error_of(http.get("/projects"), 401, "UNAUTHORIZED")
        assert "revoked at" in error.message
        assert served.post(f"/keys/{made['uuid']}/revoke").json()["revoked_at"] == ended["revoked_at"]
    listed = served.get("/keys", status="revoked", limit=200).json()["keys"]
    assert made["uuid"] in [item["uuid"] for item in listed]
    assert made["uuid"] not in [i["uuid"] for i in served.get("/keys", status="usable", limit=200).json()["keys"]]


def test_a_defect_before_the_routes_answers_the_envelope(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def crash(_: str) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(served.hub.keys, "cached", crash)
    answer = served.get("/projects")
    error_of(answer, 500, "INTERNAL_ERROR")
    assert "secret detail" not in answer.text
    assert "secret detail" in caplog.text


def test_a_route_without_a_rule_is_for_admins() -> None:
    def show() -> None: ...

    route = guard.Guarded("/hub/secrets", show, methods=["GET"])
    assert not route.has_rule
    assert route.verb is not None
    for role in (Role.operator, Role.viewer, Role.machine):
        with pytest.raises(Forbidden):
            rules.require(Actor("ann", role=role), route.verb)
    with pytest.raises(Forbidden, match="whole Hub"):
        rules.require(Actor("ann", project_uuid=uuid4()), route.verb)
    rules.require(Actor("ann"), route.verb)


def test_a_stream_ends_and_a_long_poll_is_refused_when_the_key_does(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "KNOWN_SECONDS", 0.0)  # else five seconds
    elsewhere: dict[str, Any] = {"watched_by": "another-hub", "watched_until": now() + timedelta(minutes=5)}
    machine = served.machine(status="working", prompt="sleep 60", **elsewhere)
    made, seen = create(served), threading.Event()
    ended: list[str] = []
    with client_of(served, made["key"]) as http, ThreadPoolExecutor(2) as threads:
        polled = threads.submit(http.get, f"/machines/{machine}", params={"wait": 60, "wait_for": "finished"})

        def follow() -> None:
            with http.stream("GET", f"/machines/{machine}/logs", params={"follow": True}) as stream:
                for piece in stream.iter_text():
                    ended.append(piece)
                    seen.set()

        followed = threads.submit(follow)
        _write(served, machine, 0, b"first ")
        assert seen.wait(20)
        assert served.post(f"/keys/{made['uuid']}/revoke").status_code == 200
        _write(served, machine, 6, b"second")
        followed.result(20)
        assert "".join(ended) == "first "
        served.change(machine, status="active", finished_at=now())
        error_of(polled.result(20), 401, "UNAUTHORIZED")


def _write(served: Served, machine: UUID, start: int, body: bytes) -> None:
    with served.hub.store.transaction() as session:
        session.add(Output(machine_uuid=machine, start=start, body=body))
        row = rows.get(session, Machine, machine)
        row.output_bytes = start + len(body)
        session.add(row)
        rows.record(session, "machine.output", machine, row.project_uuid)


def test_another_hub_process_forgets_a_revoked_key_within_five_seconds(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = create(served)
    other = Keys(served.hub.store, served.hub.keyring)
    assert other.authenticate(made["key"]).key_id == made["id"]
    served.post(f"/keys/{made['uuid']}/revoke")
    assert other.cached(made["key"]) is not None
    clock = time.monotonic() + 5.1
    monkeypatch.setattr("autovibe.hub.access.time", SimpleNamespace(monotonic=lambda: clock))
    assert other.cached(made["key"]) is None
    with pytest.raises(Unauthorized, match="revoked"):
        other.authenticate(made["key"])


def test_a_cached_key_ends_when_it_expires(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    made = create(served, expires_at=(now() + timedelta(seconds=3)).isoformat())
    other = Keys(served.hub.store, served.hub.keyring)
    other.authenticate(made["key"])
    assert other.cached(made["key"]) is not None
    clock = time.monotonic() + 3.1
    monkeypatch.setattr("autovibe.hub.access.time", SimpleNamespace(monotonic=lambda: clock))
    assert other.cached(made["key"]) is None
    later = now() + timedelta(seconds=4)
    monkeypatch.setattr("autovibe.domain.actor.now", lambda: later)
    with pytest.raises(Unauthorized, match="expired"):
        other.authenticate(made["key"])


def test_the_last_usable_admin_key_stays(served: Served) -> None:
    mine = next(item for item in served.get("/keys", limit=200).json()["keys"] if KEY.startswith(f"av_{item['id']}_"))
    others = [
        item
        for item in served.get("/keys", status="usable", limit=200).json()["keys"]
        if item["role"] == "admin" and item["uuid"] != mine["uuid"]
    ]
    for item in others:
        served.post(f"/keys/{item['uuid']}/revoke")
    brief = create(served, role="admin", expires_at=(now() + timedelta(milliseconds=100)).isoformat())
    until(lambda: served.get(f"/keys/{brief['uuid']}").json()["status"] == "expired")
    assert "last usable" in error_of(served.post(f"/keys/{mine['uuid']}/revoke"), 409, "CONFLICT").message
    create(served, role="admin", scopes=["machines:write", "keys:read"])  # which makes no others
    error_of(served.post(f"/keys/{mine['uuid']}/revoke"), 409, "CONFLICT")
    second = create(served, role="admin")
    with pytest.raises(Conflict, match="last usable"):
        keys.revoke(served.hub, Actor("test"), _uuid_of(served, second["id"], revoke=mine["uuid"]))
    with served.hub.store.transaction() as session:  # for the tests that follow
        row = session.get(ApiKey, mine["id"])
        assert row is not None
        row.revoked_at = None
        session.add(row)
    until(lambda: served.get("/projects").status_code == 200)


def _uuid_of(served: Served, identifier: str, *, revoke: str) -> Any:
    """End the other admin key; the one named is then the last."""
    served.post(f"/keys/{revoke}/revoke")
    with served.hub.store.reading() as session:
        row = session.get(ApiKey, identifier)
    assert row is not None
    return row.uuid


def test_use_is_written_later_and_once_a_minute(served: Served) -> None:
    made = create(served)
    other = Keys(served.hub.store, served.hub.keyring)
    other.authenticate(made["key"])
    assert served.get(f"/keys/{made['uuid']}").json()["last_used_at"] is None
    other.settle()
    first = served.get(f"/keys/{made['uuid']}").json()["last_used_at"]
    assert first is not None
    other.authenticate(made["key"])
    other.settle()
    assert served.get(f"/keys/{made['uuid']}").json()["last_used_at"] == first


def test_the_sdk_makes_and_ends_keys(served: Served) -> None:
    with Client(served.url, KEY) as client:
        made = client.keys.create("sdk", role="viewer", scopes=["machines:read"], expires_in_days=2)
        assert made.key is not None
        assert client.keys.get(made.uuid).scopes == ["machines:read"]
        assert made.uuid in [item.uuid for item in client.keys.each()]
        assert client.keys.revoke(made.uuid).status == "revoked"
        with pytest.raises(NotFound):
            client.keys.get(uuid4())


# The operator's key and the server key, without a hub


def test_a_key_of_the_first_release_works_and_is_hashed_anew(store: Store) -> None:
    keyring, key = Keyring(b"s" * 32), new_key()
    identifier, secret = split_key(key)
    with store.transaction() as session:
        session.add(ApiKey(id=identifier, name="old", secret_hash=hashlib.sha256(secret.encode()).hexdigest()))
    known = Keys(store, keyring)
    assert known.authenticate(key).role == "admin"
    known.settle()
    with store.reading() as session:
        row = session.get(ApiKey, identifier)
    assert row is not None
    assert row.scheme == keyring.scheme != PLAIN
    assert Keys(store, keyring).authenticate(key).name == "old"
    with pytest.raises(Unauthorized):
        Keys(store, Keyring(b"t" * 32)).authenticate(key)


def test_keys_of_the_first_release_become_admin_keys(
    empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "migrations"
    shutil.copytree(schema.MIGRATIONS, old, ignore=lambda _, names: [n for n in names if "0002" <= n[:4] <= "9999"])
    store, made = Store(empty_database_url), [new_key() for _ in range(2)]
    with monkeypatch.context() as earlier:
        earlier.setattr(schema, "MIGRATIONS", old)
        store.migrate(tmp_path / "backups")
    with store.transaction() as session:
        for key in made:
            identifier, secret = split_key(key)
            values = {"id": identifier, "name": "old", "hash": hash_secret(secret), "at": now().isoformat()}
            insert = "INSERT INTO api_key (id, name, secret_hash, created_at) VALUES (:id, :name, :hash, :at)"
            session.connection().execute(text(insert), values)
    store.migrate(tmp_path / "backups")
    known = Keys(store, Keyring(b"s" * 32))
    assert {known.authenticate(key).role for key in made} == {Role.admin}
    with store.reading() as session:
        assert len({row.uuid for row in session.exec(select(ApiKey))}) == 2
    store.close()


def test_the_server_key_is_made_once_and_shared(store: Store) -> None:
    first = open_keyring(store)
    other = Store(store.url.render_as_string(hide_password=False))
    assert open_keyring(other).scheme == first.scheme
    other.close()
    if not store.is_sqlite:
        return
    file = store.path.with_name("keys.secret")
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        open_keyring(store)
    file.chmod(0o600)
    file.write_text("zz\n")
    with pytest.raises(ConfigurationError, match="no server key"):
        open_keyring(store)


def test_the_operators_key_survives_the_loss_of_the_server_key_and_no_other_does(store: Store) -> None:
    old, new = Keyring(b"a" * 32), Keyring(b"b" * 32)
    key = ensure_key(store, old, None, None)
    with store.transaction() as session:
        _, other = old.issue(session, name="other", role="viewer", created_by="test")  # type: ignore[arg-type]
    assert ensure_key(store, new, None, key) == key
    assert Keys(store, new).authenticate(key).name == "operator"
    with pytest.raises(Unauthorized):
        Keys(store, new).authenticate(other)
    with pytest.raises(ConfigurationError, match="Another API key"):
        ensure_key(store, new, key[:-4] + "XXXX", None)


def test_a_key_somebody_made_up_works(store: Store) -> None:
    keyring = Keyring(b"s" * 32)
    for key in ("a-long-enough-key-of-mine", "av_" + "x" * 40 + "_yz" + "q" * 20):
        ensure_key(store, keyring, key, None)
        assert Keys(store, keyring).authenticate(key).name == "operator"
    with pytest.raises(ConfigurationError, match="at least"):
        ensure_key(store, keyring, "short", None)
