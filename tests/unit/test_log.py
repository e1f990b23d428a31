"""The hub's log in both forms: what each line is about, no secret, nothing that drives a terminal."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autovibe.api.log import configure_logs
from autovibe.domain import trace

SECRET = "s3cr3t-" + "x" * 20
log = logging.getLogger("autovibe.test")


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    root = logging.getLogger()
    kept, levels = root.handlers[:], (root.level, logging.getLogger("autovibe").level)
    noisy = logging.getLogger("uvicorn.error")
    filters = noisy.filters[:]
    yield
    for made in root.handlers[:]:
        root.removeHandler(made)
        if made not in kept:
            made.close()
    for handler in kept:
        root.addHandler(handler)
    noisy.filters[:] = filters
    root.setLevel(levels[0])
    logging.getLogger("autovibe").setLevel(levels[1])


def lines(tmp_path: Path, form: Any) -> Any:
    configure_logs(tmp_path / "hub.log", "info", [SECRET], form)

    def read() -> list[Any]:
        text = (tmp_path / "hub.log").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if form == "json" else text.splitlines()

    return read


def test_a_line_of_text_names_its_request_and_operation(tmp_path: Path) -> None:
    read = lines(tmp_path, "text")
    token = trace.request_id.set("r-1")
    with trace.about(operation="o-1"):
        log.info("inside")
    trace.request_id.reset(token)
    log.info("outside")
    assert "[r-1 o-1] inside" in read()[0]
    assert "[- -] outside" in read()[1]


def test_a_line_of_json_has_every_field(tmp_path: Path) -> None:
    read = lines(tmp_path, "json")
    with trace.about(operation="o-1", machine_uuid="m-1"):
        log.warning("Step '%s' is done.", "clone", extra={"duration": 1.25})
    log.info("later")
    first, second = read()
    assert set(first) == {
        "time", "level", "logger", "message", "request_id", "operation_id", "machine", "actor", "duration", "error",
    }  # fmt: skip
    assert first["time"].endswith("+00:00")
    assert (first["level"], first["logger"]) == ("warning", "autovibe.test")
    assert first["message"] == "Step 'clone' is done."
    assert (first["operation_id"], first["machine"], first["duration"]) == ("o-1", "m-1", 1.25)
    assert [second[name] for name in ("request_id", "operation_id", "machine", "actor", "duration", "error")] == [
        None
    ] * 6


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_leaves_in_any_form(tmp_path: Path, form: str) -> None:
    read = lines(tmp_path, form)
    body = json.dumps({"token": "abcdefghij", "password": 'quo"ted'})
    log.info("sent %s with Bearer %s", body, "av_0badcafe_" + "k" * 43)
    log.info('postgresql://hub:hunter2@db/x and "%s"', SECRET)
    try:
        raise ValueError(f"it was {SECRET}")
    except ValueError:
        log.exception("crashed")
    text = json.dumps(read())
    for hidden in (SECRET, "abcdefghij", "k" * 20, "hunter2"):
        assert hidden not in text
    assert "it was ***" in text
    assert "Traceback" in text


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_a_client_sent_drives_nothing(tmp_path: Path, form: str) -> None:
    read = lines(tmp_path, form)
    log.info("told %s", "\x1b[2J\r\n2026-01-01 INFO forged\x9b\x7f\u2028end")
    raw = (tmp_path / "hub.log").read_bytes()
    assert not set(raw) & ({*range(9), *range(11, 32), 127} - {10})
    assert b"\xc2\x9b" not in raw
    if form == "json":
        assert len(read()) == 1
        assert "forged" in read()[0]["message"]
    else:
        assert all(not line.startswith("2026-01-01") for line in read())


def test_the_log_is_nobody_elses(tmp_path: Path) -> None:
    lines(tmp_path, "json")
    assert (tmp_path / "hub.log").stat().st_mode & 0o077 == 0
    assert sys.stderr is not None
