"""The audit line of the request this code runs for, written in the transaction of the change it tells of.

    opened(line)         the door, for every request that may change something; lives in a context variable, so it is
                         the same line in the threads the request's code runs in
    note(…)              what only the verb knows: the object it made
    Store.transaction()  adds the line to the first transaction of the request that commits: no change without it, and
                         no line of a change that was rolled back

A verb that commits nothing (exec) and one that fails leave `is_written` False; the door then hands the line to the
batched writer (hub.trail). A request that fails after it has committed has both lines, the later one with its failure.
"""

from __future__ import annotations

import contextvars
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlmodel import Session

from autovibe.domain import AuditEntry
from autovibe.store import inserts


@dataclass
class Line:
    """What the audit log will say. `status` is what the route answers when nothing goes wrong."""

    actor: str
    key_id: str
    verb: str
    status: int
    request_id: str
    client: str
    object_kind: str = ""
    object_uuid: UUID | None = None
    project_uuid: UUID | None = None
    is_named: bool = False  # the path names the object
    is_written: bool = False

    def entry(self, outcome: str, status: int | None = None) -> AuditEntry:
        return AuditEntry(**self.values(outcome, status))

    def values(self, outcome: str, status: int | None = None) -> dict[str, Any]:
        """What the entry says."""
        return {
            "actor": self.actor[:100],
            "key_id": self.key_id,
            "verb": self.verb[:120],
            "object_kind": self.object_kind,
            "object_uuid": self.object_uuid,
            "project_uuid": self.project_uuid,
            "outcome": outcome,
            "status": self.status if status is None else status,
            "request_id": self.request_id,
            "client": self.client[:64],
        }


current: contextvars.ContextVar[Line | None] = contextvars.ContextVar("audit_line", default=None)


def note(kind: str = "", uuid: UUID | None = None, project_uuid: UUID | None = None) -> None:
    """What the verb has made, which is the line's object unless the path names one, and whose it is.

    The last note counts: a verb that met another on a unique column decides again.
    """
    line = current.get()
    if line is None:
        return
    if uuid is not None and not line.is_named:
        line.object_kind, line.object_uuid = kind, uuid
    line.project_uuid = project_uuid or line.project_uuid


def forget() -> None:
    """What was noted by a decision that is made anew."""
    line = current.get()
    if line is not None and not line.is_named:
        line.object_kind, line.object_uuid = "", None


def write(session: Session) -> None:
    """Add the line to a transaction that is about to commit."""
    line = current.get()
    if line is not None and not line.is_written:
        inserts.later(session, AuditEntry, line.values("done"))


def written() -> None:
    """The transaction has committed."""
    line = current.get()
    if line is not None:
        line.is_written = True


def unchanged() -> None:
    """The verb was asked only to look (a dry run), so there is nothing to tell of it unless it fails."""
    written()
