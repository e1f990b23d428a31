"""Sums by UTC day, as one statement each, on both databases."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlmodel import Float, String


class DayOf(FunctionElement[str]):
    """The UTC date of a moment's column as text, "2026-11-21", which is how periods of accounts are named."""

    type = String()
    inherit_cache = True
    name = "day_of"


class SecondsBetween(FunctionElement[float]):
    """The seconds from the first moment to the second."""

    type = Float()
    inherit_cache = True
    name = "seconds_between"


def day_of(moment: Any) -> ColumnElement[str]:
    return DayOf(moment)


def seconds_between(begin: Any, end: Any) -> ColumnElement[float]:
    return SecondsBetween(begin, end)


@compiles(DayOf, "sqlite")
def _day_in_sqlite(element: DayOf, compiler: Any, **options: Any) -> str:
    return f"substr({compiler.process(element.clauses, **options)}, 1, 10)"  # stored as text, in UTC


@compiles(DayOf, "postgresql")
def _day_in_postgresql(element: DayOf, compiler: Any, **options: Any) -> str:
    return f"to_char({compiler.process(element.clauses, **options)} AT TIME ZONE 'UTC', 'YYYY-MM-DD')"


@compiles(SecondsBetween, "sqlite")
def _seconds_in_sqlite(element: SecondsBetween, compiler: Any, **options: Any) -> str:
    begin, end = (compiler.process(part, **options) for part in element.clauses)
    return f"((julianday({end}) - julianday({begin})) * 86400.0)"


@compiles(SecondsBetween, "postgresql")
def _seconds_in_postgresql(element: SecondsBetween, compiler: Any, **options: Any) -> str:
    begin, end = (compiler.process(part, **options) for part in element.clauses)
    return f"EXTRACT(EPOCH FROM ({end} - {begin}))::double precision"
