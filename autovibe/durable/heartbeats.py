"""Who is alive: a lock file a process, and a row a process that says when it was last seen.

A process holds a slot of its hub's home by `flock`, which the kernel gives back when it dies; its executor id is
`<host>-<home>-<slot>`, so a successor on the same home gets the id, and with it the unfinished workflows, back. The row
is for the others: one that was not seen for `stale_seconds` is dead, and whoever wins the compare-and-set on its
`incarnation` adopts its work. A process that finds its own incarnation changed was taken for dead and must stop what it
was doing. Moments are the database's clock, so hosts need not agree on the time.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from pathlib import Path
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

_SLOTS = 64


class Slot:
    """The lowest free slot of a home, held until `release` or death. Raises OSError when all are taken."""

    def __init__(self, home: Path) -> None:
        directory = home / "executors"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in range(_SLOTS):
            descriptor = os.open(directory / f"slot-{number}", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            self.number, self._descriptor = number, descriptor
            return
        raise OSError(f"All {_SLOTS} slots of '{directory}' are taken by other hub processes.")

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def home_id(home: Path) -> str:
    """Eight random characters made once a home: two containers with equal host names and paths still differ."""
    directory = home / "executors"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / "home-id"
    if not path.exists():
        draft = directory / f"home-id.{secrets.token_hex(4)}"
        draft.write_text(secrets.token_hex(4), encoding="ascii")
        try:
            os.link(draft, path)  # unlike a rename it never replaces what another process made
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text(encoding="ascii").strip()


class Heartbeats:
    """The rows of all processes that share a system database; `schema` is None on SQLite."""

    def __init__(self, engine: sa.Engine, schema: str | None, executor_id: str, stale_seconds: float) -> None:
        self._engine = engine
        self._executor_id = executor_id
        self._stale_seconds = stale_seconds
        self._incarnation = ""
        self._table = sa.Table(
            "autovibe_executor",
            sa.MetaData(schema=schema),
            sa.Column("executor_id", sa.String(200), primary_key=True),
            sa.Column("incarnation", sa.String(36), nullable=False),
            sa.Column("seen_at", sa.Double, nullable=False),
            sa.Column("is_being_adopted", sa.Boolean, nullable=False),
        )
        self._now: sa.ColumnElement[float] = (
            sa.func.extract("epoch", sa.func.clock_timestamp()).cast(sa.Double)
            if engine.dialect.name == "postgresql"
            else sa.literal_column("(julianday('now') - 2440587.5) * 86400.0", sa.Double)
        )

    def create(self) -> None:
        """Make the table, and on PostgreSQL its schema, where there is none yet."""
        with self._engine.begin() as connection:
            if self._table.schema is not None:
                # CREATE … IF NOT EXISTS is no protection against a second process that does the same now.
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext('autovibe durable'))"))
                if not sa.inspect(connection).has_schema(self._table.schema):
                    connection.execute(sa.schema.CreateSchema(self._table.schema))
            else:
                connection.execute(sa.text("PRAGMA journal_mode=WAL"))
            self._table.metadata.create_all(connection)

    def enter(self) -> None:
        """Take over the row of this process's executor id, after waiting for an adoption that is under way to end."""
        table = self._table
        while True:
            incarnation = str(uuid4())
            with self._engine.begin() as connection:
                row = connection.execute(
                    sa.select(table.c.incarnation, table.c.is_being_adopted, self._age()).where(self._is_mine())
                ).one_or_none()
                if row is None:
                    try:
                        connection.execute(
                            table.insert().values(
                                executor_id=self._executor_id,
                                incarnation=incarnation,
                                seen_at=self._now,
                                is_being_adopted=False,
                            )
                        )
                    except IntegrityError:
                        connection.rollback()
                        continue
                    self._incarnation = incarnation
                    return
                if not row.is_being_adopted or row.age > self._stale_seconds:
                    taken = connection.execute(
                        table.update()
                        .where(self._is_mine(), table.c.incarnation == row.incarnation)
                        .values(incarnation=incarnation, seen_at=self._now, is_being_adopted=False)
                    )
                    if taken.rowcount == 1:
                        self._incarnation = incarnation
                        return
            time.sleep(0.2)

    def beat(self) -> bool:
        """Say that this process lives. False when it was taken for dead in the meantime."""
        return self._mark(self._now)

    def leave(self) -> None:
        """Say that this process ends, so that others adopt what it leaves without waiting."""
        self._mark(sa.literal(0.0))

    def alive(self) -> dict[str, float]:
        """Every executor that is not taken for dead, with the seconds since it was last seen."""
        statement = sa.select(self._table.c.executor_id, self._age()).order_by(self._table.c.executor_id)
        with self._engine.connect() as connection:
            return {row.executor_id: row.age for row in connection.execute(statement) if row.age < self._stale_seconds}

    def claim_dead(self) -> dict[str, str]:
        """The executors this process adopts now: id and the claim to pass to `forget`. Each is won by one process."""
        table, won = self._table, {}
        is_stale = (self._now - table.c.seen_at) > self._stale_seconds
        with self._engine.connect() as connection:
            dead = connection.execute(
                sa.select(table.c.executor_id, table.c.incarnation).where(~self._is_mine(), is_stale)
            ).all()
        for executor_id, incarnation in dead:
            claim = str(uuid4())
            with self._engine.begin() as connection:
                taken = connection.execute(
                    table.update()
                    .where(table.c.executor_id == executor_id, table.c.incarnation == incarnation, is_stale)
                    .values(incarnation=claim, seen_at=self._now, is_being_adopted=True)
                )
            if taken.rowcount == 1:
                won[executor_id] = claim
        return won

    def forget(self, executor_id: str, claim: str) -> None:
        """Remove the row of an executor whose work has been adopted."""
        table = self._table
        with self._engine.begin() as connection:
            connection.execute(table.delete().where(table.c.executor_id == executor_id, table.c.incarnation == claim))

    def _mark(self, moment: sa.ColumnElement[float]) -> bool:
        table = self._table
        with self._engine.begin() as connection:
            marked = connection.execute(
                table.update().where(self._is_mine(), table.c.incarnation == self._incarnation).values(seen_at=moment)
            )
        return bool(marked.rowcount == 1)

    def _is_mine(self) -> sa.ColumnElement[bool]:
        return self._table.c.executor_id == self._executor_id

    def _age(self) -> sa.ColumnElement[float]:
        return (self._now - self._table.c.seen_at).label("age")
