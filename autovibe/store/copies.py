"""Consistent copies of a database while others write to it, and putting one back.

SQLite: its online backup, one file without a -wal beside it. PostgreSQL: `pg_dump --format=custom`, put back by
`pg_restore` and `psql` in one transaction. The programs must be as new as the server; passwords travel in the
environment, never in argv.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.engine import URL
from sqlmodel import SQLModel

import autovibe.domain  # noqa: F401 - declares every table
from autovibe.errors import ConfigurationError, OperationFailed
from autovibe.store import Store, tables

_LOCK_SECONDS = 30  # what a restore waits for somebody who still reads the database
_VERSIONED = Path("/usr/lib/postgresql")  # where Debian keeps the programs of each version


def copy_sqlite(source: Path, target: Path) -> None:
    """`target` becomes `source` as it is at one moment, with what is in its -wal; `source` is not held up."""
    create_privately(target)
    with closing(sqlite3.connect(source)) as origin, closing(sqlite3.connect(target)) as copy:
        origin.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE").close()  # one file, without a -wal beside it
    sync(target)


def dump_postgres(store: Store, target: Path) -> None:
    """Raises ConfigurationError when pg_dump is missing or older than the server, OperationFailed when it fails."""
    create_privately(target)
    argv = [find_program(store, "pg_dump"), "--format=custom", "--no-password", f"--file={target}"]
    _run([*argv, f"--dbname={_without_password(store.url)}"], store.url)
    sync(target)


def restore_postgres(store: Store, dump: Path, script: Path) -> None:
    """Replace all that is the Hub's in the database by the dump, in one transaction; `script` is written and removed.

    Tables of a newer schema go too. What others keep in the same database is left alone unless the dump holds it.
    """
    programs = {name: find_program(store, name) for name in ("pg_restore", "psql")}
    create_privately(script)
    try:
        options = ["--clean", "--if-exists", "--no-owner", "--no-privileges", f"--file={script}"]
        _run([programs["pg_restore"], *options, str(dump)], store.url)
        names = sorted({*SQLModel.metadata.tables, tables.schema_history.name, "alembic_version"})
        drop = "".join(f'DROP TABLE IF EXISTS "{name}" CASCADE;\n' for name in names)
        drop += "DROP SCHEMA IF EXISTS autovibe_durable CASCADE;\n"
        once = ["--no-psqlrc", "--no-password", "--quiet", "--single-transaction", "--set=ON_ERROR_STOP=1"]
        quiet = f"SET client_min_messages = warning; SET lock_timeout = '{_LOCK_SECONDS}s';"
        target = f"--dbname={_without_password(store.url)}"
        _run([programs["psql"], *once, target, "-c", quiet, "-c", drop, "-f", str(script)], store.url)
    finally:
        script.unlink(missing_ok=True)


def size_of(store: Store) -> int:
    """About how many bytes the database is."""
    question = "SELECT pg_database_size(current_database())"
    if store.is_sqlite:
        question = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
    with store.connection() as connection:
        return int(connection.execute(text(question)).scalar_one())


def find_program(store: Store, name: str) -> str:
    """The path of a program of PostgreSQL that is as new as the server. Raises ConfigurationError with the remedy."""
    with store.connection() as connection:
        server = int(connection.execute(text("SHOW server_version_num")).scalar_one()) // 10000
    remedy = f"install postgresql-client-{server} (or newer) on the Hub's computer"
    found = sorted(_VERSIONED.glob(f"*/bin/{name}"), key=lambda path: -int(re.sub(r"\D", "", path.parts[-3]) or 0))
    candidates = [*filter(None, [shutil.which(name)]), *map(str, found)]
    if not candidates:
        raise ConfigurationError(f"'{name}' is not installed and the PostgreSQL database needs it; {remedy}.")
    versions = {path: _version(path) for path in candidates}
    if fitting := [path for path, version in versions.items() if version >= server]:
        return fitting[0]
    raise ConfigurationError(
        f"'{name}' is of version {max(versions.values())} and the PostgreSQL server of version {server}; {remedy}."
    )


def create_privately(path: Path) -> None:
    """An empty file of mode 0600 in the place of whatever was there."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def sync(path: Path) -> None:
    """Have the file, or the entries of the directory, on the disk and not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _version(program: str) -> int:
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"(\d+)(\.\d+|devel|beta|rc|$)", told)
    return int(found.group(1)) if found else 0


def _without_password(url: URL) -> str:
    bare = url.set(drivername="postgresql", password=None).difference_update_query(["password"])
    return bare.render_as_string(hide_password=False)


def _run(argv: Sequence[str], url: URL) -> None:
    password = url.password or url.query.get("password")
    environment = {**os.environ, **({"PGPASSWORD": str(password)} if password else {})}
    ended = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        name = Path(argv[0]).name
        words = ended.stderr.strip()[-500:]
        raise OperationFailed(f"{name} ended with status {ended.returncode}: {words or 'it did not say why'}")
