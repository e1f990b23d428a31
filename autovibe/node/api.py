"""From a request to a response: authenticate, find the route, check the parameters, call the verb, put it in JSON.

`/api2/json` is the plain form; `/api2/extjs` always answers 200 and says in the body how it went.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

from autovibe.node import multipart, routes
from autovibe.node.agent import AgentError
from autovibe.node.auth import Actor
from autovibe.node.messages import Request, Response
from autovibe.node.monitor import MonitorError
from autovibe.node.parameters import check
from autovibe.node.permissions import WORLD
from autovibe.node.qemu import QemuError
from autovibe.node.refusal import Refusal, faulty, not_implemented
from autovibe.node.state import Call, Page, State, Upload
from autovibe.node.volume import DiskError

logger = logging.getLogger(__name__)

CONTENT_TYPE = "application/json;charset=UTF-8"
"""Compared as a string by a client; no space."""

_METHODS = ("GET", "POST", "PUT", "DELETE")
_BODY_BYTES = 512 << 10
_KNOWN_ERRORS = (AgentError, DiskError, MonitorError, QemuError)


class Api:
    """The API of one node; `uploads` is where files are received."""

    def __init__(self, state: State, uploads: Path) -> None:
        self._state = state
        self._uploads = uploads

    def answer(self, request: Request) -> Response:
        started = time.monotonic()
        path, _, query = request.target.partition("?")
        path = unquote(path)
        form, inner = _split_format(path)
        actor: Actor | None = None
        try:
            actor, data = self._carry_out(request, form, inner, query)
            response = _success(form, data)
        except Refusal as refusal:
            time.sleep(refusal.delay_seconds)
            response = _failure(form, refusal)
        except _KNOWN_ERRORS as error:
            response = _failure(form, Refusal(str(error)))
        except (ConnectionError, TimeoutError):
            raise
        except OSError as error:  # a full disk, mostly
            logger.error("%s %s failed: %s", request.method, path, error)  # noqa: TRY400 - no defect
            response = _failure(form, Refusal(error.strerror or str(error)))
        except Exception:  # a defect: the client gets a clean 500, the log the traceback
            logger.exception("%s %s ran into a defect.", request.method, path)
            response = _failure(form, Refusal("internal error, see the node's log"))
        took = (time.monotonic() - started) * 1000
        logger.debug("%s %s %s %d %.0f ms", actor.name if actor else "-", request.method, path, response.status, took)
        return response

    def _carry_out(self, request: Request, form: str, path: str, query: str) -> tuple[Actor, Any]:
        if not form:
            raise Refusal(f"no such file '{path}'", status=404, is_bare=True)
        if request.method not in _METHODS:
            raise Refusal(f"method '{request.method}' not available", status=501, is_bare=True)
        found = routes.find(request.method, path)
        is_public = found is not None and found[0].needs == WORLD
        takes_file = found is not None and found[0].takes_file
        actor = Actor("") if is_public else self._authenticate(request, is_csrf_exempt=takes_file)
        if found is None:
            raise not_implemented(f"Method '{request.method} {path}' not implemented")
        route, named = found
        if named.get("node", self._state.name) not in (self._state.name, "localhost"):
            name = named["node"]
            raise Refusal(
                f"hostname lookup '{name}' failed - failed to get address info for: {name}: "
                "Temporary failure in name resolution"
            )
        if takes_file:
            given, upload = multipart.receive(request.headers.get("content-type", ""), request.body(), self._uploads)
        else:
            given, upload = _parameters(request, query), None
        return actor, self._call(route, actor, {**given, **named}, upload)

    def _call(self, route: routes.Route, actor: Actor, given: dict[str, Any], upload: Upload | None) -> Any:
        try:
            call = Call(actor, check(route.table, given), upload)
        except BaseException:
            if upload is not None:
                upload.path.unlink(missing_ok=True)
            raise
        return route.verb(self._state, call)

    def _authenticate(self, request: Request, *, is_csrf_exempt: bool) -> Actor:
        return self._state.auth.authenticate(request.method, request.headers, is_csrf_exempt=is_csrf_exempt)


def _split_format(path: str) -> tuple[str, str]:
    """The answer's form and the path within the API; no form outside of it."""
    for form in ("json", "extjs"):
        prefix = f"/api2/{form}"
        if path == prefix or path.startswith(f"{prefix}/"):
            return form, path.removeprefix(prefix).rstrip("/") or "/"
    return "", path


def _parameters(request: Request, query: str) -> dict[str, Any]:
    """Those of the body, if there is one, and of the query, which win. A repeated key makes a list."""
    given: dict[str, Any] = {}
    if request.method in ("POST", "PUT"):
        body = request.read(_BODY_BYTES)
        if body is None:
            raise Refusal("for data too large", status=501, is_bare=True)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        given = (
            _json_parameters(body) if kind == "application/json" else _form_parameters(body.decode("utf-8", "replace"))
        )
    return {**given, **_form_parameters(query)}


def _json_parameters(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise faulty({"body": "the body is not valid JSON"}) from None
    if not isinstance(given, dict):
        raise faulty({"body": "the body is not a JSON object"})
    return given


def _form_parameters(text: str) -> dict[str, Any]:
    """Percent-encoded pairs. A body in another form becomes one odd key, which is then refused by name."""
    given: dict[str, Any] = {}
    for name, value in parse_qsl(text, keep_blank_values=True, separator="&"):
        if name in given:
            present = given[name]
            given[name] = [*present, value] if isinstance(present, list) else [present, value]
        else:
            given[name] = value
    return given


def _success(form: str, data: Any) -> Response:
    body = {"data": data.data, "total": data.total} if isinstance(data, Page) else {"data": data}
    return _json(200, "OK", {**body, "success": 1} if form == "extjs" else body)


def _failure(form: str, refusal: Refusal) -> Response:
    if refusal.is_bare:
        return Response(refusal.status, refusal.message, closes=True)
    message = refusal.message if refusal.status == 501 else f"{refusal.message}\n"
    body: dict[str, Any] = {"data": None, "message": message}
    if refusal.errors:
        body["errors"] = refusal.errors
    if form == "extjs":
        return _json(200, "OK", {**body, "success": 0, "status": refusal.status})
    return _json(refusal.status, refusal.message, body, closes=True)


def _json(status: int, reason: str, body: dict[str, Any], *, closes: bool = False) -> Response:
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return Response(status, reason, data, CONTENT_TYPE, closes=closes)
