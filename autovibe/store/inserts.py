"""New rows from plain values, below the ORM: an object for each, and the flush that writes it, take ten times as long.

For rows that are written and not worked with: events, the audit log, the ledger's entries, what a spawn records.

    add, put     written now
    later        written at the end of the transaction, by the store: in few statements, since on PostgreSQL each is a
    put_later    round trip for which the project's next spawn waits

Each INSERT is compiled once, and what its columns do to values on their way into the database is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar, cast

from sqlalchemy import Dialect, inspect
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, SQLModel

Model = TypeVar("Model", bound=SQLModel)
Values = Mapping[str, Any]

_LATER, _PUT_LATER, _CHANNEL = "rows written later", "rows put later", "channel notified later"
_MOST_PARAMETERS = 50  # of a statement of more psycopg keeps nothing, and reads it anew each time


class _Layout(NamedTuple):
    """A model's attributes, and what those have that are not given."""

    columns: Mapping[str, Any]
    defaults: Values
    makers: Mapping[str, Callable[[], Any]]
    may_lack: frozenset[str]  # what is null in the database when it is left out

    def lacks(self, name: str, rows: Sequence[Values]) -> bool:
        return rows[0][name] is None and name in self.may_lack and all(row[name] is None for row in rows)

    def filled(self, given: Values) -> dict[str, Any]:
        return {**self.defaults, **{name: make() for name, make in self.makers.items() if name not in given}, **given}


class Mark(NamedTuple):
    """How many rows a transaction is to add at its end, and which it is to put."""

    added: Mapping[type[SQLModel], int]
    put: dict[type[SQLModel], dict[Any, Values]]


class _Statement(NamedTuple):
    """An INSERT of some rows in a dialect's own words. `fields` are its parameters, in its order: their names, the
    row and the attribute of each. A processor makes of an attribute's value what the driver takes."""

    words: str
    fields: tuple[tuple[str, int, str], ...]
    processors: tuple[tuple[str, Callable[[Any], Any]], ...]
    is_positional: bool

    def parameters(self, rows: list[dict[str, Any]]) -> tuple[Any, ...] | dict[str, Any]:
        """Changes `rows`."""
        for row in rows:
            for name, process in self.processors:
                row[name] = process(row[name])
        if self.is_positional:
            return tuple([rows[number][name] for _, number, name in self.fields])
        return {parameter: rows[number][name] for parameter, number, name in self.fields}


def add(session: Session, model: type[SQLModel], *rows: Values) -> None:
    """Add rows, each given by its attributes, the same in all of them; the model's defaults fill up the rest.

    They are written now, before what the session still holds back, by one statement: there are few of them. Raises
    IntegrityError.
    """
    _add(session, model, rows, is_replacing=False)


def later(session: Session, model: type[SQLModel], *rows: Values) -> None:
    """As `add`, at the end of the transaction, which sees nothing of them itself. Rows of one model keep their order;
    a model that refers to another comes after it.
    """
    if rows:
        session.info.setdefault(_LATER, {}).setdefault(model, []).extend(rows)


def put_later(session: Session, model: type[SQLModel], given: Mapping[Any, Values]) -> None:
    """As `put`, at the end of the transaction: rows by their keys, of which the last values count."""
    session.info.setdefault(_PUT_LATER, {}).setdefault(model, {}).update(given)


def waiting(session: Session, model: type[SQLModel]) -> Sequence[Values]:
    """The rows of a model that the transaction is to add at its end."""
    found: Sequence[Values] = session.info.get(_LATER, {}).get(model, ())
    return found


def put_off(session: Session, model: type[SQLModel]) -> Mapping[Any, Values]:
    """The rows of a model that the transaction is to put at its end."""
    found: Mapping[Any, Values] = session.info.get(_PUT_LATER, {}).get(model, {})
    return found


def put_now(session: Session, model: type[SQLModel]) -> None:
    """Write what was to be put at the end, for who reads it."""
    given = session.info.get(_PUT_LATER, {}).pop(model, {})
    put(session, model, *(given[key] for key in sorted(given)))


def mark(session: Session) -> Mark:
    """What has been put off so far, to go back to."""
    lengths = {model: len(rows) for model, rows in session.info.get(_LATER, {}).items()}
    return Mark(lengths, {model: dict(given) for model, given in session.info.get(_PUT_LATER, {}).items()})


def rewind(session: Session, mark: Mark) -> None:
    """Forget what was put off since the mark."""
    for model, rows in session.info.get(_LATER, {}).items():
        del rows[mark.added.get(model, 0) :]
    session.info[_PUT_LATER] = mark.put


def notify(session: Session, channel: str) -> None:
    """Have PostgreSQL tell who listens to the channel, at the end of the transaction; SQLite has no such thing."""
    session.info[_CHANNEL] = channel


