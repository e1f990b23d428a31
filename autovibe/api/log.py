"""The hub's log: one rotated file and stderr, each line with its request's id, no line with a secret."""

from __future__ import annotations

import logging
import logging.handlers
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from autovibe.api.requests import request_id

_FILE_BYTES = 10 * 1024 * 1024
_FILES = 5
_SECRETS = re.compile(
    r"(?i)(\bBearer\s+)\S+|(\bPVEAPIToken=[^\s=]+=)\S+|(\bav_[0-9a-f]{4,16}_)[A-Za-z0-9_-]{8,}"
    r"|((?:password|secret|api_key|token)['\"]?\s*[:=]\s*['\"]?)[^\s'\",}]+|(\w+://[^:/\s@]+:)[^@\s]+(?=@)"
)


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))} | {10: "\n    "}
"""What a guest or client sent shall neither drive the terminal a log is read in nor look like a line of its own."""


class _Redacting(logging.Formatter):
    """The last hand on every line, tracebacks included."""

    def __init__(self, secrets: Sequence[str]) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s [%(request_id)s] %(message)s")
        self._secrets = sorted((secret for secret in secrets if secret), key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        record.request_id = request_id.get()
        text = super().format(record).translate(_CONTROLS)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return _SECRETS.sub(lambda match: next((group for group in match.groups() if group), "") + "***", text)


def configure_logs(path: Path, level: str, secrets: Sequence[str]) -> None:
    """Send every logger of the process to `path` and stderr. `secrets` never appear, wherever they come from."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    rotated = logging.handlers.RotatingFileHandler(path, maxBytes=_FILE_BYTES, backupCount=_FILES, encoding="utf-8")
    path.chmod(0o600)
    formatter = _Redacting(secrets)
    handlers: list[logging.Handler] = [rotated, logging.StreamHandler(sys.stderr)]
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    for new in handlers:
        new.setFormatter(formatter)
        root.addHandler(new)
    root.setLevel(logging.WARNING)
    logging.getLogger("autovibe").setLevel(level.upper())
    logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # a guest that is not up yet is no news
    logging.getLogger("uvicorn").setLevel(logging.INFO)
    # A crash of a route is logged by api.errors, with its request; the server would log it a second time.
    logging.getLogger("uvicorn.error").addFilter(lambda record: "Exception in ASGI application" not in str(record.msg))
