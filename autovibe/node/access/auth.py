"""Who calls: API tokens, and tickets with CSRF tokens, as Proxmox checks them.

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

from autovibe.node.access import Access
from autovibe.node.access.credentials import Credentials
from autovibe.node.files import read_or_create_secret, replace_durably
from autovibe.node.refusal import Refusal
from autovibe.node.schema.names import ROOT, USER_ID, normalize_path

FAILED_LOGIN_DELAY_SECONDS = 3.0
TICKET_SECONDS = 2 * 3600
VNC_TICKET_SECONDS = 40
TOKEN_NAME = "autovibe"  # noqa: S105 - its name, not the secret

_TOKEN = re.compile(r"PVEAPIToken=(\S+)!([^\s!=:]+)[=:](\S+)")
_TICKET = re.compile(rf"PVE:({USER_ID}):([0-9A-F]{{8}})::(.+)")
_VNC_TICKET = re.compile(r"(?:[^:]{8}:)?PVEVNC:([0-9A-F]{8})::(.+)")
_EARLY_SECONDS = 300
_VNC_EARLY_SECONDS = 20


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


def login_failed() -> Refusal:
    """Says nothing about the user, so that nobody learns who there is."""
    return Refusal("authentication failure", status=401, delay_seconds=FAILED_LOGIN_DELAY_SECONDS)


class Auth:
    """Secrets of the home: `token` and `password` of root (their owner may read and change them) and a signing key;
    and the credentials of all other users."""

    def __init__(self, home: Path) -> None:
        self._password_file = home / "password"
        read_or_create_secret(self._password_file, secrets.token_urlsafe(18))
        self.token = read_or_create_secret(home / "token", f"{ROOT}!{TOKEN_NAME}={uuid.uuid4()}")
        self._token_hash = _hash(self.token)
        self._key = read_or_create_secret(home / "signing-key", secrets.token_hex(32)).encode()
        token_name = self.token.partition("=")[0]
        self.access = Access(home, token_name if token_name.startswith(f"{ROOT}!") else None)
        self.credentials = Credentials(home)

    def authenticate(self, method: str, headers: Mapping[str, str], *, is_csrf_exempt: bool) -> Actor:
        """Raises the bare 401, which has nothing but a reason."""
        authorization = headers.get("authorization", "")
        if match := _TOKEN.fullmatch(authorization):
            user, name, value = match.groups()
            if not self._is_token_valid(user, name, value):
                raise _denied("Authentication failed!")
            return Actor(user, name)
        ticket = _cookie(headers.get("cookie", "")) or unquote(authorization.removeprefix("PVEAuthCookie="))
        if not ticket or (authorization == ticket and not ticket.startswith("PVE:")):
            raise _denied("No ticket")
        actor = self.verify_ticket(ticket)
        if actor is None:
            raise _denied("permission denied - invalid PVE ticket")
        try:
            self.access.require_enabled(actor.user)
        except Refusal as refusal:
            raise _denied(refusal.message) from None
        csrf_token = headers.get("csrfpreventiontoken", "")
        if method != "GET" and not is_csrf_exempt and not self._is_csrf_valid(actor.user, csrf_token):
            raise _denied("Permission denied - invalid csrf token")
        return actor

    def _is_token_valid(self, user: str, name: str, value: str) -> bool:
        full_name = f"{user}!{name}"
        if full_name == self.access.home_token:
            return hmac.compare_digest(_hash(f"{full_name}={value}"), self._token_hash)
        try:
            self.access.require_enabled(user)
            token = self.access.require_token(user, name)
        except Refusal:
            return False
        is_over = 0 < token.expire < time.time()
        return self.credentials.is_token(full_name, value) and not is_over

    def login(self, username: str, password: str) -> tuple[str, str]:
        """A ticket and its CSRF token, for the password or for a ticket that is still valid (root's for anybody)."""
        self.check_login(username, password, is_root_anybody=True)
        stamp = f"{int(time.time()):08X}"
        return self._ticket(username, stamp), f"{stamp}:{self._sign('csrf', username, stamp)}"

    def check_login(self, username: str, password: str, *, is_root_anybody: bool = False) -> None:
        """Raises the 401 for everything but the right password or a valid ticket of an enabled user."""
        actor = self.verify_ticket(password)
        is_renewal = actor is not None and (actor.user == username or (is_root_anybody and actor.user == ROOT))
        if not (is_renewal or self.is_password(username, password)):
            raise login_failed()
        self.require_enabled(username)

    def require_enabled(self, username: str) -> None:
        """Raises the 401 of a login of who is unknown, disabled or expired."""
        try:
            self.access.require_enabled(username)
        except Refusal:
            raise login_failed() from None

    def is_password(self, username: str, password: str) -> bool:
        if username == ROOT:
            expected = self._password_file.read_text(encoding="utf-8").strip()
            return expected != "" and hmac.compare_digest(_hash(password), _hash(expected))
        return self.credentials.is_password(username, password)

    def set_password(self, username: str, password: str) -> None:
        """Users of realm `pam` are those of the machine; this node has only root among them."""
        if username == ROOT:
            if password != password.strip():
                raise Refusal("change password failed: the password of 'root' may not begin or end with a space")
            replace_durably(self._password_file, f"{password}\n")
        elif username.endswith("@pve"):
            self.credentials.set_password(username, password)
        else:
            name, _, realm = username.rpartition("@")
            missing = f"user '{name}' does not exist" if realm == "pam" else f"auth domain '{realm}' does not exist"
            raise Refusal(f"change password failed: {missing}" if realm == "pam" else missing)

    def vnc_ticket(self, actor: Actor, path: str, port: int | str | None) -> str:
        """A ticket of some seconds, for a console at a path of the access control tree, and one port."""
        stamp = f"{int(time.time()):08X}"
        return f"PVEVNC:{stamp}::{self._sign_vnc(actor.name, path, port, stamp)}"

    def is_vnc_ticket_valid(self, ticket: str, user: str, path: str, port: int | str | None) -> bool:
        """Whether a VNC ticket was made for this user or token (its full name), path and port, just now."""
        match = _VNC_TICKET.fullmatch(ticket)
        if match is None or not _is_fresh(match[1], VNC_TICKET_SECONDS, _VNC_EARLY_SECONDS):
            return False
        return _is_same(match[2], self._sign_vnc(user, path, port, match[1]))

    def verify_ticket(self, ticket: str) -> Actor | None:
        match = _TICKET.fullmatch(ticket)
        if match is None or not _is_fresh(match[2]) or not _is_same(ticket, self._ticket(match[1], match[2])):
            return None
        return Actor(match[1])

    def _ticket(self, user: str, stamp: str) -> str:
        return f"PVE:{user}:{stamp}::{self._sign('ticket', user, stamp)}"

    def _is_csrf_valid(self, user: str, token: str) -> bool:
        stamp = token.partition(":")[0]
        return _is_same(token, f"{stamp}:{self._sign('csrf', user, stamp)}") and _is_fresh(stamp)

    def _sign_vnc(self, user: str, path: str, port: int | str | None, stamp: str) -> str:
        return self._sign("vnc", user, normalize_path(path) or "", "" if port is None else str(port), stamp)

    def _sign(self, *parts: str) -> str:
        """None of the parts but the last holds a colon, so that no two messages are the same."""
        digest = hmac.digest(self._key, ":".join(parts).encode(errors="surrogateescape"), "sha256")
        return base64.b64encode(digest).decode().rstrip("=")


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def _is_same(one: str, other: str) -> bool:
    return hmac.compare_digest(_hash(one), _hash(other))


def _is_fresh(stamp: str, seconds: float = TICKET_SECONDS, early_seconds: float = _EARLY_SECONDS) -> bool:
    try:
        age = time.time() - int(stamp, 16)
    except ValueError:
        return False
    return -early_seconds <= age < seconds


def _cookie(header: str) -> str:
    try:
        morsel = SimpleCookie(header).get("PVEAuthCookie")
    except CookieError:
        return ""
    return unquote(morsel.value) if morsel else ""
