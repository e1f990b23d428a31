"""A hub at the wire: a real HTTP server that answers /api/v1 with the rows it holds, and can drop connections."""

from __future__ import annotations

import json
import re
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from uuid import UUID, uuid4

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC).isoformat()
Row = dict[str, Any]


def money(micros: int) -> Row:
    return {"amount": f"{micros / 1e6:.6f}", "currency": "USD", "micros": micros}


def project(name: str, **more: Any) -> Row:
    return {
        "uuid": str(uuid4()),
        "name": name,
        "description": "",
        "status": "active",
        "greediness": 0.1,
        "current_checkpoint_uuid": None,
        "initial_checkpoint_uuid": None,
        "resource_budgets": {},
        "resource_limits": {"money": {}, "time_hours": {}, "api_calls": {}},
        "resource_usage_today": {"money": {"used": money(0), "reserved": money(0)}, "time_hours": {}, "api_calls": {}},
        "active_machine_count": 0,
        "checkpoint_count": 0,
        "created_at": NOW,
        "updated_at": NOW,
        **more,
    }


def machine(name: str, owner: Row, **more: Any) -> Row:
    empty = dict.fromkeys(
        ("vmid", "checkpoint_uuid", "prompt", "exit_status", "error_message", "last_checkpoint_uuid", "operation_uuid")
    )
    return {
        "uuid": str(uuid4()),
        "name": name,
        **empty,
        "type": "shell",
        "status": "active",
        "project_uuid": owner["uuid"],
        "resource_constraints": {},
        "resource_usage": {},
        "progress": "",
        "checkpoint_count": 0,
        "spawned_at": NOW,
        "finished_at": None,
        "terminated_at": None,
        "updated_at": NOW,
        **more,
    }


def checkpoint(owner: Row, **more: Any) -> Row:
    empty = dict.fromkeys(
        ("parent_uuid", "machine_uuid", "label", "node", "vmid", "proxmox_snapshot_id", "artefact", "verified_at")
    )
    return {
        "uuid": str(uuid4()),
        "project_uuid": owner["uuid"],
        **empty,
        "type": "manual",
        "description": "",
        "context": "",
        "status": "ready",
        "root_digest": "00" * 32,
        "file_count": 1,
        "size_bytes": 10,
        "size_mb": 0.0,
        "unique_bytes": 0,
        "metadata": {},
        "created_at": NOW,
        **more,
    }


def operation(**more: Any) -> Row:
    return {
        "uuid": str(uuid4()),
        "kind": "spawn",
        "status": "running",
        "step": "clone",
        "steps": ["clone", "start", "mark"],
        "progress": "",
        "error": None,
        "object_uuid": str(uuid4()),
        "created_at": NOW,
        "finished_at": None,
        **more,
    }


def diff(base: Row, target: Row, **more: Any) -> Row:
    lists: Row = {"added": [], "modified": [], "deleted": [], "renamed": []}
    given = {**lists, **more}
    total = sum(len(given[name]) for name in ("added", "modified", "deleted"))
    return {
        "base": base["uuid"],
        "target": target["uuid"],
        "is_cross_project": False,
        **given,
        "total_changes": total,
        "summary": f"{total} changes" if total else "No changes",
    }


class Refuse(Exception):
    """Answer an error envelope."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        body = {"code": code, "message": message, "details": {}, "request_id": "r-1", "timestamp": NOW}
        self.status, self.body = status, {"success": False, "error": body}


class Drop(Exception):
    """Close the connection without an answer."""


class Sse:
    """Answer server-sent events: the blocks as they come out of `blocks`, then the connection ends."""

    def __init__(self, blocks: Iterable[str]) -> None:
        self.blocks = blocks


def event(id: int, kind: str, about: str | None, resume_id: int | None = None, **body: Any) -> str:
    """One event as a stream carries it."""
    data = {"id": id, "kind": kind, "object_uuid": about, "project_uuid": None, "body": body, "created_at": NOW}
    return f"id: {id if resume_id is None else resume_id}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"


class Wire:
    """The rows, what was asked, and answers of a test's own: `routes` are (method, pattern) -> function, first wins."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Row]] = {"projects": [], "machines": [], "checkpoints": [], "operations": []}
        self.asked: list[tuple[str, str, Row, Row]] = []  # method, path, query or body, headers
        self.routes: list[tuple[str, str, Callable[..., Any]]] = []
        self.drops = 0
        self.url = ""

    def on(self, method: str, pattern: str, answer: Callable[..., Any]) -> None:
        """`answer(given, *groups)` returns the body; it may raise Refuse or Drop."""
        self.routes.insert(0, (method, pattern, answer))

    def put(self, kind: str, row: Row) -> Row:
        self.rows[kind].insert(0, row)
        return row

    def answer(self, method: str, path: str, given: Row) -> Any:
        for wanted, pattern, answer in self.routes:
            if wanted == method and (match := re.fullmatch(pattern, path)):
                return answer(given, *match.groups())
        if match := re.fullmatch(r"/projects/([^/]+)/checkpoints", path):
            return self._page("checkpoints", given, {"project_uuid": match[1]})
        if (match := re.fullmatch(r"/(\w+)", path)) and match[1] in self.rows:
            return self._page(
                match[1], given, {key: given[key] for key in ("name", "status", "project_uuid") if key in given}
            )
        if match := re.fullmatch(r"/(\w+)/([^/]+)", path):
            for row in self.rows.get(match[1], []):
                if UUID(row["uuid"]) == UUID(match[2]):
                    return row
        raise Refuse(404, "NOT_FOUND", f"There is nothing at '{path}'.")

    def _page(self, kind: str, given: Row, where: Row) -> Row:
        found = [row for row in self.rows[kind] if all(row.get(key) == value for key, value in where.items())]
        offset, limit = int(given.get("offset", 0)), int(given.get("limit", 50))
        end = offset + limit
        return {
            kind: found[offset:end],
            "total_count": len(found),
            "has_more": end < len(found),
            "next_offset": end if end < len(found) else None,
        }


@contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[Wire]:
    wire = Wire()

    class Far(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            self._respond("GET", parts.path, dict(parse_qsl(parts.query)))

        def do_POST(self) -> None:
            self._respond("POST", self.path, self._body())

        def do_PUT(self) -> None:
            self._respond("PUT", self.path, self._body())

        def _body(self) -> Row:
            return dict(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"))

        def _respond(self, method: str, path: str, given: Row) -> None:
            path = path.removeprefix("/api/v1")
            wire.asked.append((method, path, given, dict(self.headers)))
            status, body = 200, None
            try:
                if wire.drops:
                    wire.drops -= 1
                    raise Drop
                body = wire.answer(method, path, given)
            except Refuse as refusal:
                status, body = refusal.status, refusal.body
            except Drop:
                self.close_connection = True
                return
            if isinstance(body, Sse):
                self._stream(body)
                return
            payload = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def _stream(self, body: Sse) -> None:
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            for block in body.blocks:
                self.wfile.write(block.encode())
                self.wfile.flush()

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Far)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    wire.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
    try:
        yield wire
    finally:
        server.shutdown()
        server.server_close()
