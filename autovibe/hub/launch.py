"""How a second Hub is started: plain values, since settings end above this level."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """`argv` runs a Hub once `--home HOME` is added to it, in `environment`.

    `settings` are those of this Hub that a second one shares, as values of a config.toml; `pool` its daily limits by
    setting; `secrets` the files, by name, that settings point to as `<setting>_file`. `check` raises InvalidRequest
    for a value that a setting cannot have.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    settings: Mapping[str, Any]
    pool: Mapping[str, float | None]
    secrets: Mapping[str, str]
    check: Callable[[Mapping[str, Any]], None]
