"""What reports rest on: shares of the pool, periods, and money as it is asked for."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autovibe.domain.budget import effective_limit
from autovibe.errors import InvalidRequest
from autovibe.hub import amounts, periods
from autovibe.schemas import MoneyOrder
from autovibe.types import Money

NOW = datetime(2026, 3, 1, 0, 0, tzinfo=UTC)
moments = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))


@given(
    projects=st.lists(st.tuples(st.floats(0, 1), st.none() | st.integers(0, 10**12)), min_size=1, max_size=30),
    pool_micros=st.integers(0, 10**12),
)
def test_shares_never_come_to_more_than_the_pool(projects: list[tuple[float, int | None]], pool_micros: int) -> None:
    total = sum(greediness for greediness, _ in projects)
    limits = [effective_limit(own, greediness, total, pool_micros) for greediness, own in projects]
    of_the_pool = [limit or 0 for limit, (greediness, _) in zip(limits, projects, strict=True) if greediness > 0]
    assert sum(of_the_pool) <= pool_micros
    for limit, (_, own) in zip(limits, projects, strict=True):
        assert limit is not None
        assert own is None or limit <= own


@pytest.mark.parametrize(
    ("period", "since", "until", "days"),
    [
        ("today", "2026-03-01T00:00", None, 1),
        ("yesterday", "2026-02-28T00:00", "2026-03-01T00:00", 1),
        ("last_24_hours", "2026-02-28T00:00", None, 2),
        ("last_7_days", "2026-02-23T00:00", None, 7),
        ("last_30_days", "2026-01-31T00:00", None, 30),
        ("last_90_days", "2025-12-02T00:00", None, 90),
        ("this_month", "2026-03-01T00:00", None, 1),
    ],
)
def test_named_periods_at_midnight(period: periods.Period, since: str, until: str | None, days: int) -> None:
    window = periods.named(period, NOW)
    assert window.since == datetime.fromisoformat(since).replace(tzinfo=UTC)
    assert window.until == (NOW + timedelta(microseconds=1) if until is None else datetime.fromisoformat(f"{until}Z"))
    assert len(window.days()) == days
    assert window.is_open == (until is None)


@given(moment=moments)
def test_every_day_of_a_named_period_is_whole_but_the_first_of_24_hours(moment: datetime) -> None:
    for period in ("today", "yesterday", "last_7_days", "last_30_days", "last_90_days", "this_month"):
        window = periods.named(period, moment)  # type: ignore[arg-type]
        assert all(window.holds_all_of(day) for day in window.days()), period
        assert window.days() == sorted(set(window.days()))
    day = periods.named("last_24_hours", moment)
    assert day.holds_all_of(day.days()[-1])
    assert day.holds_all_of(day.days()[0]) == (day.since == periods.midnight(day.days()[0]))


@given(since=moments, seconds=st.integers(1, 300 * 86400))
def test_days_cover_the_window_and_nothing_more(since: datetime, seconds: int) -> None:
    window = periods.Window(since, since + timedelta(seconds=seconds))
    days = window.days()
    assert periods.midnight(days[0]) <= window.since < periods.midnight(days[0]) + timedelta(days=1)
    assert periods.midnight(days[-1]) < window.until <= periods.midnight(days[-1]) + timedelta(days=1)
    assert len(days) == (days[-1] - days[0]).days + 1
    whole = [day for day in days if window.holds_all_of(day)]
    assert len(whole) >= len(days) - 2
    if whole:  # they are asked for as one stretch
        assert len(whole) == (whole[-1] - whole[0]).days + 1


def test_an_unknown_period_lists_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match=r"last_90_days, this_month") as caught:
        periods.named("fortnight")  # type: ignore[arg-type]
    assert caught.value.details["periods"][0] == "today"


def test_dates_are_whole_days_and_the_longest_period_is_a_leap_year() -> None:
    window = periods.window(None, "2024-01-01", "2024-12-31", default="today")
    assert (window.days()[0], window.days()[-1], len(window.days())) == (date(2024, 1, 1), date(2024, 12, 31), 366)
    with pytest.raises(InvalidRequest, match="366"):
        periods.window(None, "2024-01-01", "2025-01-01", default="today")


@given(total=st.integers(0, 10**15), count=st.integers(1, 10**6))
def test_the_money_of_one_is_rounded_to_the_nearest_micro(total: int, count: int) -> None:
    one = amounts.each(total, count, "USD")
    assert one is not None
    assert abs(one.micros * count - total) * 2 <= count


def test_money_is_in_the_hubs_currency_or_refused() -> None:
    assert MoneyOrder.model_validate("1.26").to_money("CAD") == Money(1_260_000, "CAD")
    assert MoneyOrder(amount=2, currency="CAD").to_money("CAD") == Money(2_000_000, "CAD")
    assert MoneyOrder(micros=7).to_money("CAD") == Money(7, "CAD")
    with pytest.raises(InvalidRequest, match="CAD"):
        MoneyOrder(amount=2, currency="USD").to_money("CAD")
