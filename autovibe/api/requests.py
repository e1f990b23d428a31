"""What happens to every request before a route sees it: a request id and an access line, a key, a bounded body.

Pure ASGI, so that a stream passes through as it comes.
"""

from __future__ import annotations

import contextvars
import logging
import re
import time
from collections import deque
from urllib.parse import quote
from uuid import uuid4

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autovibe import schemas
from autovibe.api.errors import envelope
from autovibe.errors import AutovibeError, InvalidRequest, Unauthorized
from autovibe.hub.access import Keys

logger = logging.getLogger("autovibe.access")

BODY_LIMIT = 16 * 1024 * 1024
_DRAIN_LIMIT = 4 * BODY_LIMIT  # how much of a body that is too large is read, so that its sender hears why
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
"""The id of the request this code runs for; log lines carry it."""


class Traffic:
    """What the api has answered lately, for the health check."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float, bool]] = deque(maxlen=1000)

    def note(self, seconds: float, is_failure: bool) -> None:
        self._recent.append((time.monotonic(), seconds, is_failure))

    def health(self) -> schemas.ServiceHealth:
        recent = [(seconds, failed) for at, seconds, failed in list(self._recent) if at > time.monotonic() - 300]
        if not recent:
            return schemas.ServiceHealth(status="healthy")
        ordered = sorted(seconds for seconds, _ in recent)
        failures = sum(failed for _, failed in recent)
        latency = round(ordered[len(ordered) // 2] * 1000, 1)
        if failures > max(len(recent) // 2, 5):
            return schemas.ServiceHealth(status="degraded", message="Most answers are errors.", latency_ms=latency)
        return schemas.ServiceHealth(status="healthy", latency_ms=latency)


class Requests:
    """Gives each request an id (the client's own, where it is one) and writes one line when it has been answered."""

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self._app = app
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        identifier = given if _REQUEST_ID.match(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = identifier
        token = request_id.set(identifier)
        start = time.perf_counter()
        status, is_answered = 0, False

        async def answer(message: Message) -> None:
            nonlocal status, is_answered
            is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = identifier
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except Exception:
            # The framework logs and answers a defect and then raises it all the same; the server would cut the
            # connection under the client's next request.
            if not is_answered:
                raise
        finally:
            seconds = time.perf_counter() - start
            if not _may_wait(scope):
                self._traffic.note(seconds, status >= 500)
            actor = getattr(scope["state"].get("actor"), "name", "-")
            # The path alone: a query may hold what is nobody's business.
            logger.info("%s %s %s %d %.1f ms", actor, scope["method"], quote(scope["path"]), status, seconds * 1000)
            request_id.reset(token)


def _may_wait(scope: Scope) -> bool:
    """Whether the client asked to be kept waiting, so that the time taken says nothing of the api."""
    query = scope["query_string"]
    return b"wait" in query or b"follow" in query or scope["path"].endswith("/exec")


class BodyLimit:
    """Refuses a body above 16 MiB, whether its length was announced or not."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > BODY_LIMIT:
            await self._refuse(scope, receive, send, int(announced) <= _DRAIN_LIMIT)
            return
        taken, is_too_large, is_more = 0, False, True

        async def counted() -> Message:
            nonlocal taken, is_too_large, is_more
            message = await receive()
            taken += len(message.get("body", b""))
            is_more = bool(message.get("more_body"))
            if taken > BODY_LIMIT:
                is_too_large = True
                raise _TooLarge
            return message

        async def answer(message: Message) -> None:
            if not is_too_large:
                await send(message)

        try:
            await self._app(scope, counted, answer)
        except _TooLarge:
            logger.debug("A body above the limit broke off its request.")
        if is_too_large:
            await self._refuse(scope, receive, send, is_more)

    @staticmethod
    async def _refuse(scope: Scope, receive: Receive, send: Send, may_drain: bool) -> None:
        drained, is_more = 0, may_drain
        while is_more and drained <= _DRAIN_LIMIT:
            message = await receive()
            drained += len(message.get("body", b""))
            is_more = message["type"] == "http.request" and bool(message.get("more_body"))
        error = InvalidRequest(
            f"The body is larger than {BODY_LIMIT // 1024**2} MiB.", details={"limit_bytes": BODY_LIMIT}
        )
        response = envelope(error, str(scope["state"]["request_id"]))
        response.headers["Connection"] = "close"
        await response(scope, receive, send)


class _TooLarge(Exception):
    """The body has passed the limit."""


class KeyRequired:
    """Lets only requests with a valid key through, before any route could forget to ask; `open_paths` need none."""

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            try:
                scope["state"]["actor"] = await self._authenticate(Headers(scope=scope))
            except AutovibeError as error:
                await envelope(error, str(scope["state"]["request_id"]))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _authenticate(self, headers: Headers) -> object:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized
        known = self._keys.cached(key.strip())
        return known if known is not None else await run_in_threadpool(self._keys.authenticate, key.strip())
