"""One page of a list: what `limit` and `offset` cut out, and how a client goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlmodel import Session, func, select
from sqlmodel.sql.expression import SelectOfScalar

Row = TypeVar("Row")


@dataclass(frozen=True)
class Cut:
    """Which part of a list is asked for: `limit` rows (1-200) from `offset` on."""

    limit: int = 50
    offset: int = 0


@dataclass(frozen=True)
class Slice(Generic[Row]):
    rows: list[Row]
    total_count: int
    next_offset: int | None

    def page(self) -> dict[str, Any]:
        """The fields every list has on the wire."""
        return {
            "total_count": self.total_count,
            "has_more": self.next_offset is not None,
            "next_offset": self.next_offset,
        }


def cut(session: Session, statement: SelectOfScalar[Row], part: Cut) -> Slice[Row]:
    """The rows of an ordered statement that `part` names, with the count of all of them."""
    total = session.exec(select(func.count()).select_from(statement.order_by(None).subquery())).one()
    rows = list(session.exec(statement.limit(part.limit).offset(part.offset)).all())
    end = part.offset + len(rows)
    return Slice(rows, total, end if rows and end < total else None)
