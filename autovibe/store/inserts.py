"""New rows from plain values, below the ORM: an object for each, and the flush that writes it, take six times as long.

For rows that are written and not worked with: events, the audit log, the ledger's entries, what a spawn records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import Insert, inspect
from sqlmodel import Session, SQLModel, insert


class _Layout(NamedTuple):
    """How a model's values become a row: attribute -> column, and the defaults of what is not given."""

    statement: Insert
    columns: Mapping[str, str]
    defaults: Mapping[str, Any]
    makers: Mapping[str, Callable[[], Any]]


def add(session: Session, model: type[SQLModel], *rows: Mapping[str, Any]) -> None:
    """Add rows, each given by its attributes, the same in all of them; the model's defaults fill up the rest.

    They are written now, before what the session still holds back. Raises IntegrityError.
    """
    if not rows:
        return
    layout = _layout(model)
    filled = [_filled(layout, row) for row in rows]
    session.connection().execute(layout.statement, filled[0] if len(filled) == 1 else filled)


def values_of(row: SQLModel) -> dict[str, Any]:
    """What `add` takes, of an object that is no row yet."""
    return {name: getattr(row, name) for name in _layout(type(row)).columns}


def _filled(layout: _Layout, row: Mapping[str, Any]) -> dict[str, Any]:
    made = {name: make() for name, make in layout.makers.items() if name not in row}
    return {layout.columns[name]: value for name, value in {**layout.defaults, **made, **row}.items()}


@cache
def _layout(model: type[SQLModel]) -> _Layout:
    columns = {attribute.key: attribute.columns[0] for attribute in inspect(model).column_attrs}
    defaults: dict[str, Any] = {}
    makers: dict[str, Callable[[], Any]] = {}
    for name, field in model.model_fields.items():
        is_counted = columns[name].primary_key and field.default is None  # by the database
        if field.default_factory is not None:
            makers[name] = field.default_factory  # type: ignore[assignment]
        elif not field.is_required() and not is_counted:
            defaults[name] = field.default
    # inline: nobody asks for a key that the database has counted
    return _Layout(insert(model).inline(), {name: column.key for name, column in columns.items()}, defaults, makers)
