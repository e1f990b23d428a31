"""Migrations, on both databases: the schema is the tables', done once, backed up before, never taken back."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlmodel import SQLModel, select

from autovibe.domain import Machine, Project
from autovibe.errors import ConfigurationError
from autovibe.store import Store, schema

NEXT = """
import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = "{before}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("project") as batch:
        batch.add_column(sa.Column("{column}", sa.String(), nullable=True))
    {more}
"""


@pytest.fixture
def empty(empty_database_url: str) -> Store:
    return Store(empty_database_url)


@pytest.fixture
def migrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the migrations, to which a test adds newer ones."""
    copy = tmp_path / "100% migrations"
    shutil.copytree(schema.MIGRATIONS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(schema, "MIGRATIONS", copy)
    return copy / "versions"


def put_next(versions: Path, number: int, more: str = "pass") -> str:
    revision, before = f"{number:04d}", f"{number - 1:04d}"
    source = NEXT.format(revision=revision, before=before, column=f"new_{number}", more=more)
    (versions / f"{revision}_next.py").write_text(source)
    return revision


def columns_of(store: Store, table: str) -> set[str]:
    with store.connection() as connection:
        return {column["name"] for column in inspect(connection).get_columns(table)}


def revisions() -> list[str]:
    """Every revision there is, oldest first."""
    return sorted(path.name.partition("_")[0] for path in (schema.MIGRATIONS / "versions").glob("0*.py"))


def history_of(store: Store) -> list[str]:
    with store.connection() as connection:
        return list(connection.execute(text("SELECT revision FROM schema_history ORDER BY revision")).scalars())


def test_the_migrated_schema_is_that_of_the_tables(empty: Store, tmp_path: Path) -> None:
    empty.migrate(tmp_path / "backups")
    with empty.connection() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, SQLModel.metadata) == []
        # The comparison above does not look at partial indexes.
        [index] = [i for i in inspect(connection).get_indexes("machine") if i["name"] == "uq_machine_live_name"]
        assert index["unique"]
        [where] = [str(value) for key, value in index["dialect_options"].items() if key.endswith("_where")]
        assert "ended_at IS NULL" in where
    empty.close()


def test_migrating_again_does_nothing(empty: Store, tmp_path: Path) -> None:
    backups = tmp_path / "backups"
    empty.migrate(backups)
    with empty.transaction() as session:
        session.add(Project(name="kept"))
    empty.migrate(backups)
    assert not backups.exists()
    with empty.reading() as session:
        assert session.exec(select(Project.name)).all() == ["kept"]
    assert history_of(empty) == revisions()
    empty.close()


def test_a_backup_is_made_before_and_the_last_five_are_kept(
    empty: Store, tmp_path: Path, migrations: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backups = tmp_path / "backups"
    empty.migrate(backups)
    with empty.transaction() as session:
        session.add(Project(name="kept"))
    first = int(schema.head())
    with caplog.at_level(logging.INFO):
        for number in range(first + 1, first + 8):
            put_next(migrations, number)
            empty.migrate(backups)
    assert f"new_{first + 7}" in columns_of(empty, "project")
    made = sorted(backups.iterdir())
    assert len(made) == schema.KEPT_BACKUPS
    assert all(path.stat().st_mode & 0o077 == 0 for path in made)
    assert [path.name.split("-")[-1].split(".")[0] for path in made] == [f"{first + n:04d}" for n in range(2, 7)]
    if empty.is_sqlite:
        restored = sqlite3.connect(made[-1])
        assert restored.execute("SELECT name FROM project").fetchall() == [("kept",)]
        assert restored.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert restored.execute("SELECT version_num FROM alembic_version").fetchone() == (f"{first + 6:04d}",)
        restored.close()
    else:
        listed = subprocess.run(["pg_restore", "--list", made[-1]], capture_output=True, text=True, check=True).stdout
        assert "TABLE DATA public project" in listed
    empty.close()


def test_a_newer_schema_is_refused_with_the_version_it_needs(
    empty: Store, tmp_path: Path, migrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_next(migrations, int(schema.head()) + 1)
    monkeypatch.setattr(schema, "_version", lambda: "7.8.9")
    empty.migrate(tmp_path / "backups")
    newer = schema.head()
    monkeypatch.undo()
    with pytest.raises(ConfigurationError, match=r"Install autovibe 7\.8\.9 or newer") as caught:
        empty.migrate(tmp_path / "backups")
    assert newer in caught.value.message
    assert f"new_{int(newer)}" in columns_of(empty, "project")  # untouched
    empty.close()


def test_a_failed_migration_changes_nothing(empty: Store, tmp_path: Path, migrations: Path) -> None:
    empty.migrate(tmp_path / "backups")
    before = schema.head()
    number = int(before) + 1
    put_next(migrations, number)
    put_next(migrations, number + 1, more='raise RuntimeError("broken")')
    with pytest.raises(RuntimeError, match="broken"):
        empty.migrate(tmp_path / "backups")
    assert not {f"new_{number}", f"new_{number + 1}"} & columns_of(empty, "project")
    with empty.connection() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == [before]
    empty.close()


def test_rows_survive_a_table_being_rebuilt(empty: Store, tmp_path: Path, migrations: Path) -> None:
    """SQLite rebuilds a table to change it, with foreign keys of others upon it."""
    empty.migrate(tmp_path / "backups")
    project = Project(name="kept")
    with empty.transaction() as session:
        session.add(project)
        session.flush()
        session.add(Machine(name="m", type="shell", project_uuid=project.uuid))
    rebuild = "\n    ".join(
        [
            'with op.batch_alter_table("project", recreate="auto") as batch:',
            '    batch.alter_column("description", nullable=True)',
        ]
    )
    put_next(migrations, int(schema.head()) + 1, more=rebuild)
    empty.migrate(tmp_path / "backups")
    with empty.reading() as session:
        assert session.connection().execute(text("SELECT project_uuid FROM machine")).scalars().all() != []
    empty.close()


def test_many_processes_migrate_once(empty: Store, tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from autovibe.store import Store; Store(sys.argv[1]).migrate(pathlib.Path(sys.argv[2]))"
    )
    url = empty.url.render_as_string(hide_password=False)
    argv = [sys.executable, "-c", program, url, str(tmp_path / "backups")]
    running = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) for _ in range(3)]
    assert [(process.communicate(timeout=120)[1], process.returncode) for process in running] == [("", 0)] * 3
    assert history_of(empty) == revisions()
    empty.close()


def test_threads_migrate_once(empty: Store, tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def migrate() -> None:
        try:
            Store(empty.url.render_as_string(hide_password=False)).migrate(tmp_path / "backups")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=migrate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    empty.close()
