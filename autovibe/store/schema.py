"""Migrations: one process at a time, a backup before, a newer schema refused.

The lock is a file lock beside a SQLite database and an advisory lock in PostgreSQL; whoever waits for it finds the work
done. All pending migrations run in one transaction on both databases, so a failed one changes nothing. The backup of a
SQLite file is a copy made by SQLite's online backup; of a PostgreSQL database, one by `pg_dump` where that is installed
and as new as the server (otherwise the log says that there is none: back up a shared server by its own means). The last
5 are kept. To go back: stop the Hub, put the copy in the database's place (`pg_restore --clean` for PostgreSQL), start
the old version.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, select, text

from autovibe.domain.columns import now
from autovibe.errors import ConfigurationError, DatabaseUnavailable, InternalError, OperationFailed
from autovibe.store import Store, migration_engine
from autovibe.store.copies import copy_sqlite, dump_postgres
from autovibe.store.tables import schema_history

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).with_name("migrations")
LOCK_SECONDS = 120
KEPT_BACKUPS = 5
_ADVISORY_LOCK = 0x6175746F  # any number that is ours: "auto"


def migrate(store: Store, backups: Path) -> None:
    """Bring the schema to this version's.

    Raises ConfigurationError for the schema of a newer autovibe, DatabaseUnavailable when another process has been at
    it for two minutes.
    """
    engine = migration_engine(store.url)
    try:
        with _file_lock(store), engine.connect() as connection, connection.begin():
            if not store.is_sqlite:
                connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'"))
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
            _upgrade(store, connection, backups)
    finally:
        engine.dispose()


def head() -> str:
    """The revision this version of autovibe needs."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def revision_of(store: Store) -> str | None:
    """The revision the database has; None for an empty one."""
    with store.connection() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def knows(revision: str | None) -> bool:
    """Whether this autovibe can bring a database of that revision to its own."""
    return revision in [step.revision for step in ScriptDirectory.from_config(_config()).walk_revisions()]


def _upgrade(store: Store, connection: Connection, backups: Path) -> None:
    config = _config()
    script = ScriptDirectory.from_config(config)
    known = [step.revision for step in reversed(list(script.walk_revisions()))]
    current = MigrationContext.configure(connection).get_current_revision()
    if current == known[-1]:
        return
    if current is not None and current not in known:
        raise _too_new(connection, current, known[-1])
    if current is not None:
        backup(store, backups, current)
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    pending = known[known.index(current) + 1 :] if current else known
    made = {"autovibe": _version(), "migrated_at": now()}
    connection.execute(schema_history.insert(), [{"revision": revision, **made} for revision in pending])
    if store.is_sqlite and (orphans := connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()):
        raise InternalError(f"The migration to '{known[-1]}' would leave {len(orphans)} rows without their parents.")
    log.info("The database schema is now %s (was %s).", known[-1], current or "empty")


def _too_new(connection: Connection, current: str, ours: str) -> ConfigurationError:
    version = None
    if inspect(connection).has_table(schema_history.name):
        query = select(schema_history.c.autovibe).where(schema_history.c.revision == current)
        version = connection.execute(query).scalar_one_or_none()
    needed = f"autovibe {version} or newer" if version else "the newer autovibe that wrote it"
    return ConfigurationError(
        f"The database has schema '{current}', this autovibe ({_version()}) knows schemas up to '{ours}'. "
        f"Install {needed}, or put a backup of the older schema in its place.",
        details={"schema": current, "known": ours, "needs": version},
    )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _version() -> str:
    try:
        return importlib.metadata.version("autovibe")
    except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
        return "0"


@contextmanager
def _file_lock(store: Store) -> Iterator[None]:
    if not store.is_sqlite:
        yield
        return
    deadline = time.monotonic() + LOCK_SECONDS
    with store.path.with_name(store.path.name + ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    message = f"Another process has been migrating '{store.path}' for {LOCK_SECONDS} s; try again."
                    raise DatabaseUnavailable(message) from None
                time.sleep(0.05)
        yield


def backup(store: Store, backups: Path, label: str) -> Path | None:
    """Copy the database into `backups` and keep the last 5 copies; None where PostgreSQL cannot be dumped from here."""
    backups.mkdir(mode=0o700, parents=True, exist_ok=True)
    ending = "db" if store.is_sqlite else "dump"
    target = backups / f"autovibe-{now():%Y%m%dT%H%M%S.%fZ}-{label}.{ending}"
    partial = target.with_suffix(".partial")
    try:
        if store.is_sqlite:
            copy_sqlite(store.path, partial)
        else:
            dump_postgres(store, partial)
    except (ConfigurationError, OperationFailed) as error:
        partial.unlink(missing_ok=True)
        log.warning("The database is migrated without a backup by autovibe: %s", error.message)
        return None
    partial.replace(target)
    for old in sorted(backups.glob(f"autovibe-*.{ending}"))[:-KEPT_BACKUPS]:
        old.unlink()
    return target
