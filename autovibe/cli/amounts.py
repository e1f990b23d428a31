"""Amounts as a person reads them: units beside numbers, thousands apart, "no limit" where there is none."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from autovibe import schemas

NO_LIMIT = "no limit"


def money(amount: schemas.MoneyAmount | None, *, missing: str = NO_LIMIT) -> str:
    """'1.2600 USD': a minute of a small VM costs parts of a cent. What would be 0 so is shown whole: '0.000012 USD'."""
    return missing if amount is None else f"{_decimal(amount.micros)} {amount.currency}"


def _decimal(micros: int) -> str:
    decimals = 6 if 0 < micros < 50 else 4
    return f"{micros / 1e6:,.{decimals}f}"


def hours(value: float | None, *, missing: str = NO_LIMIT) -> str:
    if value is None:
        return missing
    decimals = 4 if 0 < value < 0.005 else 2
    return f"{value:,.{decimals}f} h"


def calls(value: int | None, *, missing: str = NO_LIMIT) -> str:
    return missing if value is None else f"{value:,}"


def of(shown: Callable[[Any], str], standing: Any) -> str:
    """'0.42 of 1.26 USD', or what is used alone where nothing limits it."""
    used = shown(standing.used)
    if standing.allocated is None:
        return used
    number, _, unit = used.rpartition(" ")
    limit = shown(standing.allocated)
    return f"{number} of {limit}" if number and limit.endswith(unit) else f"{used} of {limit}"


def part(standing: Any) -> str | None:
    """The percentage used of what is allocated."""
    used, allocated = (getattr(each, "micros", each) for each in (standing.used, standing.allocated))
    return percent(100 * used / allocated) if allocated else None


def percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f} %"


def share(value: float | None) -> str | None:
    """Of a rate from 0 to 1."""
    return None if value is None else percent(100 * value)


def exact(amount: schemas.MoneyAmount) -> str:
    """To the millionth."""
    return f"{amount.amount} {amount.currency}"


def span(period: str | None, since: datetime, until: datetime) -> str:
    """'last 7 days (2026-11-15 00:00 to 2026-11-21 17:47 UTC)'."""
    days = f"{since:%Y-%m-%d %H:%M} to {until:%Y-%m-%d %H:%M} UTC"
    return days if period is None else f"{period.replace('_', ' ')} ({days})"


def spent(total: schemas.Spent) -> str:
    """One sentence's worth of all four, the money to the millionth."""
    return (
        f"{exact(total.money)}, {hours(total.time_hours)} of machine time, {calls(total.api_calls)} API calls, "
        f"{hours(total.cpu_hours)} of CPU"
    )


RESOURCES = {"money": "money", "time_hours": "machine time", "api_calls": "API calls", "cpu_hours": "CPU time"}
"""What the tables call them."""

# Limits, as words take them


def limit(text: str | None, option: str, *, is_whole: bool = False) -> Any:
    """A number of at least 0, or None for 'none'."""
    if text is None or text.strip().lower() == "none":
        return None
    try:
        value = int(text) if is_whole else float(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1e15:
        kind = "whole number" if is_whole else "number"
        raise typer.BadParameter(f"{option} takes a {kind} of at least 0, or none to remove the limit, not '{text}'.")
    return value


def limits(
    daily_money: str | None,
    daily_hours: str | None,
    daily_api_calls: str | None,
    storage_gb: str | None,
    max_machines: str | None,
) -> dict[str, Any]:
    """The limits that were named, as the Hub names them."""
    given = {
        "daily_money": (daily_money, "--daily-money", False),
        "daily_time_hours": (daily_hours, "--daily-hours", False),
        "daily_api_calls": (daily_api_calls, "--daily-api-calls", True),
        "storage_gb": (storage_gb, "--storage-gb", False),
        "max_concurrent_machines": (max_machines, "--max-machines", True),
    }
    return {
        name: limit(text, option, is_whole=is_whole)
        for name, (text, option, is_whole) in given.items()
        if text is not None
    }
