"""One HTTP connection to a Hub: keys, retries, and errors turned back into their classes.

A connection that is lost is tried again with growing pauses, at most `ATTEMPTS` times, where that is harmless: reads,
and every POST that makes something, since it carries an Idempotency-Key that stays the same over its attempts. A POST
that is not repeatable (`exec`) is sent again only when it cannot have arrived. A request above the rate limit waits for
its turn.
"""

from __future__ import annotations

import ipaddress
import os
import random
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx2
from pydantic import BaseModel, ValidationError

from autovibe import schemas
from autovibe.errors import AutovibeError, InternalError, InvalidRequest, Unavailable
from autovibe.sdk.streaming import ALIVE_SECONDS, Frames
from autovibe.types import NAME_PATTERN
from autovibe.version import __version__

ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 0.1
TURNS = 3
"""How often a request is sent that meets its key's rate limit; each time it waits as long as the Hub says."""
LONGEST_TURN_SECONDS = 65.0
CONNECT_SECONDS = 10.0

Reply = TypeVar("Reply", bound=BaseModel)

_NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


class Connection:
    """Sends one request at a time and thread; raises the errors of `autovibe.errors`."""

    def __init__(self, url: str, api_key: str | None, timeout_seconds: float, ca_file: str | Path | None) -> None:
        self.url = url.rstrip("/")
        self.has_no_events = False  # the Hub, or what stands before it, gives no event stream
        self._timeout_seconds = timeout_seconds
        self._http = _http(self.url, api_key, ca_file)

    def close(self) -> None:
        self._http.close()

    def get(self, kind: type[Reply], path: str, /, *, accept: tuple[int, ...] = (), **params: Any) -> Reply:
        """One read of `path` below /api/v1. `wait` among the parameters lengthens the time-out."""
        request = self._http.build_request(
            "GET",
            path,
            params={name: _plain(value) for name, value in params.items() if value is not None},
            timeout=self._timeout(float(params.get("wait") or 0)),
        )
        return self._answer(kind, request, accept=accept)

    def stream(self, path: str, /, *, last_id: int | None = None, **params: Any) -> Frames:
        """Server-sent events of `path`, behind `last_id`. Raises Unavailable, or what the Hub answers instead."""
        headers = {"Accept": "text/event-stream"} | ({} if last_id is None else {"Last-Event-ID": str(last_id)})
        request = self._http.build_request(
            "GET",
            path,
            params={name: _plain(value) for name, value in params.items() if value is not None},
            headers=headers,
            timeout=httpx2.Timeout(self._timeout_seconds, connect=CONNECT_SECONDS, read=ALIVE_SECONDS),
        )
        try:
            response = self._send_once(request, is_stream=True)
        except _Lost as lost:
            raise lost.error from lost.__cause__
        if response.is_success and response.headers.get("content-type", "").startswith("text/event-stream"):
            return Frames(response)
        try:
            response.read()
        except httpx2.TransportError as error:
            raise Unavailable(f"The Hub at {self.url} broke off its answer.") from error
        finally:
            response.close()
        if not response.is_success:
            raise _error(response, self.url)
        raise InternalError(f"{request.url} answered no event stream; is it a Hub of this version ({__version__})?")

    def post(
        self, kind: type[Reply], path: str, order: BaseModel, *, is_repeatable: bool = True, extra_seconds: float = 0
    ) -> Reply:
        """One POST under an Idempotency-Key of its own; `extra_seconds` is how long the verb itself may take."""
        request = self._http.build_request(
            "POST",
            path,
            content=order.model_dump_json(exclude_unset=True).encode(),
            headers={"Content-Type": "application/json", "Idempotency-Key": str(uuid4())},
            timeout=self._timeout(extra_seconds),
        )
        return self._answer(kind, request, is_repeatable=is_repeatable)

    def put(self, kind: type[Reply], path: str, order: BaseModel) -> Reply:
        """One PUT of the fields that were set, also those set to None; sent twice it changes nothing more."""
        request = self._http.build_request(
            "PUT",
            path,
            content=order.model_dump_json(exclude_unset=True).encode(),
            headers={"Content-Type": "application/json"},
            timeout=self._timeout(0),
        )
        return self._answer(kind, request)

    def _timeout(self, extra_seconds: float) -> httpx2.Timeout:
        seconds = self._timeout_seconds
        return httpx2.Timeout(seconds + extra_seconds, connect=min(seconds, CONNECT_SECONDS))

    def _answer(
        self, kind: type[Reply], request: httpx2.Request, *, is_repeatable: bool = True, accept: tuple[int, ...] = ()
    ) -> Reply:
        response = self._send_in_turn(request, is_repeatable)
        if not response.is_success and response.status_code not in accept:
            raise _error(response, self.url)
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            if not response.is_success:
                raise _error(response, self.url) from error
            raise InternalError(
                f"{request.url} answered what is no {kind.__name__}; is it a Hub of this version ({__version__})?",
                log_detail=str(error),
            ) from error

    def _send_in_turn(self, request: httpx2.Request, is_repeatable: bool) -> httpx2.Response:
        """Send it, and again when the Hub says so (429, Retry-After): it has done nothing then."""
        response = self._send(request, is_repeatable)
        for _ in range(TURNS - 1):
            if response.status_code != 429 or (seconds := _retry_after(response)) is None:
                break
            time.sleep(seconds + random.uniform(0, 1))  # noqa: S311 - it keeps clients apart and is no secret
            response = self._send(request, is_repeatable)
        return response

    def _send(self, request: httpx2.Request, is_repeatable: bool) -> httpx2.Response:
        pause = FIRST_PAUSE_SECONDS
        for _ in range(ATTEMPTS - 1):
            try:
                return self._send_once(request)
            except _Lost as lost:
                if lost.may_have_arrived and not is_repeatable:
                    raise lost.error from lost.__cause__
            time.sleep(pause * random.uniform(0.7, 1.3))  # noqa: S311 - it keeps clients apart and is no secret
            pause *= 2.5
        try:
            return self._send_once(request)
        except _Lost as lost:
            raise lost.error from lost.__cause__

    def _send_once(self, request: httpx2.Request, *, is_stream: bool = False) -> httpx2.Response:
        try:
            return self._http.send(request, stream=is_stream)
        except httpx2.ReadTimeout as error:
            raise Unavailable(f"The Hub at {self.url} does not answer in time; ask again or see its log.") from error
        except httpx2.UnsupportedProtocol as error:
            raise InvalidRequest(f"'{self.url}' is no URL of a Hub: {error}") from error
        except httpx2.TransportError as error:
            reason = str(error) or type(error).__name__
            if "CERTIFICATE_VERIFY_FAILED" in reason:
                message = f"The certificate of {self.url} is not trusted ({reason})."
                raise Unavailable(f"{message} Name its authority in REQUESTS_CA_BUNDLE.") from error
            message = f"The Hub at {self.url} does not answer ({reason}). On its computer start it with: autovibe up"
            raise _Lost(Unavailable(message), not isinstance(error, _NEVER_SENT)) from error


