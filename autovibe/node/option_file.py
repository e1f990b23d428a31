"""A file of `key: value` lines under a description in `#` lines: datacenter.cfg and the node's own options."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from urllib.parse import quote, unquote

from autovibe.node.files import replace_durably
from autovibe.node.refusal import Refusal
from autovibe.node.vm import vmconfig
from autovibe.node.vm.vmconfig import Config

_LONG_TEXTS = ("consent-text",)
"""Options of many lines, which stand percent-encoded in theirs."""

_lock = threading.Lock()


def read(path: Path) -> Config:
    """The options in `values`; none, and the digest of an empty file, where there is no file."""
    config = vmconfig.parse(path.read_text(encoding="utf-8") if path.exists() else "")
    for key in _LONG_TEXTS:
        if key in config.values:
            config.values[key] = unquote(config.values[key])
    return config


def change(
    path: Path,
    given: Mapping[str, str],
    deleted: Collection[str],
    *,
    digest: str | None = None,
    check: Callable[[Mapping[str, str]], object] = lambda _: None,
) -> None:
    """Put and remove options. `digest` must be the file's, if given; `check` may refuse what would be the outcome."""
    with _lock:
        config = read(path)
        if digest is not None and digest != config.digest:
            raise Refusal("detected modified configuration - file changed by other user? Try again.")
        values = {key: value for key, value in {**config.values, **given}.items() if key not in deleted}
        check(values)
        encoded = {key: quote(values[key], safe=" ") for key in _LONG_TEXTS if key in values}
        replace_durably(path, vmconfig.render(Config({**values, **encoded})))
