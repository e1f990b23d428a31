"""What a machine is expected to use, by a published formula (FORMULA): the same prompt is always estimated alike."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from autovibe.domain.machine import Machine
from autovibe.types import MICROS

FORMULA = """
What a machine is expected to use follows from its prompt, so that the same prompt is always estimated alike:

    complexity c   0.4 min(1, words / 300) + 0.4 min(1, verbs / 6) + 0.2 min(1, files / 10), from 0 to 1, three decimals
                   files: those it places (file_modifications) and the different paths and file names in the prompt;
                   words of the rest of the prompt; the different verbs of VERBS among them
    time_minutes   5 + 30 c
    api_calls      round(1 + 10 c)
    cpu_hours      0.1 + 0.5 c
    money          base (0.5 + c) + the price of the VM for time_minutes
    base           "history": what the n machines of this type that ended in the last 30 days, the last 500 of them at
                   most, used of money beside their VMs, on average;
                   "default", while there are none (n = 0): the machine type's own figure
    low, high      value / s and value s, with s = 1 + 1 / sqrt(max(n, 1)): half and double at first, closer with n

Every figure is at most what the machine's constraints allow. The verbs of VERBS are:
"""
"""Part of the API's description; the verbs follow."""

HISTORY_DAYS = 30
HISTORY_MACHINES = 500

_VERBS = """
add analyse analyze benchmark build change check clean compare compile configure convert create debug delete deploy
design develop document download extract fix generate implement import improve install integrate investigate merge
migrate move optimise optimize parse port refactor release remove rename replace research review rewrite run scrape
search set setup solve split start summarise summarize test train translate update upgrade validate verify write
"""

VERBS = frozenset(_VERBS.split())
"""The verbs that count as work to be done, in their plain form."""

_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_TOKEN = re.compile(r"""[^\s"'`,;:()\[\]{}<>]+""")
_LONGEST = 100_000  # characters of a prompt that are looked at


class Base(NamedTuple):
    """Money beside the VM, in micro-units, and of how many machines that is the average; 0: of none."""

    money_micros: int
    n: int = 0


@dataclass(frozen=True)
class Figure:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """Money in whole micro-units, as numbers like the others."""

    money_micros: Figure
    time_minutes: Figure
    api_calls: Figure
    cpu_hours: Figure
    basis: Literal["history", "default"]
    n: int
    complexity: float

    def to_dict(self) -> dict[str, Any]:
        """As it is kept in the machine's row."""
        return {name: dict(vars(one)) if isinstance(one, Figure) else one for name, one in vars(self).items()}


def complexity(prompt: str | None, placed_files: int = 0) -> float:
    """From 0 (nothing to do) to 1, see the module."""
    text = (prompt or "")[:_LONGEST]
    tokens = [token.strip(".!?") for token in _TOKEN.findall(text)]
    files = {token for token in tokens if _is_file(token)}
    words = [word.lower() for token in tokens if token not in files for word in _WORD.findall(token)]
    verbs = VERBS.intersection(words)
    named = placed_files + len(files)
    score = 0.4 * min(1, len(words) / 300) + 0.4 * min(1, len(verbs) / 6) + 0.2 * min(1, named / 10)
    return round(score, 3)


def _is_file(token: str) -> bool:
    """A path, or a name of two characters or more with an ending of five at most."""
    name, _, ending = token.rpartition(".")
    has_ending = len(name) > 1 and 1 <= len(ending) <= 5 and ending.isalnum() and ending[0].isalpha()
    return ("/" in token and any(char.isalnum() for char in token)) or has_ending


def estimate(machine: Machine, base: Base, price_micros: int) -> Estimate:
    """What the machine is expected to use; `price_micros` is that of an hour of its VM."""
    c = complexity(machine.prompt, len(machine.file_modifications))
    minutes = 5 + 30 * c
    money = base.money_micros * (0.5 + c) + price_micros * minutes / 60
    spread = 1 + 1 / math.sqrt(max(base.n, 1))
    return Estimate(
        money_micros=_figure(money, spread, machine.max_money_micros, 0),
        time_minutes=_figure(minutes, spread, machine.max_time_minutes, 2),
        api_calls=_figure(round(1 + 10 * c), spread, machine.max_api_calls, 0),
        cpu_hours=_figure(0.1 + 0.5 * c, spread, None, 4),
        basis="history" if base.n else "default",
        n=base.n,
        complexity=c,
    )


def default_base(base_money: float) -> Base:
    return Base(round(base_money * MICROS))


def _figure(value: float, spread: float, most: float | None, digits: int) -> Figure:
    def clipped(number: float) -> float:
        return round(number if most is None else min(number, most), digits)

    return Figure(clipped(value), clipped(value / spread), clipped(value * spread))
