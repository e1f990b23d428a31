"""From a request to a response: authenticate, find the route, check the parameters, call the verb, put it in JSON.

`/api2/json` is the plain form; `/api2/extjs` always answers 200 and says in the body how it went, `/api2/htmljs` is the
same as HTML text (for upload forms of web pages). A real Proxmox also has `/api2/html`, pages to browse the API with,
and `png` and `spiceconfig` for what this node does not make: here they are refused as a form nobody knows is there.
"""

from __future__ import annotations

import html
import json
import logging
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_plus

from autovibe.node import routes
from autovibe.node.access import permissions
from autovibe.node.access.auth import Actor
from autovibe.node.access.permissions import WORLD
from autovibe.node.disks.volume import DiskError
from autovibe.node.http import multipart, websocket
from autovibe.node.http.faults import Cut, Faults
from autovibe.node.http.messages import Channel, Request, Response
from autovibe.node.refusal import Refusal, not_implemented
from autovibe.node.schema.parameters import check
from autovibe.node.state import Call, Page, State, Upload
from autovibe.node.vm.agent import AgentError
from autovibe.node.vm.monitor import MonitorError
from autovibe.node.vm.qemu import QemuError

logger = logging.getLogger(__name__)

CONTENT_TYPE = "application/json;charset=UTF-8"
"""Compared as a string by a client; no space."""

_FORMS = ("json", "extjs", "htmljs")
_PLACE = re.compile(r"/api2/+([a-z][a-z0-9]+)(/.*)?", re.DOTALL)
_BODY_BYTES = 512 << 10
_KNOWN_ERRORS = (AgentError, DiskError, MonitorError, QemuError)


class Api:
    """The API of one node; `uploads` is where files are received. `faults` spoil calls on demand."""

    def __init__(self, state: State, uploads: Path, faults: Faults | None = None) -> None:
        self._state = state
        self._uploads = uploads
        self._faults = faults

    def answer(self, request: Request) -> Response:
        started = time.monotonic()
        path, _, query = request.target.partition("?")
        path = unquote(path)
        match = _PLACE.fullmatch(path)
        form, inner = (match[1], (match[2] or "").rstrip("/") or "/") if match else ("", path)
        actor: Actor | None = None
        try:
            actor, data = self._carry_out(request, form, inner, query)
            response = _success(request, form, data)
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
            reason = "no such uri" if path.startswith("/api2") else f"no such file '{path}'"
            raise Refusal(reason, status=501, is_bare=True)
        found = routes.find(request.method, path)
        is_public = found is not None and found[0].needs == WORLD
        takes_file = found is not None and found[0].takes_file
        actor = Actor("") if is_public else self._authenticate(request, is_csrf_exempt=takes_file)
        if form not in _FORMS:
            raise Refusal(f"no formatter for uri {path}, {form}", status=501, is_bare=True)
        if request.method not in ("POST", "PUT") and request.length:
            raise Refusal(f"Unexpected content for method '{request.method}'", status=501, is_bare=True)
        if found is None:
            raise not_implemented(f"Method '{request.method} {path}' not implemented")
        route, named = found
        if named.get("node") == "localhost":
            named["node"] = self._state.name
        given, upload = {} if takes_file else _parameters(request, query), None
        self._require(request, route, actor, {**given, **named})
        if named.get("node", self._state.name) != self._state.name:
            name = named["node"]
            raise Refusal(
                f"hostname lookup '{name}' failed - failed to get address info for: {name}: "
                "Temporary failure in name resolution"
            )
        if takes_file:
            given, upload = multipart.receive(request.headers.get("content-type", ""), request.body(), self._uploads)
        return actor, self._call(route, actor, {**given, **named}, upload)

    def _require(self, request: Request, route: routes.Route, actor: Actor, given: dict[str, Any]) -> None:
        try:
            permissions.require(route.needs, self._state.access, actor, given)
        except Refusal:
            if route.takes_file:
                for _ in request.body():  # dropped: a client reads the answer when it has sent its file
                    pass
            raise

    def _call(self, route: routes.Route, actor: Actor, given: dict[str, Any], upload: Upload | None) -> Any:
        try:
            call = Call(actor, check(route.table, given), upload)
            # Once more with the checked values: VM "0100" has become VM 100.
            permissions.require(route.needs, self._state.access, actor, call.parameters)
        except BaseException:
            if upload is not None:
                upload.path.unlink(missing_ok=True)
            raise
        if self._faults is None:
            return route.verb(self._state, call)
        return self._faults.carry_out(self._state, route.method, route.path, call, route.verb)

    def _authenticate(self, request: Request, *, is_csrf_exempt: bool) -> Actor:
        return self._state.auth.authenticate(request.method, request.headers, is_csrf_exempt=is_csrf_exempt)


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
    given = {**given, **_form_parameters(query)}
    given.pop("_dc", None)  # what web pages add to get past caches
    return given


def _json_parameters(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        reason = f"malformed JSON string, at character offset {getattr(error, 'pos', 0)}"
        raise Refusal(reason, status=501, is_bare=True) from None
    if not isinstance(given, dict):
        raise Refusal("Not a HASH reference", status=501, is_bare=True)
    return given


def _form_parameters(text: str) -> dict[str, Any]:
    """Percent-encoded pairs. A body in another form becomes one odd key, which is then refused by name.

    As with a real one, `;` parts pairs too, and of a value with a bare `=` only what stands before it counts: what a
    client forgets to encode is not put right here, or it would fail on the real one only.
    """
    given: dict[str, Any] = {}
    for pair in re.split("[&;]", text):
        name, equals, rest = pair.partition("=")
        name = unquote_plus(name)
        if not equals:
            given.setdefault(name, "")
            continue
        value = unquote_plus(rest.partition("=")[0])
        if name in given:
            present = given[name]
            given[name] = [*present, value] if isinstance(present, list) else [present, value]
        else:
            given[name] = value
    if given.get("") == "":
        del given[""]
    return given


def _success(request: Request, form: str, data: Any) -> Response:
    cut = None
    if isinstance(data, Cut):
        data, cut = data.data, data.bytes
    if isinstance(data, Response):
        return data
    if isinstance(data, Channel):
        if request.headers.get("upgrade"):
            return websocket.accept(request, data)
        data = data.data
    body = {"data": data.data, "total": data.total} if isinstance(data, Page) else {"data": data}
    if body.get("total") == 0:
        del body["total"]
    is_upload = request.headers.get("content-type", "").startswith("multipart/")
    return _encode(form, 200, "OK", body if form == "json" else {**body, "success": 1}, cut=cut, closes=is_upload)


def _failure(form: str, refusal: Refusal) -> Response:
    if refusal.is_bare:
        return Response(refusal.status, refusal.message, closes=True)
    message = refusal.message if refusal.status == 501 else f"{refusal.message}\n"
    body: dict[str, Any] = {"data": None, "message": message}
    if refusal.errors:
        body["errors"] = refusal.errors
    if form != "json":
        return _encode(form, 200, "OK", {**body, "success": 0, "status": refusal.status})
    return _encode(form, refusal.status, refusal.message, body, closes=True)


def _encode(form: str, status: int, reason: str, body: dict[str, Any], **marks: Any) -> Response:
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    if form == "htmljs":
        data = html.escape(text).encode("ascii", "xmlcharrefreplace")
        return Response(status, reason, data, "text/html;charset=UTF-8", **marks)
    return Response(status, reason, text.encode("utf-8", "replace"), CONTENT_TYPE, **marks)
