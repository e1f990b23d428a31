"""The hub as a process: first start, shutdown while requests wait, what it refuses to start with."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from autovibe import app
from autovibe.domain import Machine, Project
from autovibe.errors import ConfigurationError
from autovibe.settings import Settings
from autovibe.store import Store
from tests.api.conftest import TOKEN, settings_of, until

PROGRAM = """
import sys
from pathlib import Path
from autovibe.app import serve
from autovibe.settings import load
ports = {"hub_port": int(sys.argv[2]), "node_port": int(sys.argv[3])}
serve(load(home=Path(sys.argv[1]), min_free_gb=0.0, node_accel="tcg", **ports))
"""


@contextmanager
def running(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-c", PROGRAM, str(settings.home), str(settings.hub_port), str(settings.node_port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUTOVIBE_")}
    with subprocess.Popen(argv, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: process.poll() is not None or answers(settings), 30)
            yield process
        finally:
            process.kill()


def answers(settings: Settings) -> bool:
    try:
        return httpx2.get(f"{settings.hub_url}/api/v1/health", trust_env=False, timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


def key_of(settings: Settings) -> dict[str, str]:
    return {"Authorization": f"Bearer {settings.credentials.read_text().strip()}"}


def working_machine(settings: Settings) -> str:
    store = Store(settings.hub_database_url)
    with store.transaction() as session:
        project = Project(name="p")
        session.add(project)
        session.flush()
        machine = Machine(name="m", type="shell", status="working", prompt="sleep", project_uuid=project.uuid)
        session.add(machine)
    store.close()
    return str(machine.uuid)


def test_a_first_start_and_a_stop_while_requests_wait(home: Path) -> None:
    settings = settings_of(home, api_key=None)
    with running(settings) as process:
        assert settings.credentials.stat().st_mode & 0o777 == 0o600
        key = settings.credentials.read_text().strip()
        assert key.startswith("av_")
        assert int((settings.hub_home / "hub.pid").read_text()) == process.pid
        assert (settings.hub_home / "ssh" / "id_ed25519").stat().st_mode & 0o777 == 0o600
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        soft, hard = next(line.split()[3:5] for line in limits.splitlines() if line.startswith("Max open files"))
        assert soft == hard
        machine = working_machine(settings)
        answered: list[Any] = []

        def wait(path: str) -> None:
            url = f"{settings.hub_url}/api/v1/machines/{machine}{path}"
            answered.append(httpx2.get(url, headers=key_of(settings), timeout=60, trust_env=False).status_code)

        waiters = [
            threading.Thread(target=wait, args=(p,)) for p in ("?wait_for=finished", "/logs?follow=1", "/logs?wait=50")
        ]
        for waiter in waiters:
            waiter.start()
        time.sleep(1)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert time.monotonic() - start < 8
        for waiter in waiters:
            waiter.join(5)
        assert answered == [200, 200, 200]
    assert not (settings.hub_home / "hub.pid").exists()
    log = (settings.hub_home / "hub.log").read_text()
    assert key not in log
    assert key.split("_", 2)[2] not in log
    assert TOKEN.partition("=")[2] not in log
    assert f"operator GET /api/v1/machines/{machine} 200" in log
    with running(settings) as again:  # the same key and database
        url = f"{settings.hub_url}/api/v1/machines/{machine}"
        assert httpx2.get(url, headers=key_of(settings), trust_env=False).json()["status"] == "working"
        assert settings.credentials.read_text().strip() == key
        again.send_signal(signal.SIGINT)
        assert again.wait(10) == 0


def test_a_second_hub_on_the_same_port_says_so(home: Path) -> None:
    settings = settings_of(home)
    with app._bind(settings) as held:
        held.listen()
        with pytest.raises(ConfigurationError, match=f"{settings.hub_port}"):
            app._bind(settings)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "hub.example"])
def test_a_bind_for_others_needs_tls_or_a_proxy(home: Path, host: str) -> None:
    with pytest.raises(ConfigurationError, match="--behind-proxy"):
        app.serve(settings_of(home, hub_host=host))
    app._require_safe_bind(settings_of(home, hub_host=host, behind_proxy=True))
    app._require_safe_bind(settings_of(home, hub_host=host, tls_certificate=home / "c", tls_key=home / "k"))


def test_a_node_that_has_never_run_is_named_with_the_remedy(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_TOKEN_PATIENCE_SECONDS", 0.1)
    settings = settings_of(home)
    (settings.node_home / "token").unlink()
    with pytest.raises(ConfigurationError, match="autovibe up"):
        app.build(settings)


def test_answers_are_not_held_back_by_the_kernel(home: Path) -> None:
    """asyncio sets TCP_NODELAY only on sockets that say they are TCP; without it every answer takes 40 ms."""
    with app._bind(settings_of(home)) as listener:
        assert listener.proto == socket.IPPROTO_TCP
