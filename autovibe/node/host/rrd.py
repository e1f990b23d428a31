"""Figures over time: a series is a file of bounded size, with a ring of rows for each resolution, as RRD files have.

A row covers the time up to its label. Rows of a minute are averages of what was recorded in it; each is folded at once
into the rows above it (30 minutes, 6 hours, a week), which keep averages and maxima and know a figure when at least
half of the rows below do. Every row carries its time and a checksum, so a row that was never written, is of an earlier
round of its ring, or was torn by a crash is a gap; nothing else has to be kept, and a killed node loses one minute.
Resolutions and lengths are those of Proxmox VE 9 (pve-cluster's status.c, pve-manager's RRD.pm).
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

Cf = Literal["AVERAGE", "MAX"]
Figures = Mapping[str, float]

MINUTE = 60
_HEARTBEAT_SECONDS = 120.0  # of two records further apart than this, nothing is known about the time between
_KNOWN_SHARE = 0.5
_HEAD = struct.Struct("<QI")

TIMEFRAMES = {
    "hour": (MINUTE, 60),
    "day": (MINUTE, 1440),
    "week": (30 * MINUTE, 336),
    "month": (30 * MINUTE, 1440),
    "year": (360 * MINUTE, 1440),
    "decade": (10080 * MINUTE, 570),
}
"""Seconds a row covers, and how many rows are asked for."""


class _Ring(NamedTuple):
    """Rows of one resolution; each has `width` figures for every field: an average, and a maximum where they differ."""

    step: int
    rows: int
    width: int


_RINGS = (
    _Ring(MINUTE, 1440, 1),
    _Ring(30 * MINUTE, 1440, 2),
    _Ring(360 * MINUTE, 1440, 2),
    _Ring(10080 * MINUTE, 570, 2),
)


class Series:
    """The file of one series. `fields` are all that its rows can hold, in the order of the file."""

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        self._path = path
        self._fields = tuple(fields)
        self._seed = zlib.crc32(",".join(fields).encode())  # rows of other fields are none of ours
        self._meter = _Meter()

    def record(self, now: float, gauges: Figures, counters: Figures | None = None) -> None:
        """Take in what holds at `now` (and since the record before). Counters, which only grow, are kept as rates."""
        for label, figures in self._meter.take(now, gauges, counters or {}):
            self._write(label, figures)

    def read(self, timeframe: str, cf: Cf, now: float) -> list[dict[str, float]]:
        """The rows of a timeframe up to `now`, oldest first: `time` (the row's end) and the figures that are known."""
        step, count = TIMEFRAMES[timeframe]
        number = next(number for number, ring in enumerate(_RINGS) if ring.step == step)
        last = int(now) // step * step
        first = last - step * (count - 1)
        found: Mapping[int, tuple[float, ...]] = {}
        with contextlib.suppress(FileNotFoundError), self._open(os.O_RDONLY) as file:
            found = dict(self._rows(file, number, first, count))
        at = len(self._fields) if cf == "MAX" and _RINGS[number].width == 2 else 0
        return [
            {"time": time, **self._known(found[time][at:] if time in found else ())}
            for time in range(first, last + step, step)
        ]

    def _known(self, figures: Sequence[float]) -> dict[str, float]:
        return {name: _plain(figure) for name, figure in zip(self._fields, figures, strict=False) if figure == figure}

    # On disk

    @contextlib.contextmanager
    def _open(self, flags: int) -> Iterator[int]:
        file = os.open(self._path, flags, 0o600)
        try:
            yield file
        finally:
            os.close(file)

    def _row(self, ring: _Ring) -> struct.Struct:
        return struct.Struct(f"<{ring.width * len(self._fields)}d")

    def _start(self, number: int) -> int:
        """Where a ring begins in the file."""
        return sum(ring.rows * (_HEAD.size + self._row(ring).size) for ring in _RINGS[:number])

    def _rows(self, file: int, number: int, first: int, count: int) -> Iterator[tuple[int, tuple[float, ...]]]:
        """The rows that are there among `count` of a ring from the one labelled `first`, each with its label."""
        ring, row = _RINGS[number], self._row(_RINGS[number])
        size, start = _HEAD.size + row.size, self._start(number)
        slot = first // ring.step % ring.rows
        block = os.pread(file, min(count, ring.rows - slot) * size, start + slot * size)
        if slot + count > ring.rows:
            block = block.ljust((ring.rows - slot) * size, b"\0")
            block += os.pread(file, (slot + count - ring.rows) * size, start)
        for position in range(min(count, len(block) // size)):
            at = position * size
            label, checksum = _HEAD.unpack_from(block, at)
            figures = block[at + _HEAD.size : at + size]
            if label == first + position * ring.step and checksum == self._checksum(label, figures):
                yield label, row.unpack(figures)

    def _put(self, file: int, number: int, label: int, figures: Sequence[float]) -> None:
        ring, row = _RINGS[number], self._row(_RINGS[number])
        data = row.pack(*figures)
        place = self._start(number) + label // ring.step % ring.rows * (_HEAD.size + row.size)
        os.pwrite(file, _HEAD.pack(label, self._checksum(label, data)) + data, place)

    def _checksum(self, label: int, data: bytes) -> int:
        return zlib.crc32(data, zlib.crc32(str(label).encode(), self._seed))

    def _write(self, label: int, figures: Figures) -> None:
        """A minute's row. The row above it changes with each of its rows, one above that when a row below is whole."""
        with self._open(os.O_RDWR | os.O_CREAT) as file:
            self._put(file, 0, label, [figures.get(name, math.nan) for name in self._fields])
            for number in range(1, len(_RINGS)):
                if number > 1 and label % _RINGS[number - 1].step:
                    break
                self._fold(file, number, -(-label // _RINGS[number].step) * _RINGS[number].step)

    def _fold(self, file: int, number: int, label: int) -> None:
        """Make the row that ends at `label` of the rows of the ring below."""
        ring, below = _RINGS[number], _RINGS[number - 1]
        count = ring.step // below.step
        rows = [row for _, row in self._rows(file, number - 1, label - ring.step + below.step, count)]
        size = len(self._fields)
        averages, maxima = [], []
        for column in range(size):
            known = [row for row in rows if not math.isnan(row[column])]
            is_known = len(known) >= count * _KNOWN_SHARE
            averages.append(sum(row[column] for row in known) / len(known) if is_known else math.nan)
            maxima.append(max(row[column - size] for row in known) if is_known else math.nan)
        self._put(file, number, label, [*averages, *maxima])


class _Meter:
    """What is known of the minute that runs: for each figure its sum over time, and the seconds it is known for."""

    def __init__(self) -> None:
        self._at = -math.inf
        self._counters: Figures = {}
        self._sums: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def take(self, now: float, gauges: Figures, counters: Figures) -> Iterator[tuple[int, dict[str, float]]]:
        """Add a record; the minutes that are over with it, by their ends."""
        before, self._at = self._at, now
        former, self._counters = self._counters, dict(counters)
        if not 0 < now - before <= _HEARTBEAT_SECONDS:
            if self._seconds and before // MINUTE != now // MINUTE:
                yield _end_of_minute(before), self._empty()
            return
        grown = {name: counters[name] - former[name] for name in counters.keys() & former.keys()}
        rates = {name: growth / (now - before) for name, growth in grown.items() if growth >= 0}
        while before < now:
            end = _end_of_minute(before)
            self._add({**gauges, **rates}, min(end, now) - before)
            if end <= now:
                yield end, self._empty()
            before = min(end, now)

    def _add(self, figures: Figures, seconds: float) -> None:
        for name, figure in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + figure * seconds
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _empty(self) -> dict[str, float]:
        averages = {name: self._sums[name] / seconds for name, seconds in self._seconds.items()}
        self._sums, self._seconds = {}, {}
        return averages


def _end_of_minute(moment: float) -> int:
    return (int(moment) // MINUTE + 1) * MINUTE


def _plain(figure: float) -> float:
    """Whole numbers without a fraction, as Proxmox's JSON has them."""
    return int(figure) if figure.is_integer() else figure


class Recorder:
    """All series of a node, by name (`vm-100`); their files are below `directory`."""

    def __init__(self, directory: Path, fields: Mapping[str, Sequence[str]]) -> None:
        """`fields` are those of the series by the name's part before its first hyphen."""
        self._directory = directory
        self._fields = fields
        self._series: dict[str, Series] = {}
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def record(self, name: str, now: float, gauges: Figures, counters: Figures | None = None) -> None:
        """May raise OSError: a full disk."""
        if name not in self._series:
            self._series[name] = self._find(name)
        self._series[name].record(now, gauges, counters)

    def read(self, name: str, timeframe: str, cf: Cf, now: float) -> list[dict[str, float]]:
        return self._find(name).read(timeframe, cf, now)

    def keep_only(self, names: Collection[str]) -> None:
        """Forget the series of what is no more."""
        for path in self._directory.iterdir():
            if path.name not in names:
                self._series.pop(path.name, None)
                path.unlink(missing_ok=True)

    def _find(self, name: str) -> Series:
        return Series(self._directory / name, self._fields[name.partition("-")[0]])
