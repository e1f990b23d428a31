"""A node for each module of client tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.parts import Lab, open_lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with open_lab(tmp_path_factory.mktemp("lab") / "node") as found:
        yield found
