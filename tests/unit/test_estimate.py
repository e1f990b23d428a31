"""The published formula of estimates: the same prompt is always estimated alike, and never above its constraints."""

from __future__ import annotations

from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autovibe.domain import Machine
from autovibe.domain.estimate import Base, complexity, default_base, estimate


def machine(prompt: str | None = None, **fields: object) -> Machine:
    return Machine(**{"name": "m", "type": "shell", "project_uuid": uuid4(), "prompt": prompt, **fields})


@pytest.mark.parametrize(
    ("prompt", "files", "score"),
    [
        (None, 0, 0.0),
        ("", 0, 0.0),
        ("echo hello", 0, 0.003),
        ("Fix the bug", 0, round(0.4 * 3 / 300 + 0.4 / 6, 3)),
        ("fix FIX fix", 0, round(0.4 * 3 / 300 + 0.4 / 6, 3)),
        ("Write and test src/parse.py and README.md", 1, round(0.4 * 4 / 300 + 0.4 * 2 / 6 + 0.2 * 3 / 10, 3)),
        (" ".join(["word"] * 300), 0, 0.4),
        ("add build check clean compile fix " + "word " * 400, 10, 1.0),
    ],
)
def test_the_score_of_a_prompt(prompt: str | None, files: int, score: float) -> None:
    assert complexity(prompt, files) == score


@given(st.text(max_size=2000), st.integers(0, 50))
def test_the_score_lies_between_0_and_1_and_is_the_same_again(prompt: str, files: int) -> None:
    found = complexity(prompt, files)
    assert 0 <= found <= 1
    assert complexity(prompt, files) == found


@pytest.mark.parametrize("piece", ["a", "a-", "a.", "/", "a/", "\u00e9'", " .", "a.b-"])
def test_a_long_prompt_is_scored_as_quickly_as_it_is_read(piece: str) -> None:
    assert 0 <= complexity(piece * 500_000) <= 1  # quadratic, it would take minutes


def test_the_formula() -> None:
    found = estimate(machine(" ".join(["word"] * 300)), default_base(2.0), 160_000)  # complexity 0.4
    assert (found.basis, found.n, found.complexity) == ("default", 0, 0.4)
    assert found.time_minutes.value == 17
    assert found.api_calls.value == 5
    assert found.cpu_hours.value == pytest.approx(0.3)
    assert found.money_micros.value == round(2_000_000 * 0.9 + 160_000 * 17 / 60)
    assert (found.time_minutes.low, found.time_minutes.high) == (8.5, 34)


def test_more_history_is_closer() -> None:
    of_four = estimate(machine(), Base(1_000_000, 4), 0)
    assert (of_four.basis, of_four.n) == ("history", 4)
    assert (of_four.money_micros.value, of_four.money_micros.high) == (500_000, 750_000)
    assert estimate(machine(), Base(1_000_000, 400), 0).money_micros.high == 525_000


def test_constraints_clip_every_figure() -> None:
    tight = machine("fix it", max_money_micros=10, max_time_minutes=6.0, max_api_calls=0)
    found = estimate(tight, Base(10**9, 1), 10**6)
    assert (found.money_micros.low, found.money_micros.value, found.money_micros.high) == (10, 10, 10)
    assert (found.time_minutes.low, found.time_minutes.value, found.time_minutes.high) == (3.54, 6, 6)
    assert found.api_calls.high == 0
