"""Amounts as replies show them: millionths turned into money, hours and calls. Money stays exact."""

from __future__ import annotations

from collections.abc import Mapping

from autovibe import schemas
from autovibe.store.standings import Standing
from autovibe.types import MICROS, Money, Resource


def money(micros: int, currency: str) -> schemas.MoneyAmount:
    return schemas.MoneyAmount.of(Money(micros, currency))


def maybe_money(micros: int | None, currency: str) -> schemas.MoneyAmount | None:
    return None if micros is None else money(micros, currency)


def each(total: int, count: int, currency: str) -> schemas.MoneyAmount | None:
    """The money of one of `count`, rounded to the micro-unit; None where there is none."""
    return money((2 * total + count) // (2 * count), currency) if count else None


def hours(micros: int) -> float:
    return micros / MICROS


def calls(micros: int) -> int:
    """Whole calls: a share of the pool may end within one."""
    return micros // MICROS


def percent(part: int, whole: int | None) -> float | None:
    """None without a whole, or with one of 0, of which nothing is a part."""
    return round(100 * part / whole, 2) if whole else None


def spent(amounts: Mapping[Resource, int], currency: str) -> schemas.Spent:
    return schemas.Spent(
        money=money(amounts.get(Resource.money, 0), currency),
        time_hours=hours(amounts.get(Resource.time_hours, 0)),
        api_calls=calls(amounts.get(Resource.api_calls, 0)),
        cpu_hours=hours(amounts.get(Resource.cpu_hours, 0)),
    )


def day(standing: Mapping[Resource, Standing], currency: str) -> schemas.DayStanding:
    of_money, of_calls = standing[Resource.money], standing[Resource.api_calls]
    return schemas.DayStanding(
        money=schemas.MoneyStanding(
            allocated=maybe_money(of_money.allocated, currency),
            used=money(of_money.used, currency),
            reserved=money(of_money.reserved, currency),
            remaining=maybe_money(of_money.remaining, currency),
        ),
        time_hours=_hours_standing(standing[Resource.time_hours]),
        api_calls=schemas.CallsStanding(
            allocated=_maybe_calls(of_calls.allocated),
            used=calls(of_calls.used),
            reserved=calls(of_calls.reserved),
            remaining=_maybe_calls(of_calls.remaining),
        ),
        cpu_hours=_hours_standing(standing[Resource.cpu_hours]),
    )


def limits(standing: Mapping[Resource, Standing], currency: str) -> schemas.ResourceLimits:
    of_money, of_hours, of_calls = (
        standing[resource] for resource in (Resource.money, Resource.time_hours, Resource.api_calls)
    )
    return schemas.ResourceLimits(
        money=schemas.MoneyLimits(
            explicit=maybe_money(of_money.explicit, currency),
            share=maybe_money(of_money.share, currency),
            effective=maybe_money(of_money.effective, currency),
        ),
        time_hours=schemas.HoursLimits(
            explicit=_maybe_hours(of_hours.explicit),
            share=_maybe_hours(of_hours.share),
            effective=_maybe_hours(of_hours.effective),
        ),
        api_calls=schemas.CallsLimits(
            explicit=_maybe_calls(of_calls.explicit),
            share=_maybe_calls(of_calls.share),
            effective=_maybe_calls(of_calls.effective),
        ),
    )


def _hours_standing(standing: Standing) -> schemas.HoursStanding:
    return schemas.HoursStanding(
        allocated=_maybe_hours(standing.allocated),
        used=hours(standing.used),
        reserved=hours(standing.reserved),
        remaining=_maybe_hours(standing.remaining),
    )


def _maybe_hours(micros: int | None) -> float | None:
    return None if micros is None else hours(micros)


def _maybe_calls(micros: int | None) -> int | None:
    return None if micros is None else calls(micros)
