"""What the Hub knows of a Proxmox API: `read` asks, `change` changes, both through `Proxmox`.

`Proxmox` hides proxmoxer, sessions, certificates and the way failures arrive. Nothing foreign leaves this package:
HypervisorUnavailable means that the API does not answer (trying again may help), HypervisorRefused that it answered no,
with Proxmox's own text in `details["reason"]`, and HypervisorTaskFailed (raised by `read.await_task`) that a task ended
badly.
"""

from __future__ import annotations

import re
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from autovibe.errors import ConfigurationError, HypervisorRefused, HypervisorUnavailable, NotYet

with warnings.catch_warnings():
    # proxmoxer's backend switches urllib3's warnings off for the whole process when it is imported; this undoes it.
    import proxmoxer
    import proxmoxer.backends.https

_CONNECT_SECONDS = 10.0
_UPLOAD_SECONDS = 600.0
_LOCK_PATIENCE_SECONDS = 3.0
_IDLE_SECONDS = 4.0  # the API closes a connection that was idle for 5 s; a change is not sent on one about to go
_TOKEN = re.compile(r"^(?P<user>[^@!\s]+@[^!\s]+)!(?P<name>[^=\s]+)=(?P<value>\S+)$")
_AWAY = frozenset({502, 503, 504, 595, 596, 597, 598, 599})  # the proxy answers for a daemon that does not
_T = TypeVar("_T")
_LOCKED = re.compile(r"got timeout|VM is locked|can't lock file|unable to acquire lock", re.IGNORECASE)


class VmidTaken(Exception):
    """Another VM or container has that id; allot another one."""

    def __init__(self, vmid: int) -> None:
        super().__init__(f"The vmid {vmid} is taken.")
        self.vmid = vmid


class Dropped(HypervisorUnavailable):
    """The connection ended before the answer came, so nobody knows whether the call was carried out."""


