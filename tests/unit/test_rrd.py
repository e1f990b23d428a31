"""Figures over time: averages, maxima, gaps, rings that go round, files that were damaged."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from autovibe.node.host.rrd import TIMEFRAMES, Recorder, Series

DAY = 1_795_132_800  # midnight


@pytest.fixture
def series(tmp_path: Path) -> Series:
    return Series(tmp_path / "vm-100", ("cpu", "mem", "netin"))


def fill(series: Series, start: int, minutes: int, *, first: int = 0) -> None:
    """Record every ten seconds: `mem` is the number of the minute."""
    for second in range(0, minutes * 60 + 10, 10):
        series.record(start + second, {"mem": first + max(0, second - 1) // 60})


def test_a_minute_is_the_average_over_its_time(series: Series) -> None:
    series.record(DAY, {"mem": 999})
    series.record(DAY + 30, {"mem": 100})
    series.record(DAY + 75, {"mem": 400})  # 30 s of 100 and 30 s of 400 in the first minute
    (row,) = [row for row in series.read("hour", "AVERAGE", DAY + 75) if len(row) > 1]
    assert row == {"time": DAY + 60, "mem": 250}


def test_counters_are_kept_as_rates_and_a_counter_that_falls_is_not_known(series: Series) -> None:
    for second, count in ((0, 1000), (20, 3000), (40, 5000), (60, 100), (80, 200), (120, 400)):
        series.record(DAY + second, {}, {"netin": count})
    first, second_row = (row for row in series.read("hour", "AVERAGE", DAY + 120) if len(row) > 1)
    assert first == {"time": DAY + 60, "netin": 100}
    assert second_row == {"time": DAY + 120, "netin": 5}


def test_what_was_not_recorded_is_a_gap(series: Series) -> None:
    fill(series, DAY, 3)
    fill(series, DAY + 1200, 2, first=50)  # nobody knows about the 17 minutes between
    rows = series.read("hour", "AVERAGE", DAY + 1330)
    assert len(rows) == 60
    assert [row["time"] for row in rows] == list(range(DAY + 1320 - 59 * 60, DAY + 1320 + 60, 60))
    known = {row["time"]: row["mem"] for row in rows if "mem" in row}
    assert sorted(known) == [DAY + 60, DAY + 120, DAY + 180, DAY + 1260, DAY + 1320]
    assert all(set(row) <= {"time", "mem"} for row in rows)


def test_rows_above_hold_averages_and_maxima_and_survive_a_new_process(series: Series, tmp_path: Path) -> None:
    fill(series, DAY, 20)
    again = Series(tmp_path / "vm-100", ("cpu", "mem", "netin"))  # what a killed node finds again
    fill(again, DAY + 20 * 60, 10, first=20)
    for cf, wanted in (("AVERAGE", sum(range(30)) / 30), ("MAX", 29)):
        rows = again.read("week", cf, DAY + 1800)  # type: ignore[arg-type]
        assert len(rows) == TIMEFRAMES["week"][1]
        assert rows[-1] == {"time": DAY + 1800, "mem": wanted}
        assert rows[-2] == {"time": DAY}
    assert again.read("month", "MAX", DAY + 1800)[-1]["mem"] == 29
    assert again.read("hour", "MAX", DAY + 1800)[-1]["mem"] == 29


def test_a_row_above_is_known_when_half_of_those_below_are(series: Series) -> None:
    fill(series, DAY, 14)
    fill(series, DAY + 1800, 15)
    last = DAY + 3600
    series.record(last + 400, {"mem": 1})
    assert series.read("week", "AVERAGE", last)[-2:] == [{"time": DAY + 1800}, {"time": last, "mem": 7}]


def test_six_hours_and_a_week_are_made_of_the_rows_below(tmp_path: Path) -> None:
    series = Series(tmp_path / "node", ("mem",))
    for minute in range(8 * 1440 + 1):  # one record a minute is as good
        series.record(DAY + minute * 60, {"mem": minute // 360})
    now = DAY + 8 * 86400
    year = series.read("year", "AVERAGE", now)
    assert len(year) == 1440
    assert [row["mem"] for row in year if "mem" in row] == pytest.approx(list(range(32)), abs=0.01)
    assert [row["mem"] for row in series.read("year", "MAX", now) if "mem" in row][:3] == [1, 2, 3]
    weeks = [row for row in series.read("decade", "AVERAGE", now) if "mem" in row]
    assert [row["time"] % (7 * 86400) for row in weeks] == [0] * len(weeks)
    assert len(weeks) == 1
    day = series.read("day", "AVERAGE", now)
    assert len(day) == 1440
    assert all("mem" in row for row in day)
    assert os.path.getsize(tmp_path / "node") <= 20 * 1440 + 28 * (1440 + 1440 + 570)  # a round of each ring


def test_a_damaged_file_has_gaps_and_goes_on(series: Series, tmp_path: Path) -> None:
    fill(series, DAY, 5)
    path = tmp_path / "vm-100"
    data = bytearray(path.read_bytes())
    row = 12 + 3 * 8
    place = (DAY + 120) // 60 % 1440 * row
    data[place + 14] ^= 0xFF
    path.write_bytes(data)
    known = {row["time"] for row in series.read("hour", "AVERAGE", DAY + 300) if "mem" in row}
    assert known == {DAY + 60, DAY + 180, DAY + 240, DAY + 300}
    path.write_bytes(data[: place - 5])  # cut short
    assert len(series.read("hour", "AVERAGE", DAY + 300)) == 60
    fill(series, DAY + 600, 1, first=7)
    assert series.read("hour", "AVERAGE", DAY + 660)[-1] == {"time": DAY + 660, "mem": 7}
    path.write_bytes(b"")
    assert all(len(row) == 1 for row in series.read("day", "AVERAGE", DAY + 660))


def test_rows_of_other_fields_are_gaps(series: Series, tmp_path: Path) -> None:
    fill(series, DAY, 5)
    other = Series(tmp_path / "vm-100", ("cpu", "memory", "netin"))
    assert all(len(row) == 1 for row in other.read("hour", "AVERAGE", DAY + 300))


def test_a_clock_that_is_set_back_loses_time_and_nothing_else(series: Series) -> None:
    fill(series, DAY + 600, 2)
    fill(series, DAY, 2, first=40)
    rows = {row["time"]: row.get("mem") for row in series.read("hour", "AVERAGE", DAY + 720)}
    assert (rows[DAY + 60], rows[DAY + 120], rows[DAY + 660], rows[DAY + 720]) == (40, 41, 0, 1)


def test_no_figure_that_is_none_gets_out(series: Series) -> None:
    series.record(DAY, {})
    series.record(DAY + 60, {"mem": math.nan, "cpu": 0.25})
    assert series.read("hour", "AVERAGE", DAY + 60)[-1] == {"time": DAY + 60, "cpu": 0.25}


def test_a_recorder_forgets_what_is_no_more(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "rrd", {"vm": ("mem",), "storage": ("used", "total")})
    for name in ("vm-100", "vm-101", "storage-local-lvm"):
        for second in (0, 60):
            recorder.record(name, DAY + second, {"mem": 1} if name < "t" and name[0] == "v" else {"used": 2})
    assert recorder.read("storage-local-lvm", "hour", "AVERAGE", DAY + 60)[-1] == {"time": DAY + 60, "used": 2}
    recorder.keep_only({"vm-101"})
    assert [path.name for path in (tmp_path / "rrd").iterdir()] == ["vm-101"]
    assert recorder.read("vm-100", "hour", "AVERAGE", DAY + 60)[-1] == {"time": DAY + 60}
