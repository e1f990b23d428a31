"""Which time a report is about: a named period, or `from` and `to`. Days are UTC days; the end is exclusive."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Literal, get_args

from autovibe.domain.columns import now
from autovibe.errors import InvalidRequest

Period = Literal["today", "yesterday", "last_24_hours", "last_7_days", "last_30_days", "last_90_days", "this_month"]

LONGEST_DAYS = 366

_DAY = timedelta(days=1)
_AFTER = timedelta(microseconds=1)  # what is recorded at this very moment is within, and so is today at midnight
_MOMENT = re.compile(r"^\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+\- ]\d\d:\d\d)$")
_DATE = re.compile(r"^\d{4}-\d\d-\d\d$")


@dataclass(frozen=True)
class Window:
    """From `since` to before `until`; `name` is the period's, None where both were given. `is_open`: it ends now."""

    since: datetime
    until: datetime
    name: Period | None = None
    is_open: bool = False

    def days(self) -> list[date]:
        """Every day the window touches."""
        first, last = self.since.date(), (self.until - timedelta(microseconds=1)).date()
        return [first + _DAY * number for number in range((last - first).days + 1)]

    def holds_all_of(self, day: date) -> bool:
        """Whether the day lies within, as far as it has passed."""
        begin = midnight(day)
        return self.since <= begin and (self.is_open or begin + _DAY <= self.until)


def midnight(day: date) -> datetime:
    """The day's first moment."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def window(
    period: Period | None = None, since: str | None = None, until: str | None = None, *, default: Period
) -> Window:
    """The window of a request. Raises InvalidRequest naming what is wrong with it.

    `since` and `until` are RFC 3339 dates or moments; a date as `until` means its end, and without `until` the window
    ends now.
    """
    if since is None and until is None:
        return named(period or default)
    if period is not None:
        raise InvalidRequest("Give either 'period', or 'from' and 'to'.", details={"field": "period"})
    if since is None:
        raise InvalidRequest("'to' needs a 'from' beside it.", details={"field": "from"})
    begin = _moment("from", since, is_end=False)
    end = now() + _AFTER if until is None else _moment("to", until, is_end=True)
    if begin >= end:
        raise InvalidRequest(f"'from' ({since}) must be before 'to' ({until or 'now'}).", details={"field": "from"})
    if end - begin > LONGEST_DAYS * _DAY:
        raise InvalidRequest(f"A period has at most {LONGEST_DAYS} days; ask for less.", details={"field": "from"})
    return Window(begin, end, is_open=end > now())


def named(period: Period, moment: datetime | None = None) -> Window:
    """last_7_days: today and the six days before it, and so on; every period but `yesterday` ends now.

    Raises InvalidRequest listing the periods there are.
    """
    end = (moment or now()).astimezone(UTC)
    today = midnight(end.date())
    begins: dict[str, Callable[[], datetime]] = {
        "today": lambda: today,
        "yesterday": lambda: today - _DAY,
        "last_24_hours": lambda: end - _DAY,
        "last_7_days": lambda: today - 6 * _DAY,
        "last_30_days": lambda: today - 29 * _DAY,
        "last_90_days": lambda: today - 89 * _DAY,
        "this_month": lambda: today.replace(day=1),
    }
    if period not in begins:
        known = ", ".join(get_args(Period))
        raise InvalidRequest(
            f"There is no period '{str(period)[:40]}'; the periods are: {known}.",
            details={"field": "period", "periods": list(get_args(Period))},
        )
    if period == "yesterday":
        return Window(begins[period](), today, period)
    return Window(begins[period](), end + _AFTER, period, is_open=True)


def _moment(field: str, text: str, *, is_end: bool) -> datetime:
    try:
        return _read(text, is_end=is_end)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(
            f"'{field}' is a date (2026-11-21) or a moment with its offset (2026-11-21T13:00:00Z), not '{text[:40]}'.",
            details={"field": field},
        ) from error


def _read(text: str, *, is_end: bool) -> datetime:
    if _DATE.match(text):
        day = midnight(date.fromisoformat(text))
        return day + _DAY if is_end else day
    if not _MOMENT.match(text):
        raise ValueError(text)
    # A '+' that was not escaped in a URL arrives as a space.
    spelled = f"{text[:19].replace(' ', 'T')}{text[19:].replace(' ', '+')}".upper()
    return datetime.fromisoformat(spelled).astimezone(UTC)
