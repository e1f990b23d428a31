"""What users and tokens prove themselves with: hashes of passwords and of token values, in files only the owner reads.

Passwords are hashed with scrypt. A token's value is a random UUID, so a plain SHA-256 of it tells nobody anything.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import threading
import uuid
from pathlib import Path

from autovibe.node.files import replace_durably

_COST, _BLOCK, _LANES = 1 << 14, 8, 1  # 16 MiB and some 50 ms a password
_NOBODY = "scrypt$" + "A" * 24 + "$" + "A" * 44


class _Lines:
    """A file of lines `<name> <hash>`, in memory and on the disk."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        self._lines = dict(line.split(" ", 1) for line in text.splitlines() if " " in line)

    def get(self, name: str) -> str | None:
        return self._lines.get(name)

    def update(self, added: dict[str, str], *, without: str = "") -> None:
        """Add lines; `without` a name and, when that is a user, its tokens."""
        with self._lock:
            kept = {
                name: line
                for name, line in self._lines.items()
                if not without or (name != without and not name.startswith(f"{without}!"))
            }
            kept |= added
            if kept != self._lines:
                text = "".join(f"{name} {line}\n" for name, line in sorted(kept.items()))
                replace_durably(self._file, text)
                self._lines = kept


class Credentials:
    """The secrets of one node's users, in `priv` of its home."""

    def __init__(self, home: Path) -> None:
        directory = home / "priv"
        directory.mkdir(mode=0o700, exist_ok=True)
        for leftover in directory.glob("*.new"):
            leftover.unlink()
        self._passwords = _Lines(directory / "shadow.cfg")
        self._tokens = _Lines(directory / "token.cfg")

    def set_password(self, user: str, password: str) -> None:
        self._passwords.update({user: _hash_password(password)})

    def is_password(self, user: str, password: str) -> bool:
        """Takes as long for a user without a password as for a wrong one."""
        known = self._passwords.get(user)
        is_right = _is_password(password, known or _NOBODY)
        return is_right and known is not None

    def make_token(self, token: str) -> str:
        """A new value for a token (its full name), which is known to the caller alone."""
        value = str(uuid.uuid4())
        self._tokens.update({token: _hash_value(value)})
        return value

    def is_token(self, token: str, value: str) -> bool:
        known = self._tokens.get(token)
        return known is not None and hmac.compare_digest(known, _hash_value(value))

    def forget(self, name: str) -> None:
        """Drop a token's value, or a user's password and the values of all of his tokens."""
        self._tokens.update({}, without=name)
        self._passwords.update({}, without=name)


def _hash_value(value: str) -> str:
    return hashlib.sha256(value.encode(errors="surrogateescape")).hexdigest()


def _hash_password(password: str, salt: bytes | None = None) -> str:
    salt = salt or secrets.token_bytes(16)
    key = hashlib.scrypt(password.encode(errors="surrogateescape"), salt=salt, n=_COST, r=_BLOCK, p=_LANES, dklen=32)
    return f"scrypt${base64.b64encode(salt).decode()}${base64.b64encode(key).decode()}"


def _is_password(password: str, known: str) -> bool:
    try:
        salt = base64.b64decode(known.split("$")[1], validate=True)
    except (IndexError, ValueError):  # a line edited by hand
        return False
    return hmac.compare_digest(known, _hash_password(password, salt))