class _Lost(Exception):
    def __init__(self, error: Unavailable, may_have_arrived: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.may_have_arrived = may_have_arrived


def order(kind: Callable[..., Reply], *, is_whole: bool = False, **fields: Any) -> Reply:
    """The request with the fields that were given: None and "" leave the choice to the Hub, unless it `is_whole`.

    Raises InvalidRequest.
    """
    try:
        return kind(
            **{name: value for name, value in fields.items() if is_whole or (value is not None and value != "")}
        )
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {_fault(fault)}".lstrip(": ") for fault in error.errors()]
        raise InvalidRequest(f"The request is malformed: {'; '.join(faults)}.", details={"fields": faults}) from error


def _fault(fault: Any) -> str:
    if fault.get("ctx", {}).get("pattern") == NAME_PATTERN:
        return f"'{fault['input']}' is no name; it has letters, digits and . _ - (a letter or digit first), 63 at most"
    return str(fault["msg"])


def canonical(value: UUID | str) -> str:
    """A uuid as it stands in a path. Raises InvalidRequest, so that a name never becomes part of a path."""
    try:
        return str(value if isinstance(value, UUID) else UUID(value))
    except ValueError:
        raise InvalidRequest(f"'{value}' is no uuid.") from None


def is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified  # 0.0.0.0 leads here as well


def _http(url: str, api_key: str | None, ca_file: str | Path | None) -> httpx2.Client:
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise InvalidRequest(f"'{url}' is no URL of a Hub; one looks like http://127.0.0.1:8080.")
    headers = {"User-Agent": f"autovibe/{__version__}", "Accept": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    return httpx2.Client(
        base_url=f"{url}/api/v1",
        headers=headers,
        verify=_context(parts.hostname or "", ca_file) if parts.scheme == "https" else False,
        trust_env=not is_loopback(parts.hostname or ""),  # a proxy cannot reach this machine's loopback
    )


def _context(host: str, ca_file: str | Path | None) -> ssl.SSLContext:
    """The system's authorities (or SSL_CERT_FILE), those of REQUESTS_CA_BUNDLE, and `ca_file`.

    For this machine's own Hub `ca_file` is its certificate itself, made for the name that others reach it by: exactly
    that certificate is accepted, and it need not name the loopback address.
    """
    if ca_file and is_loopback(host):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(cafile=str(ca_file))
        return context
    context = ssl.create_default_context()
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    for extra in (ca_file, bundle):
        if extra and Path(extra).is_file():
            context.load_verify_locations(cafile=str(extra))
    return context


def _retry_after(response: httpx2.Response) -> float | None:
    """The seconds the Hub asks for; None when it names none, or more than a limit of a minute can mean."""
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds <= LONGEST_TURN_SECONDS else None


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float) else str(value)


def _error(response: httpx2.Response, url: str) -> AutovibeError:
    """The error the envelope names, as its class; what is no envelope comes from something in front of the Hub."""
    try:
        body = schemas.ErrorReply.model_validate_json(response.content).error
    except ValidationError:
        text = f"{url} answered HTTP {response.status_code} without an error of autovibe; is it a Hub?"
        return (Unavailable if response.status_code in (502, 503, 504) else InternalError)(text)
    details = {**body.details, "request_id": body.request_id}
    return AutovibeError.from_dict({"code": body.code, "message": body.message, "details": details})
