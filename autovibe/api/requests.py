"""What happens to every request before its key is looked at (api.guard): a request id, an access line, a bounded body.

Pure ASGI, so that a stream passes through as it comes.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from urllib.parse import quote
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autovibe import schemas
from autovibe.api.errors import envelope
from autovibe.api.metrics import Meter
from autovibe.domain.trace import request_id
from autovibe.errors import InternalError, InvalidRequest
from autovibe.hub.traffic import Tally

logger = logging.getLogger("autovibe.access")

BODY_LIMIT = 16 * 1024 * 1024
_DRAIN_LIMIT = 4 * BODY_LIMIT  # how much of a body that is too large is read, so that its sender hears why
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")


class Traffic:
    """What the api has answered lately, for the health check."""

    def __init__(self, tally: Tally) -> None:
        self._recent: deque[tuple[float, float, bool]] = deque(maxlen=1000)
        self._tally = tally

    def note(self, seconds: float, is_failure: bool, *, is_timed: bool = True) -> None:
        """One answer; the time of a request that asked to be kept waiting says nothing."""
        self._tally.note(seconds if is_timed else None, is_failure)
        if not is_timed:
            return
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

    def __init__(self, app: ASGIApp, traffic: Traffic, meter: Meter) -> None:
        self._app = app
        self._traffic = traffic
        self._meter = meter

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
            if status and not is_answered:
                raise
            if not status:  # it never came as far as the framework
                logger.exception("%s %s met a defect.", scope["method"], quote(scope["path"]))
                await envelope(InternalError(), identifier)(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - start
            is_timed = not _may_wait(scope)
            self._traffic.note(seconds, status >= 500, is_timed=is_timed)
            self._meter.note(scope, status, seconds, is_timed=is_timed)
            actor = getattr(scope["state"].get("actor"), "name", "-")
            # The path alone: a query may hold what is nobody's business.
            what = (actor, scope["method"], quote(scope["path"]), status, seconds * 1000)
            logger.info("%s %s %s %d %.1f ms", *what, extra={"duration": seconds})
            request_id.reset(token)


def _may_wait(scope: Scope) -> bool:
    """Whether the client asked to be kept waiting, so that the time taken says nothing of the api."""
    query = scope["query_string"]
    return b"wait" in query or b"follow" in query or scope["path"].endswith(("/exec", "/events"))


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
