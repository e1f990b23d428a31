"""A node for each test that asks for one: the real server, tasks and disks around flags that stand for QEMU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from autovibe.node.access import auth
from tests.contract.node_parts import Client, FlagQemu, make_node


@pytest.fixture(autouse=True)
def _quick_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "FAILED_LOGIN_DELAY_SECONDS", 0.05)


@pytest.fixture
def qemu() -> FlagQemu:
    return FlagQemu()


@pytest.fixture
def client(tmp_path: Path, qemu: FlagQemu) -> Iterator[Client]:
    node = make_node(tmp_path / "node", qemu)
    yield Client(node)
    assert node.stop()
