"""Who may pass: a key, a limit, a rule. And what the audit log hears of it.

Guard      around the whole application, for every request: the key becomes an actor (401), a request of its limit
           is taken (429), the answer carries X-RateLimit-*, and what changed nothing in a transaction of its own
           (refusals, failures) is put into the audit log; a long poll or stream ends when its key does
Guarded    the class of every v1 route: its rule is enforced before the body is read (403), heavy verbs take from
           their own limit (429), and the audit line of a change is opened for the transaction that will write it

@router.get("/machines/{machine_uuid}")
@needs(Role.viewer, machine_uuid="machine", own_machine=True)
def show(…)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast
from uuid import UUID

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autovibe.api.errors import envelope
from autovibe.domain import trace
from autovibe.domain.actor import Actor
from autovibe.errors import AutovibeError, RateLimited, Unauthorized
from autovibe.hub import Hub, rules, trail
from autovibe.hub.limits import WINDOW_SECONDS, Standing
from autovibe.hub.rules import Rule, Verb
from autovibe.types import Outcome, Role

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
Handler = Callable[[Request], Coroutine[Any, Any, Response]]

logger = logging.getLogger(__name__)

KNOWN_SECONDS = 0.5
"""A request that has gone on for so long looks again whether its key is good, before it answers or goes on."""
_ADMINS_ONLY = Rule()
_REFUSED = (401, 403, 429)


def needs(
    role: Role, *, narrows: bool = False, own_machine: bool = False, is_heavy: bool = False, **objects: str
) -> Callable[[Endpoint], Endpoint]:
    """The rule of a route, beside it. `objects`: every uuid of the path, with the noun of what it names.

    `narrows`: the verb itself keeps to the project of a scoped key. `own_machine`: the machine's own key may call it.
    """
    rule = Rule(role=role, objects=objects, narrows=narrows, own_machine=own_machine, is_heavy=is_heavy)

    def mark(endpoint: Endpoint) -> Endpoint:
        cast(Any, endpoint).access = rule
        return endpoint

    return mark


def open_to_all(endpoint: Endpoint) -> Endpoint:
    """Marks a route that needs no key; its path is in `v1.OPEN_PATHS` as well."""
    cast(Any, endpoint).access = None
    return endpoint


class Guarded(APIRoute):
    """A route that looks at its rule first; without one it is for admins alone."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        rule = getattr(endpoint, "access", _ADMINS_ONLY)
        if rule is not None:
            options["openapi_extra"] = {**(options.get("openapi_extra") or {}), "x-required-role": str(rule.role)}
        super().__init__(path, endpoint, **options)

    @property
    def has_rule(self) -> bool:
        return hasattr(self.endpoint, "access")

    @property
    def verb(self) -> Verb | None:
        """What the route asks of a key, None for a route that is open to all."""
        rule = getattr(self.endpoint, "access", _ADMINS_ONLY)
        method = min(set(self.methods or ()) - {"HEAD"}, default="GET")
        return None if rule is None else Verb(method, self.path.removeprefix("/api/v1"), rule)

    def get_route_handler(self) -> Handler:
        handler, verb = super().get_route_handler(), self.verb
        if verb is None:
            return handler
        status = self.status_code or 200

        async def guarded(request: Request) -> Response:
            await _admit(request, verb, status)
            return await handler(request)

        return guarded


async def _admit(request: Request, verb: Verb, status: int) -> None:
    """Raises Forbidden, NotFound, RateLimited; after that only the verb decides."""
    scope = request.scope
    hub, actor = cast(Hub, request.app.state.hub), cast(Actor, scope["state"]["actor"])
    line, scope["state"]["verb"] = None, verb
    if not verb.is_reading:
        line = _line(scope, verb, status)
        scope["state"]["line"] = line
    rules.require(actor, verb)
    if rules.looks_at_objects(actor):
        await run_in_threadpool(rules.require_own, hub.store, actor, verb, request.path_params)
    if verb.rule.is_heavy and hub.limits.heavy_per_minute:
        await _take(scope, hub, f"{actor.identity[:16]}:heavy", hub.limits.heavy_per_minute)
    if line is not None:
        trail.current.set(line)


async def _take(scope: Scope, hub: Hub, bucket: str, limit: int) -> None:
    """Take one request from a bucket, which the answer then tells of; only one in ten or so asks the database."""
    state = scope["state"]
    try:
        state["standing"] = hub.limits.take(bucket, limit) or await run_in_threadpool(hub.limits.lease, bucket, limit)
    except RateLimited as error:
        minute = int(error.details["resets_at"]) // WINDOW_SECONDS - 1
        state["standing"] = Standing(bucket, limit, minute, left=0, beyond=0)
        raise


def _line(scope: Scope, verb: Verb, status: int) -> trail.Line:
    actor: Actor | None = scope["state"].get("actor")
    client = scope.get("client")
    line = trail.Line(
        actor=actor.name if actor is not None else "",
        key_id=actor.key_id if actor is not None else "",
        verb=verb.label,
        status=status,
        request_id=str(scope["state"].get("request_id", "-")),
        client=str(client[0]) if client else "",
        project_uuid=actor.project_uuid if actor is not None else None,
    )
    for parameter, noun in verb.rule.objects.items():
        uuid = _uuid(scope.get("path_params", {}).get(parameter))
        if uuid is not None and not line.is_named:
            line.object_kind, line.object_uuid, line.is_named = noun, uuid, True
            line.project_uuid = uuid if noun == "project" else line.project_uuid
    return line


