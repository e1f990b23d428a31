"""The hub's log: one rotated file and stderr, each line with what it is about, no line with a secret.

    text   2026-11-21 13:10:36,101 INFO    autovibe.access [<request id> <operation id>] <message>
    json   an object a line: time, level, logger, message, request_id, operation_id, machine, actor, duration (seconds),
           error (a traceback); null where there is none

What a guest or client sent shall neither drive the terminal a log is read in nor look like a line of its own.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from autovibe.domain import trace

_FILE_BYTES = 10 * 1024 * 1024
_FILES = 5
_SECRETS = re.compile(
    r"(?i)(\bBearer\s+)\S+|(\bPVEAPIToken=[^\s=]+=)\S+|(\bav_[0-9a-f]{4,16}_)[A-Za-z0-9_-]{8,}"
    r"|((?:password|secret|api_key|token)['\"]?\s*[:=]\s*['\"]?)[^\s'\",}]+|(\w+://[^:/\s@]+:)[^@\s]+(?=@)"
)
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))} | {10: "\n    "}

Format = Literal["text", "json"]


class _Redacting(logging.Formatter):
    """The last hand on every line, tracebacks included. A record is written out once: each handler asks for it, that
    of the file twice.
    """

    def __init__(self, secrets: Sequence[str]) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s [%(request_id)s %(operation_id)s] %(message)s")
        self._secrets = sorted((secret for secret in secrets if secret), key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        line: str | None = getattr(record, "written", None)
        if line is None:
            line = record.written = self._line(record)
        return line

    def _line(self, record: logging.LogRecord) -> str:
        record.request_id, record.operation_id = trace.request_id.get(), trace.operation_id.get()
        return self._redacted(super().format(record).translate(_CONTROLS))

    def _redacted(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return _SECRETS.sub(lambda match: next((group for group in match.groups() if group), "") + "***", text)


class _Json(_Redacting):
    """Each text is redacted before it is written as JSON: in JSON a secret may look different."""

    def _line(self, record: logging.LogRecord) -> str:
        error = self.formatException(record.exc_info) if record.exc_info else None
        duration = getattr(record, "duration", None)
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self._redacted(record.getMessage()),
            "request_id": _known(trace.request_id.get()),
            "operation_id": _known(trace.operation_id.get()),
            "machine": _known(trace.machine.get()),
            "actor": _known(trace.actor.get()),
            "duration": round(duration, 6) if isinstance(duration, float) else None,
            "error": self._redacted(error) if error is not None else None,
        }
        return json.dumps(line).replace("\x7f", "\\u007f")  # all else that is no printable ASCII is escaped


def _known(value: str) -> str | None:
    return None if value == "-" else value


def configure_logs(path: Path, level: str, secrets: Sequence[str], form: Format = "text") -> None:
    """Send every logger of the process to `path` and stderr. `secrets` never appear, wherever they come from."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    rotated = logging.handlers.RotatingFileHandler(path, maxBytes=_FILE_BYTES, backupCount=_FILES, encoding="utf-8")
    path.chmod(0o600)
    formatter = _Json(secrets) if form == "json" else _Redacting(secrets)
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
