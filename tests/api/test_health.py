"""Health without a key: real checks, no names; a node that is down degrades, and nothing waits for it."""

from __future__ import annotations

import time

import httpx2
import pytest

from autovibe import schemas
from autovibe.errors import DatabaseUnavailable
from tests.api.conftest import Served


def test_a_node_that_is_down_degrades(served: Served) -> None:
    start = time.monotonic()
    answer = httpx2.get(f"{served.url}/api/v1/health", trust_env=False)
    assert time.monotonic() - start < 5
    health = schemas.Health.model_validate(answer.json())
    assert health.status == "degraded"
    assert set(health.services) == {"hub", "database", "proxmox", "api"}
    assert {name: service.status for name, service in health.services.items()} == {
        "hub": "healthy",
        "database": "healthy",
        "proxmox": "unhealthy",
        "api": "healthy",
    }
    assert health.services["database"].latency_ms is not None
    for secret in (served.parts.settings.proxmox_node, str(served.parts.settings.home), "127.0.0.1"):
        assert f"'{secret}'" not in answer.text


def test_machines_are_counted(served: Served) -> None:
    before = served.get("/health").json()["active_machine_count"]
    served.machine()
    served.machine(status="terminated")
    assert served.get("/health").json()["active_machine_count"] == before + 1


def test_a_database_that_is_away_is_unhealthy(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> float:
        raise DatabaseUnavailable("The database 'secret' does not answer.")

    monkeypatch.setattr(served.hub.store, "check", away)
    answer = served.get("/health")
    assert answer.json()["status"] == "unhealthy"
    assert answer.json()["services"]["database"]["status"] == "unhealthy"
    assert "secret" not in answer.text