def write(session: Session) -> None:
    """Add what was put off, for the end of a transaction. Raises IntegrityError."""
    added: dict[type[SQLModel], list[Values]] = session.info.pop(_LATER, {})
    put: dict[type[SQLModel], dict[Any, Values]] = session.info.pop(_PUT_LATER, {})
    if not added and not put:
        return
    session.flush()
    connection = session.connection()
    prepared = [
        _prepared(connection.dialect, model, [given[key] for key in sorted(given)], is_replacing=True)
        for model, given in put.items()
        if given
    ]
    prepared += [
        _prepared(connection.dialect, model, rows, is_replacing=False) for model, rows in added.items() if rows
    ]
    if connection.dialect.name == "postgresql":
        if (channel := session.info.pop(_CHANNEL, None)) is not None:
            prepared.append((f"SELECT pg_notify('{channel}', '')", {}))
        prepared = list(_joined(prepared))
    for words, parameters in prepared:
        connection.exec_driver_sql(words, parameters)


def put(session: Session, model: type[SQLModel], *rows: Values) -> None:
    """As `add`, and a row that is there already, by its primary key, gets these values."""
    _add(session, model, rows, is_replacing=True)


def _add(session: Session, model: type[SQLModel], rows: Sequence[Values], *, is_replacing: bool) -> None:
    if rows:
        connection = session.connection()
        connection.exec_driver_sql(*_prepared(connection.dialect, model, rows, is_replacing=is_replacing))


def _prepared(
    dialect: Dialect, model: type[SQLModel], rows: Sequence[Values], *, is_replacing: bool
) -> tuple[str, Any]:
    """A statement and its parameters; of several rows that are too many for one, a list of each one's."""
    layout = _layout(model)
    filled = [layout.filled(row) for row in rows]
    names = tuple([name for name in filled[0] if is_replacing or not layout.lacks(name, filled)])
    if len(filled) > 1 and len(filled) * len(names) > _MOST_PARAMETERS:
        statement = _statement(model, dialect, names, 1, is_replacing)
        return statement.words, [statement.parameters([row]) for row in filled]
    statement = _statement(model, dialect, names, len(rows), is_replacing)
    return statement.words, statement.parameters(filled)


def _joined(prepared: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The statements of PostgreSQL, as many in one as its driver can take."""
    together: list[tuple[str, Any]] = []
    for words, parameters in prepared:
        is_alone = isinstance(parameters, list)
        if together and (is_alone or sum(len(each) for _, each in (*together, ("", parameters))) > _MOST_PARAMETERS):
            yield _one(together)
            together = []
        if is_alone:
            yield words, parameters
        else:
            together.append((words, parameters))
    if together:
        yield _one(together)


def _one(statements: list[tuple[str, Any]]) -> tuple[str, Any]:
    named = {f"s{n}_{name}": value for n, (_, each) in enumerate(statements) for name, value in each.items()}
    return _with(tuple(words for words, _ in statements)), named


def draft(model: type[Model], **given: Any) -> Model:
    """What has a new row's attributes and is none: to be worked out before it is added, at a tenth of the time."""
    return cast(Model, SimpleNamespace(**_layout(model).filled(given)))


def values_of(drafted: SQLModel) -> Values:
    """What `add` takes, of a draft."""
    return vars(drafted)


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
    may_lack = {name for name, column in columns.items() if column.nullable and column.server_default is None}
    return _Layout(columns, defaults, makers, frozenset(may_lack))


@cache
def _with(statements: tuple[str, ...]) -> str:
    """One statement that carries out all of them; the parameters of the nth begin with `s<n>_`."""
    apart = [words.replace("%(", f"%(s{number}_") for number, words in enumerate(statements)]
    before = ", ".join(f"i{number} AS ({words})" for number, words in enumerate(apart[:-1]))
    return f"WITH {before} {apart[-1]}" if before else apart[-1]


@cache
def _statement(
    model: type[SQLModel], dialect: Dialect, names: tuple[str, ...], count: int, is_replacing: bool
) -> _Statement:
    columns = {name: _layout(model).columns[name] for name in names}
    # SQLAlchemy's own name for a parameter of one row among several; inline: nobody asks for a key that was counted.
    fields = {f"{column.key}_m{number}": (number, name) for number in range(count) for name, column in columns.items()}
    statement: Any = sqlite.insert(model) if dialect.name == "sqlite" else postgresql.insert(model)
    statement = statement.inline().values([{column.key: None for column in columns.values()} for _ in range(count)])
    if is_replacing:
        key = [column for column in columns.values() if column.primary_key]
        others = {column.key: statement.excluded[column.key] for column in columns.values() if column not in key}
        statement = statement.on_conflict_do_update(index_elements=key, set_=others)
    compiled: Any = statement.compile(dialect=dialect)
    processors = {name: column.type.dialect_impl(dialect).bind_processor(dialect) for name, column in columns.items()}
    return _Statement(
        compiled.string,
        tuple((parameter, *fields[parameter]) for parameter in compiled.positiontup or fields),
        tuple((name, process) for name, process in processors.items() if process is not None),
        compiled.positional,
    )
