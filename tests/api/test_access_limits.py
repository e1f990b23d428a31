"""Rate limits: 429 with when to come back, told by headers before, and never more in a minute than the limit."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from sqlalchemy import text
from sqlmodel import delete, select

from autovibe import app
from autovibe.domain import Machine, RateLease
from autovibe.errors import RateLimited
from autovibe.hub import limits
from autovibe.hub.limits import Limits, old_leases
from autovibe.sdk import Client, connection
from autovibe.store import Store
from tests.api.conftest import KEY, Served, error_of, serve, serving, settings_of
from tests.conftest import BACKENDS

LIMIT, HEAVY = 30, 4
NOON = 1_795_000_020.0  # 0 s into a minute


@pytest.fixture(scope="module", params=BACKENDS)
def limited(request: pytest.FixtureRequest) -> Iterator[Served]:
    """A hub that allows little."""
    with serving(request, rate_limit_per_minute=LIMIT, rate_limit_heavy_per_minute=HEAVY) as found:
        yield found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The minute the limits live in; each test begins in one of its own."""
    fake = SimpleNamespace(now=NOON + 60 * (uuid4().int % 10**6))
    monkeypatch.setattr(limits, "time", SimpleNamespace(time=lambda: fake.now))
    return fake


def key_of(served: Served, **more: Any) -> httpx2.Client:
    with served.hub.store.transaction() as session:
        given: dict[str, Any] = {"role": "operator", **more}
        _, key = served.hub.keyring.issue(session, name=f"k-{uuid4().hex[:6]}", created_by="test", **given)
    headers = {"Authorization": f"Bearer {key}"}
    return httpx2.Client(base_url=f"{served.url}/api/v1", headers=headers, timeout=30, trust_env=False)


def test_the_limit_is_told_kept_and_whole_again_with_the_next_minute(limited: Served, clock: SimpleNamespace) -> None:
    with key_of(limited) as http:
        answers = [http.get("/projects") for _ in range(LIMIT + 1)]
        assert [answer.status_code for answer in answers] == [200] * LIMIT + [429]
        assert [int(a.headers["X-RateLimit-Remaining"]) for a in answers] == [*range(LIMIT - 1, -1, -1), 0]
        assert {a.headers["X-RateLimit-Limit"] for a in answers} == {str(LIMIT)}
        assert {int(a.headers["X-RateLimit-Reset"]) for a in answers} == {int(clock.now) + 60}
        clock.now += 21
        late = http.get("/no-such-route")
        error = error_of(late, 429, "RATE_LIMITED")
        assert (late.headers["Retry-After"], error.details["limit"]) == ("39", LIMIT)
        assert http.get("/health").status_code == 200
        assert "X-RateLimit-Limit" not in http.get("/health").headers
        with key_of(limited) as another:
            assert another.get("/projects").status_code == 200
        clock.now += 39
        assert http.get("/projects").headers["X-RateLimit-Remaining"] == str(LIMIT - 1)


def test_heavy_verbs_have_their_own_limit(limited: Served, clock: SimpleNamespace) -> None:
    project = limited.project()
    with key_of(limited) as http:
        spawned = [http.post("/machines", json={"project_uuid": str(project)}) for _ in range(HEAVY + 1)]
        assert [answer.status_code for answer in spawned] == [201] * HEAVY + [429]
        assert [int(a.headers["X-RateLimit-Remaining"]) for a in spawned] == [3, 2, 1, 0, 0]
        assert http.post(f"/machines/{uuid4()}/checkpoint", json={}).status_code == 429
        assert http.get("/machines").headers["X-RateLimit-Limit"] == str(LIMIT)
        with limited.hub.store.reading() as session:
            assert len(session.exec(select(Machine.uuid).where(Machine.project_uuid == project)).all()) == HEAVY


def test_event_streams_take_nothing_of_the_limit(limited: Served, clock: SimpleNamespace) -> None:
    with key_of(limited) as http:
        for _ in range(LIMIT + 3):
            assert http.get("/events").status_code == 200


def test_keys_cannot_be_guessed_quickly_and_a_known_one_goes_on(limited: Served, clock: SimpleNamespace) -> None:
    guesses = [f"av_0badcafe_{uuid4().hex}" for _ in range(HEAVY + 3)]
    with httpx2.Client(base_url=f"{limited.url}/api/v1", trust_env=False) as http:

        def ask(key: str) -> httpx2.Response:
            return http.get("/projects", headers={"Authorization": f"Bearer {key}"})

        assert ask(KEY).status_code == 200
        assert [ask(guess).status_code for guess in guesses] == [401] * HEAVY + [429] * 3
        assert "keys that are none" in error_of(ask("av_x_y"), 429, "RATE_LIMITED").message
        assert ask(KEY).status_code == 200
        error_of(http.get("/projects"), 401, "UNAUTHORIZED")  # no key is no guess
        clock.now += 60
        assert ask(guesses[0]).status_code == 401