def _uuid(word: object) -> UUID | None:
    try:
        return UUID(str(word))
    except ValueError:
        return None


class Guard:
    """Lets only requests with a valid key through, before any route could forget to ask; `open_paths` need none.

    `unlimited_paths` (event streams) need a key and take nothing of its limit.
    """

    def __init__(
        self,
        app: ASGIApp,
        hub: Hub,
        routes: list[Guarded],
        *,
        prefix: str,
        open_paths: frozenset[str],
        unlimited_paths: frozenset[str],
    ) -> None:
        self._app, self._hub, self._routes, self._prefix = app, hub, routes, prefix
        self._open_paths, self._unlimited_paths = open_paths, unlimited_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        answer = _Answer(self, scope, receive, send)
        try:
            try:
                await self._enter(scope)
            except AutovibeError as error:
                await answer.refuse(error)
            else:
                await self._app(scope, receive, answer)
        finally:
            line = scope["state"].get("line")
            if not answer.status and line is not None and not line.is_written:
                self.tell(scope, 499)  # the client went before it was answered

    async def _enter(self, scope: Scope) -> None:
        """Raises Unauthorized, RateLimited, DatabaseUnavailable."""
        actor = await self._authenticate(scope)
        scope["state"]["actor"] = actor
        trace.actor.set(actor.name)
        limit = self._hub.limits.per_minute
        if limit and scope["path"] not in self._unlimited_paths:
            await _take(scope, self._hub, actor.identity[:16], limit)

    def outlives_its_key(self, scope: Scope) -> bool:
        """Whether the answer of a long poll or stream depends on the key being good still; events look themselves."""
        return scope["method"] == "GET" and "actor" in scope["state"] and scope["path"] not in self._unlimited_paths

    async def end_of_key(self, scope: Scope) -> Unauthorized | None:
        """Why the key of a request that goes on for long opens nothing any more; None while it does."""
        key = _key_of(scope)
        try:
            if self._hub.keys.cached(key) is None:
                await run_in_threadpool(self._hub.keys.authenticate, key)
        except Unauthorized as error:
            return error
        except AutovibeError as error:
            logger.debug("The key of a long request cannot be looked up now: %s", error)
        return None

    async def _authenticate(self, scope: Scope) -> Actor:
        key = _key_of(scope)
        if not key:
            raise Unauthorized
        keys, limits = self._hub.keys, self._hub.limits
        if (known := keys.cached(key)) is not None:
            return known
        client = str(scope["client"][0]) if scope.get("client") else ""
        if not keys.was_good(key):
            limits.refuse_guessing(client)
        try:
            return await run_in_threadpool(keys.authenticate, key)
        except Unauthorized:
            limits.note_failure(client)
            raise

    def tell(self, scope: Scope, status: int) -> None:
        """Put into the audit log what no transaction has written: see hub.trail."""
        line: trail.Line | None = scope["state"].get("line")
        if line is None:
            line = _line(scope, scope["state"].get("verb") or self._verb_of(scope), status)
        if status in _REFUSED:
            self._hub.trail.put(line, Outcome.refused, status)
        elif status >= 400:
            self._hub.trail.put(line, Outcome.failed, status)
        elif not line.is_written:
            self._hub.trail.put(line, Outcome.done, status)

    def _verb_of(self, scope: Scope) -> Verb:
        """The route a refused request was for, found by hand: it was refused before it was routed, maybe."""
        path, method = scope["path"].removeprefix(self._prefix), scope["method"]
        for route in self._routes:
            if method in (route.methods or ()) and (match := route.path_regex.match(path)) and route.verb is not None:
                scope["path_params"] = match.groupdict()
                return route.verb
        return Verb(method[:10], "(no route)", _ADMINS_ONLY)


class _Answer:
    """The `send` of one request: adds what its key is told, tells the audit log, and ends when the key does."""

    __slots__ = ("_guard", "_is_over", "_known_at", "_receive", "_scope", "_send", "status")

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self._guard, self._scope, self._receive, self._send = guard, scope, receive, send
        self._known_at, self._is_over = time.monotonic(), False
        self.status = 0  # not begun

    async def __call__(self, message: Message) -> None:
        if self._is_over or (time.monotonic() - self._known_at > KNOWN_SECONDS and await self._has_ended()):
            return
        if message["type"] == "http.response.start":
            self.status, state = message["status"], self._scope["state"]
            if self.status in _REFUSED or "line" in state:
                self._guard.tell(self._scope, self.status)  # before the client hears of it
            if (standing := state.get("standing")) is not None:
                message["headers"] = [*message["headers"], *_headers(standing)]
        await self._send(message)

    async def refuse(self, error: AutovibeError) -> None:
        await envelope(error, str(self._scope["state"]["request_id"]))(self._scope, self._receive, self)

    async def _has_ended(self) -> bool:
        """Whether the key is good no more; what would be answered is then dropped."""
        self._known_at = time.monotonic()
        if not self._guard.outlives_its_key(self._scope):
            return False
        ended = await self._guard.end_of_key(self._scope)
        if ended is None:
            return False
        self._known_at = float("inf")
        if self.status:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await self.refuse(ended)
        self._is_over = True
        return True


def _key_of(scope: Scope) -> str:
    """The bearer's key, "" where there is none."""
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, key = given.decode("latin-1").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _headers(standing: Standing) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-ratelimit-limit", str(standing.limit).encode()),
        (b"x-ratelimit-remaining", str(standing.remaining).encode()),
        (b"x-ratelimit-reset", str(standing.resets_at).encode()),
    ]
