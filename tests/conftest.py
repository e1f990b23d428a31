"""Databases for the tests: every test of `store` or `database_url` runs on SQLite and on a real PostgreSQL.

The PostgreSQL server is private to the test session (to each worker of pytest-xdist): made in a temporary directory,
bound to loopback and a password, ended with the session, and by the kernel when the session is killed.
`AUTOVIBE_TEST_POSTGRES=url` (a role that may create databases) uses an existing server instead. Databases are copies of
one migrated template.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url

from autovibe.store import Store
from tests.stub import node as stub
from tests.stub.node import StubNode

BACKENDS = ("sqlite", "postgres")
INSTALL = "PostgreSQL is not installed, and the tests need it: apt-get install --no-install-recommends postgresql"


def pytest_configure() -> None:
    # A shell starts what it runs in the background with SIGINT ignored, and children inherit that: tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that boot guests begin first, for they take longest."""
    items.sort(key=lambda item: Path(item.path).parent.name != "e2e")


class Postgres:
    """A server; `url` is its maintenance database."""

    def __init__(self, url: str) -> None:
        self.url = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._template: str | None = None
        self._made: list[str] = []
        with psycopg.connect(self.url) as connection:
            self._version = connection.info.server_version

    def create(self, *, is_migrated: bool, backups: Path) -> str:
        """The URL of a fresh database."""
        if is_migrated and self._template is None:
            self._template = f"av_template_{secrets.token_hex(4)}"
            self._execute("CREATE DATABASE {}", self._template)
            self._made.append(self._template)
            store = Store(self._url_of(self._template))
            store.migrate(backups)
            store.close()
        name = f"av_test_{secrets.token_hex(6)}"
        # Copying files takes half the time of writing the copy to the log; older servers know only this way.
        strategy = " STRATEGY file_copy" if self._version >= 150000 else ""
        self._execute("CREATE DATABASE {} TEMPLATE {}" + strategy, name, self._template if is_migrated else "template0")
        self._made.append(name)
        return self._url_of(name)

    def drop(self, url: str) -> None:
        """Drop a database with those a test made beside it (`<name>…`), whoever is still connected."""
        name = str(make_url(url).database)
        with psycopg.connect(self.url, autocommit=True) as connection:
            query = "SELECT datname FROM pg_database WHERE starts_with(datname, %s)"
            for (found,) in connection.execute(query, [name]).fetchall():
                connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(found)))
        self._made.remove(name)

    def close(self) -> None:
        for name in list(self._made):
            with contextlib.suppress(psycopg.Error):
                self.drop(self._url_of(name))

    def _url_of(self, name: str) -> str:
        return make_url(self.url).set(database=name).render_as_string(hide_password=False)

    def _execute(self, statement: str, *names: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


@contextlib.contextmanager
def private_postgres() -> Iterator[Postgres]:
    """A server of our own. As root it runs as another user, since PostgreSQL refuses to run as root."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    found = programs[-1] if programs else shutil.which("postgres")
    if found is None or shutil.which("setpriv") is None:
        pytest.fail(INSTALL, pytrace=False)
    _sweep()
    home = Path(tempfile.mkdtemp(prefix="avpg-", dir="/tmp"))  # short: a socket lies in it
    # The kernel stops the server when this process dies, however it dies.
    drop = ["setpriv", "--pdeathsig", "INT"]
    if os.geteuid() == 0:
        user = _unprivileged_user()
        drop += [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    servers: list[subprocess.Popen[bytes]] = []
    atexit.register(_stop, servers, home)  # Ctrl-C while pytest sets up a test leaves out the finally below
    try:
        password, port = secrets.token_hex(16), _free_port()
        (home / "password").write_text(password)
        if os.geteuid() == 0:
            for path in (home, home / "password"):
                os.chown(path, user.pw_uid, user.pw_gid)
        data = home / "data"
        make = [*drop, str(Path(found).with_name("initdb")), "-D", str(data), "-U", "autovibe", "-E", "UTF8"]
        make += ["--locale=C", "-A", "password", f"--pwfile={home / 'password'}", "--no-sync", "--no-instructions"]
        made = subprocess.run(make, capture_output=True, text=True, check=False, cwd="/")
        assert made.returncode == 0, f"initdb failed: {made.stderr}"
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": home, "fsync": "off"}
        settings |= {"synchronous_commit": "off", "full_page_writes": "off", "shared_buffers": "32MB"}
        settings |= {"max_connections": 200, "autovacuum": "off", "max_wal_size": "1GB"}
        argv = [*drop, str(found), "-D", str(data), *(f"--{name}={value}" for name, value in settings.items())]
        with (home / "log").open("wb") as log:
            # A session of its own: Ctrl-C must not end it before the tests have cleaned up.
            servers.append(subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True, cwd="/"))
        url = f"postgresql://autovibe:{password}@127.0.0.1:{port}/postgres"
        _await_answer(url, servers[0], home / "log")
        yield Postgres(url)
    finally:
        _stop(servers, home)
        atexit.unregister(_stop)


def _stop(servers: list[subprocess.Popen[bytes]], home: Path) -> None:
    for server in servers:
        if server.poll() is None:
            server.send_signal(signal.SIGQUIT)  # immediate: nothing in it is worth keeping
            server.wait(30)
    for _ in range(50):  # its children may write a moment longer
        shutil.rmtree(home, ignore_errors=True)
        if not home.exists():
            return
        time.sleep(0.1)


def _sweep() -> None:
    """Remove what killed sessions have left: an hour old, and without a server."""
    for home in Path("/tmp").glob("avpg-*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if home.stat().st_mtime > time.time() - 3600:
                continue
            lock = home / "data" / "postmaster.pid"
            if not lock.exists() or not Path("/proc", lock.read_text().split()[0]).exists():
                shutil.rmtree(home, ignore_errors=True)


def _unprivileged_user() -> pwd.struct_passwd:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres")
    return pwd.getpwnam("nobody")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_answer(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(url, connect_timeout=5).close()
        except psycopg.OperationalError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"PostgreSQL does not answer ({error}); its log says: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        else:
            return


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """The server of the session."""
    if url := os.environ.get("AUTOVIBE_TEST_POSTGRES"):
        server = Postgres(url)
        yield server
        server.close()
        return
    with private_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sqlite-template")
    store = Store(f"sqlite:///{directory / 'autovibe.db'}")
    store.migrate(directory / "backups")
    store.close()
    return directory / "autovibe.db"


@pytest.fixture(params=BACKENDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a fresh, migrated database; the test runs once for each kind."""
    if request.param == "sqlite":
        target = tmp_path / "autovibe.db"
        shutil.copy(request.getfixturevalue("_sqlite_template"), target)
        yield f"sqlite:///{target}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    url = server.create(is_migrated=True, backups=tmp_path / "backups")
    yield url
    server.drop(url)


@pytest.fixture(params=BACKENDS)
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without any table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    url = server.create(is_migrated=False, backups=tmp_path / "backups")
    yield url
    server.drop(url)


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """An open store on a fresh, migrated database."""
    opened = Store(database_url)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def stub_node() -> Iterator[StubNode]:
    """One stub node for the whole session: its API, tasks and configuration are real, its guests local sshds."""
    found = stub.start()
    yield found
    found.stop()