def test_an_ipv6_network_counts_as_one_client(store: Store) -> None:
    found = Limits(store, 100, 2)
    found.note_failure("2001:db8::1")
    found.note_failure("2001:db8::ffff:2")
    with pytest.raises(RateLimited):
        found.refuse_guessing("2001:db8::3")
    found.refuse_guessing("2001:db8:0:1::3")
    found.refuse_guessing("192.0.2.1")


def test_most_requests_ask_no_database(store: Store, clock: SimpleNamespace) -> None:
    found, asked = Limits(store, 100, 10), 0
    for _ in range(100):
        if found.take("k", 100) is None:
            asked += 1
            found.lease("k", 100)
    assert asked == 10
    with pytest.raises(RateLimited):
        found.lease("k", 100)


HAMMER = """
import sys
from types import SimpleNamespace
from autovibe.errors import RateLimited
from autovibe.hub import limits
from autovibe.store import Store

limits.time = SimpleNamespace(time=lambda: 1_795_000_020.0)
store = Store(sys.argv[1])
found, taken = limits.Limits(store, 100, 10), 0
print("ready", flush=True)
sys.stdin.readline()
try:
    while True:
        found.lease("k", 100)
        taken += 1
except RateLimited:
    print(taken)
store.close()
"""


def test_hub_processes_together_never_pass_the_limit(database_url: str) -> None:
    argv = [sys.executable, "-c", HAMMER, database_url]
    hubs = [subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for hub in hubs:
        assert hub.stdout is not None
        assert hub.stdout.readline() == "ready\n"
    taken = [int(hub.communicate("go\n", timeout=60)[0]) for hub in hubs]
    assert sum(taken) == 100, taken


def test_two_hubs_serve_no_more_than_one(limited: Served, clock: SimpleNamespace) -> None:
    path = Path(tempfile.mkdtemp(prefix="av-G-", dir="/tmp"))
    database = limited.hub.store.url.render_as_string(hide_password=False)
    more = {"database_url": database, "rate_limit_per_minute": LIMIT, "rate_limit_heavy_per_minute": HEAVY}
    other = app.build(settings_of(path, **more))
    other.start()
    url, stop = serve(other)
    with key_of(limited) as http:
        there = f"{url}/api/v1/projects"
        answers = [http.get(place).status_code for _ in range(LIMIT) for place in ("/projects", there)]
    assert answers.count(200) == LIMIT
    assert answers.count(429) == LIMIT
    stop()
    other.close()
    shutil.rmtree(path, ignore_errors=True)


def test_a_tenth_is_leased_and_what_is_unused_is_missing_to_others(store: Store, clock: SimpleNamespace) -> None:
    one, two = Limits(store, 100, 10), Limits(store, 100, 10)
    one.lease("k", 100)
    for _ in range(90):
        two.lease("k", 100)
    with pytest.raises(RateLimited):
        two.lease("k", 100)


def test_old_leases_are_pruned(store: Store, clock: SimpleNamespace) -> None:
    Limits(store, 100, 10).lease("k", 100)
    clock.now += 7 * 60
    Limits(store, 100, 10).lease("k", 100)
    with store.transaction() as session:
        session.exec(delete(RateLease).where(old_leases()))
    with store.reading() as session:
        assert session.execute(text("SELECT count(*) FROM rate_lease")).scalar_one() == 1


def test_no_limit_means_no_headers(limited: Served) -> None:
    hub = limited.hub
    before = hub.limits
    hub.limits = Limits(hub.store, 0, 0)
    try:
        with key_of(limited) as http:
            assert all(http.get("/projects").status_code == 200 for _ in range(LIMIT + 5))
            assert "X-RateLimit-Limit" not in http.get("/projects").headers
    finally:
        hub.limits = before


def test_the_sdk_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(connection, "time", SimpleNamespace(sleep=slept.append, monotonic=time.monotonic))
    turns = iter([("429", "7"), ("429", "3"), ("200", "")])
    body = {"projects": [], "total_count": 0, "has_more": False, "next_offset": None}

    def answer(request: httpx2.Request) -> httpx2.Response:
        status, seconds = next(turns)
        return httpx2.Response(int(status), headers={"Retry-After": seconds} if seconds else {}, json=body)

    with Client("http://127.0.0.1:1", "k") as client:
        client.connection._http = httpx2.Client(base_url="http://h/api/v1", transport=httpx2.MockTransport(answer))
        assert client.projects.list().total_count == 0
        assert [int(seconds) for seconds in slept] == [7, 3]
        turns = iter([("429", "3600")])
        with pytest.raises(Exception, match="429"):
            client.projects.list()
