"""Who calls: API tokens, and tickets with CSRF tokens, as Proxmox checks them. There is one user, root@pam.

Every failed authentication is answered late. A token of root's is not root: some options need root@pam itself.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import unquote

from autovibe.node.files import read_or_create_secret
from autovibe.node.refusal import Refusal

FAILED_LOGIN_DELAY_SECONDS = 3.0
TICKET_SECONDS = 2 * 3600
ROOT = "root@pam"
TOKEN_NAME = "autovibe"  # noqa: S105 - its name, not the secret

_TOKEN = re.compile(r"PVEAPIToken=(\S+?)!(\S+?)[=:](\S+)")
_TICKET = re.compile(r"PVE:(root@pam):([0-9A-F]{8})::(.+)")


@dataclass(frozen=True)
class Actor:
    """Who is calling: a user, or one of its tokens."""

    user: str
    token: str = ""

    @property
    def name(self) -> str:
        return f"{self.user}!{self.token}" if self.token else self.user

    @property
    def is_root(self) -> bool:
        return self.user == ROOT and not self.token


def _denied(reason: str) -> Refusal:
    return Refusal(reason, status=401, is_bare=True, delay_seconds=FAILED_LOGIN_DELAY_SECONDS)


class Auth:
    """Secrets of the home: `token` and `password` (their owner may read and change them) and a signing key."""

    def __init__(self, home: Path) -> None:
        self._password_file = home / "password"
        self._token_file = home / "token"
        read_or_create_secret(self._password_file, secrets.token_urlsafe(18))
        self.token = read_or_create_secret(self._token_file, f"{ROOT}!{TOKEN_NAME}={uuid.uuid4()}")
        self._token_hash = _hash(self.token)
        self._key = read_or_create_secret(home / "signing-key", secrets.token_hex(32)).encode()

    def authenticate(self, method: str, headers: Mapping[str, str], *, is_csrf_exempt: bool) -> Actor:
        """Raises the bare 401, which has nothing but a reason."""
        authorization = headers.get("authorization", "")
        if match := _TOKEN.fullmatch(authorization):
            user, name, value = match.groups()
            if not hmac.compare_digest(_hash(f"{user}!{name}={value}"), self._token_hash):
                raise _denied("Authentication failed!")
            return Actor(user, name)
        ticket = _cookie(headers.get("cookie", "")) or unquote(authorization.removeprefix("PVEAuthCookie="))
        if not ticket or (authorization == ticket and not ticket.startswith("PVE:")):
            raise _denied("No ticket")
        actor = self._verify(ticket)
        if actor is None:
            raise _denied("permission denied - invalid PVE ticket")
        if method != "GET" and not is_csrf_exempt and not self._is_csrf_valid(headers.get("csrfpreventiontoken", "")):
            raise _denied("Permission denied - invalid csrf token")
        return actor

    def login(self, username: str, password: str) -> tuple[str, str]:
        """A ticket and its CSRF token, for the password or for a ticket that is still valid."""
        actor = self._verify(password)
        is_renewal = actor is not None and actor.user == username
        expected = self._password_file.read_text(encoding="utf-8").strip()
        is_right = hmac.compare_digest(_hash(password), _hash(expected)) and username == ROOT
        if not (is_renewal or is_right):
            raise Refusal("authentication failure", status=401, delay_seconds=FAILED_LOGIN_DELAY_SECONDS)
        stamp = f"{int(time.time()):08X}"
        return self._ticket(stamp), f"{stamp}:{self._sign('csrf', stamp)}"

    def _ticket(self, stamp: str) -> str:
        return f"PVE:{ROOT}:{stamp}::{self._sign('ticket', stamp)}"

    def _verify(self, ticket: str) -> Actor | None:
        match = _TICKET.fullmatch(ticket)
        if match is None or not _is_fresh(match[2]) or not _is_same(ticket, self._ticket(match[2])):
            return None
        return Actor(ROOT)

    def _is_csrf_valid(self, token: str) -> bool:
        stamp = token.partition(":")[0]
        return _is_same(token, f"{stamp}:{self._sign('csrf', stamp)}") and _is_fresh(stamp)

    def _sign(self, purpose: str, stamp: str) -> str:
        digest = hmac.digest(self._key, f"{purpose}:{ROOT}:{stamp}".encode(), "sha256")
        return base64.b64encode(digest).decode().rstrip("=")


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def _is_same(one: str, other: str) -> bool:
    return hmac.compare_digest(_hash(one), _hash(other))


def _is_fresh(stamp: str) -> bool:
    try:
        age = time.time() - int(stamp, 16)
    except ValueError:
        return False
    return -300 <= age < TICKET_SECONDS


def _cookie(header: str) -> str:
    try:
        morsel = SimpleCookie(header).get("PVEAuthCookie")
    except CookieError:
        return ""
    return unquote(morsel.value) if morsel else ""