class Proxmox:
    """One Proxmox API as one token sees it; safe to share between threads (each has its own session).

    `url` is https://host:port and `token` is user@realm!id=uuid. With a `fingerprint` (SHA-256 of the certificate, as
    hex, colons optional) exactly that certificate is accepted, and none other; else the certificate is verified with
    `ca_file` or the public authorities. Neither proxies nor certificate bundles are taken from the environment.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        node: str,
        fingerprint: str = "",
        ca_file: Path | None = None,
        timeout_seconds: float = 30,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname:
            raise ConfigurationError(f"The Proxmox API is reached over https://host:port, not '{url}'.")
        match = _TOKEN.match(token)
        if match is None:
            raise ConfigurationError("The Proxmox token has the form user@realm!id=uuid; the one given has not.")
        self.url = url.rstrip("/")
        self.node = node
        self._host = parts.hostname
        self._port = parts.port or 8006
        self._token = match
        self._fingerprint = _hex(fingerprint) if fingerprint else ""
        self._verify: str | bool = str(ca_file) if ca_file else True
        self._timeout = timeout_seconds
        self._local = threading.local()
        self._sessions: weakref.WeakSet[requests.Session] = weakref.WeakSet()

    def get(self, path: str, **parameters: Any) -> Any:
        """The `data` of a GET. A dropped connection is tried once more."""
        try:
            return self._call("get", path, parameters)
        except Dropped:
            return self._call("get", path, parameters)

    def change(self, method: str, path: str, /, **parameters: Any) -> Any:
        """The `data` of a POST, PUT or DELETE; a lock is waited for a moment, then it is NotYet.

        True and False travel as 1 and 0, lists as repeated keys, None not at all. Raises Dropped when the answer was
        lost.
        """
        patience = time.monotonic() + _LOCK_PATIENCE_SECONDS
        pause = 0.1
        while True:
            try:
                return self._call(method, path, parameters)
            except HypervisorRefused as error:
                if not is_lock(error):
                    raise
                if time.monotonic() + pause > patience:
                    raise NotYet(f"Proxmox answers '{error.details['reason']}' to {method.upper()} {path}") from error
            time.sleep(pause)
            pause = min(pause * 2, 0.8)

    def upload(self, path: str, **parameters: Any) -> Any:
        """A POST whose parameters hold an open file; the limit of silence is ten minutes."""
        connection = self._connect(_UPLOAD_SECONDS, _UPLOAD_SECONDS)
        try:
            return self._call("post", path, parameters, connection)
        finally:
            connection._store["session"].close()

    def close(self) -> None:
        for session in list(self._sessions):
            session.close()

    # How a call is made

    def _call(self, method: str, path: str, parameters: dict[str, Any], connection: Any = None) -> Any:
        api = self._of_this_thread(method) if connection is None else connection
        what = f"{method.upper()} {path}"
        try:
            answer = getattr(api(path), method)(**{name: _wire(value) for name, value in parameters.items()})
        except proxmoxer.ResourceException as error:
            raise self._translate_answer(error, what) from error
        except (requests.RequestException, OSError) as error:
            raise self._translate_silence(error, what) from error
        finally:
            self._local.used_at = time.monotonic()
        if isinstance(answer, dict) and isinstance(answer.get("errors"), bytes):
            raise HypervisorRefused(
                f"'{self.url}' answered {what} with something that is no JSON; is it a Proxmox API?",
                details={"status": 200, "reason": "no JSON"},
            )
        return answer

    def _of_this_thread(self, method: str) -> Any:
        api = getattr(self._local, "api", None)
        if api is None:
            api = self._local.api = self._connect(_CONNECT_SECONDS, self._timeout)
        elif method != "get" and time.monotonic() - self._local.used_at > _IDLE_SECONDS:
            api._store["session"].close()  # the session goes on with new connections
        return api

    def _connect(self, send_seconds: float, answer_seconds: float) -> Any:
        api = proxmoxer.ProxmoxAPI(
            self._host,
            port=self._port,
            user=self._token["user"],
            token_name=self._token["name"],
            token_value=self._token["value"],
            verify_ssl=self._verify,
            timeout=(send_seconds, answer_seconds),  # for each send (and the connect), and for silence after it
        )
        session: requests.Session = api._store["session"]
        # Without this REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE would replace `verify`, and ~/.netrc the token.
        session.trust_env = False
        session.adapters.clear()  # no http://, so no redirect can carry the token in the clear
        session.mount("https://", _Pinned(self._fingerprint) if self._fingerprint else HTTPAdapter())
        self._sessions.add(session)
        return api

    def _translate_answer(self, error: proxmoxer.ResourceException, what: str) -> Exception:
        reason = str(error.content or error.status_message or error.status_code)
        if error.status_code in _AWAY:
            return HypervisorUnavailable(
                f"The Proxmox API at '{self.url}' answers {error.status_code} ({reason}); check that the node is up.",
                log_detail=what,
            )
        faults = error.errors if isinstance(error.errors, dict) else {}
        details = [f"{name}: {str(fault).strip()}" for name, fault in faults.items()]
        text = "; ".join([reason.strip().rstrip("."), *details])
        if error.status_code == 401:
            text += " (is the API token right?)"
        return HypervisorRefused(
            f"Proxmox refused {what}: {text}.",
            details={"status": error.status_code, "reason": text, "errors": {k: str(v) for k, v in faults.items()}},
        )

    def _translate_silence(self, error: Exception, what: str) -> HypervisorUnavailable:
        if isinstance(error, requests.exceptions.SSLError):
            wanted = f"the pinned one ({_colons(self._fingerprint)})" if self._fingerprint else "trusted"
            return HypervisorUnavailable(
                f"The certificate of '{self.url}' is not {wanted}: {_innermost(error)}.", log_detail=repr(error)
            )
        text = f"The Proxmox API at '{self.url}' does not answer ({_innermost(error)}); check that the node is up."
        if isinstance(error, requests.exceptions.ConnectTimeout) or "NewConnectionError" in repr(error):
            return HypervisorUnavailable(text, log_detail=repr(error))
        return Dropped(text, log_detail=f"{what}: {error!r}")


class _Pinned(HTTPAdapter):
    """Accepts exactly one certificate, whatever `verify` says."""

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, assert_fingerprint=self._fingerprint, **options)

    def send(self, *arguments: Any, **options: Any) -> requests.Response:
        # The authorities are not asked: the certificate signed itself. urllib3 compares the fingerprint all the same.
        return super().send(*arguments, **{**options, "verify": False})


def once_more(attempt: Callable[[], _T]) -> _T:
    """Carry out an attempt that looks for its earlier effect first; once more when the answer was lost."""
    try:
        return attempt()
    except Dropped:
        return attempt()


def is_lock(error: HypervisorRefused) -> bool:
    return _LOCKED.search(str(error.details.get("reason", ""))) is not None


def says(error: HypervisorRefused, *texts: str) -> bool:
    """Whether Proxmox's own text holds one of `texts`."""
    reason = str(error.details.get("reason", "")).lower()
    return any(text.lower() in reason for text in texts)


def _wire(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, (list, tuple)):
        return [_wire(item) for item in value]
    return value


def _hex(fingerprint: str) -> str:
    plain = re.sub(r"^sha256:", "", fingerprint.strip(), flags=re.IGNORECASE).replace(":", "").lower()
    if not re.fullmatch(r"[0-9a-f]{64}", plain):
        raise ConfigurationError(
            f"A certificate's fingerprint is its SHA-256: 64 hexadecimal digits, colons optional; not '{fingerprint}'."
        )
    return plain


def _colons(plain: str) -> str:
    return ":".join(plain[index : index + 2] for index in range(0, len(plain), 2)).upper()


def _innermost(error: BaseException) -> str:
    """The text of the cause that says most; requests wraps urllib3, which wraps the system's error."""
    seen: BaseException = error
    while True:
        inner = getattr(seen, "reason", None) or (seen.args[-1] if seen.args else None)
        if not isinstance(inner, BaseException) or inner is seen:
            return str(seen).strip().rstrip(".") or type(seen).__name__
        seen = inner
