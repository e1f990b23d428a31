"""Every way a request can go wrong answers the same envelope."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from uuid import UUID, uuid4

import httpx2
import pytest

from autovibe.api.log import _Redacting
from autovibe.api.requests import BODY_LIMIT
from autovibe.errors import CLASSES
from autovibe.hub import projects
from tests.api.conftest import Served, error_of

NOWHERE = UUID("5d6f1c9a-5a4b-4c3d-8e2f-0123456789ab")


def test_a_key_is_required_before_anything_else(served: Served) -> None:
    bare = httpx2.Client(base_url=f"{served.url}/api/v1", trust_env=False)
    answers = [
        bare.get("/projects"),
        bare.post("/projects", content=b"{no json"),
        bare.get("/no-such-route"),
        bare.get("/projects", headers={"Authorization": "Bearer av_0badcafe_wrong"}),
        bare.get("/projects", headers={"Authorization": "Bearer"}),
        bare.get("/projects", headers={"Authorization": "Basic abc"}),
        bare.get("/projects", headers={"Authorization": b"Bearer \xff\xfe"}),
    ]
    for answer in answers:
        error_of(answer, 401, "UNAUTHORIZED")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert bare.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nothing"),
        ("DELETE", "/projects"),
        ("PATCH", f"/machines/{NOWHERE}"),
        ("GET", "/projects/"),
        ("GET", "/../health/x"),
    ],
)
def test_an_unknown_route_or_method_is_404(served: Served, method: str, path: str) -> None:
    error_of(served.http.request(method, path), 404, "NOT_FOUND")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/projects/{}"),
        ("GET", "/projects/{}/checkpoints"),
        ("GET", "/machines/{}"),
        ("GET", "/machines/{}?wait=1"),
        ("GET", "/machines/{}/logs"),
        ("GET", "/machines/{}/logs?follow=1"),
        ("GET", "/machines/{}/ssh"),
        ("POST", "/machines/{}/terminate"),
        ("POST", "/machines/{}/checkpoint"),
        ("GET", "/checkpoints/{}"),
        ("GET", "/checkpoints/{}?include=manifest"),
        ("POST", "/checkpoints/{}/spawn"),
        ("GET", "/checkpoints/{}/diff/" + str(NOWHERE)),
        ("GET", "/operations/{}?wait=1"),
    ],
)
def test_a_malformed_id_is_400_and_an_unknown_one_404(served: Served, method: str, path: str) -> None:
    body = {} if method == "POST" else None
    unknown = error_of(served.http.request(method, path.format(NOWHERE), json=body), 404, "NOT_FOUND")
    assert f"'{NOWHERE}'" in unknown.message
    malformed = error_of(served.http.request(method, path.format("not-a-uuid"), json=body), 400, "INVALID_REQUEST")
    assert malformed.details["fields"][0]["field"].startswith("path.")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "body.name"),
        ({"name": "ok", "colour": "red"}, "body.colour"),
        ({"name": "bad name"}, "body.name"),
        ({"name": "-x"}, "body.name"),
        ({"name": "x" * 64}, "body.name"),
        ({"name": "ok\n"}, "body.name"),
        ({"name": "ok", "greediness": 1.5}, "body.greediness"),
        ({"name": "ok", "greediness": float("nan")}, "body.greediness"),
        ({"name": "ok", "description": "a\u0000b"}, "body.description"),
        ({"name": "ok", "description": "\ud800"}, "body.description"),
        ({"name": "ok", "resource_budgets": {"daily_money": -1}}, "body.resource_budgets.daily_money"),
        ({"name": "ok", "resource_budgets": {"daily_money": 1e300}}, "body.resource_budgets.daily_money"),
        ({"name": "ok", "resource_budgets": {"daily_money": {"micros": 2**70}}}, "body.resource_budgets.daily_money"),
        ({"name": "ok", "resource_budgets": {"daily_api_calls": 2**40}}, "body.resource_budgets.daily_api_calls"),
        ([], "body"),
    ],
)
def test_a_malformed_order_names_its_fields(served: Served, body: object, field: str) -> None:
    answer = served.http.post("/projects", content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = error_of(answer, 400, "INVALID_REQUEST")
    assert any(fault["field"].startswith(field) for fault in error.details["fields"]), error.details


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"null", b'"x"', b"[" * 100_000])
def test_a_body_that_is_no_order_is_400(served: Served, content: bytes) -> None:
    answer = served.http.post("/projects", content=content, headers={"Content-Type": "application/json"})
    error_of(answer, 400, "INVALID_REQUEST")


@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_a_body_nested_too_deeply_under_an_idempotency_key_is_400(served: Served, kind: str) -> None:
    headers = {"Content-Type": kind, "Idempotency-Key": "deep"}
    error_of(served.http.post("/projects", content=b"[" * 100_000, headers=headers), 400, "INVALID_REQUEST")


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=201", "offset=-1", "offset=99999999999999999999", "status=asleep", "project_uuid=x"]
)
def test_a_malformed_query_is_400(served: Served, query: str) -> None:
    error_of(served.http.get(f"/machines?{query}"), 400, "INVALID_REQUEST")


@pytest.mark.parametrize("seconds", ["-1", "301", "nan", "inf", "soon"])
def test_a_wait_is_bounded(served: Served, seconds: str) -> None:
    error_of(served.http.get(f"/operations/{NOWHERE}?wait={seconds}"), 400, "INVALID_REQUEST")


def test_a_body_above_the_limit_is_refused_announced_or_not(served: Served) -> None:
    def pieces(total: int) -> Iterator[bytes]:
        for _ in range(total // 65536):
            yield b" " * 65536

    announced = served.http.post("/projects", content=b" " * (BODY_LIMIT + 1))
    streamed = served.http.post("/projects", content=pieces(BODY_LIMIT + 2 * 65536))
    for answer in (announced, streamed):
        assert "16 MiB" in error_of(answer, 400, "INVALID_REQUEST").message
    within = served.http.post("/projects", content=pieces(BODY_LIMIT))
    assert "16 MiB" not in error_of(within, 400, "INVALID_REQUEST").message
    assert served.get("/projects").status_code == 200


def test_a_crash_is_500_and_the_log_holds_the_traceback(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(projects, "index", crash)
    with caplog.at_level(logging.ERROR):
        answer = served.http.get("/projects", headers={"X-Request-Id": "my-id.1"})
    error = error_of(answer, 500, "INTERNAL_ERROR")
    assert error.request_id == "my-id.1"
    assert "secret detail" not in answer.text
    assert "secret detail" in caplog.text
    assert "Traceback" in caplog.text


def test_what_a_client_sends_looks_like_no_line_of_the_log(served: Served) -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "told %s", ("\x1b[2J\r\n2026-01-01 INFO forged\x9b",), None)
    text = _Redacting(["topsecret"]).format(record)
    assert text.endswith("told \\x1b[2J\\x0d\n    2026-01-01 INFO forged\\x9b")
    error_of(served.http.get("/machines/%0a%1b[2J"), 400, "INVALID_REQUEST")
    error_of(served.http.get(f"/machines/{NOWHERE}/logs", headers={"Last-Event-ID": b"\xb2"}), 404, "NOT_FOUND")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/machines", {"prompt": "\ud800"}),
        ("/machines", {"file_modifications": {"/workspace/\ud800": "x"}}),
        ("/machines", {"file_modifications": {"/workspace/a": "\ud800"}}),
        ("/machines", {"\ud800": 1}),
        (f"/machines/{NOWHERE}/exec", {"argv": ["\ud800"]}),
        (f"/machines/{NOWHERE}/exec", {"script": "true", "env": {"A": "\ud800"}}),
        (f"/machines/{NOWHERE}/exec", {"script": "true", "env": {"\ud800": "a"}}),
        (f"/machines/{NOWHERE}/terminate", {"reason": "\ud800"}),
    ],
)
def test_text_that_is_no_unicode_is_400(served: Served, path: str, body: dict[str, object]) -> None:
    whole = {"project_uuid": str(NOWHERE), **body} if path == "/machines" else body
    answer = served.http.post(path, content=json.dumps(whole), headers={"Content-Type": "application/json"})
    error_of(answer, 400, "INVALID_REQUEST")


def test_a_request_id_that_is_none_is_replaced(served: Served) -> None:
    answer = served.http.get("/projects", headers={"X-Request-Id": "a b\tc"})
    assert answer.headers["X-Request-Id"] != "a b\tc"
    assert answer.headers["X-Request-Id"].isalnum()


def test_a_hypervisor_that_is_down_says_when_to_try_again(served: Served) -> None:
    answer = served.post("/projects", {"name": f"p-{uuid4().hex[:8]}"})
    error = error_of(answer, 500, "HYPERVISOR_UNAVAILABLE")
    assert int(answer.headers["Retry-After"]) > 0
    assert "'" in error.message or "Proxmox" in error.message


def test_every_status_is_one_of_the_reference() -> None:
    from autovibe.api.errors import HTTP_STATUS

    assert set(HTTP_STATUS) == set(CLASSES)
    assert set(HTTP_STATUS.values()) <= {400, 401, 403, 404, 409, 429, 500}
