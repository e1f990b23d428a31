"""The words of the command line against a hub at the wire: output, exit statuses, names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from typer.testing import CliRunner, Result

from autovibe.cli import app, output
from autovibe.cli.exits import EXIT_STATUS
from autovibe.errors import CLASSES
from tests.unit import wire as wires
from tests.unit.wire import Refuse, Row, Wire

Run = Callable[..., Result]
PYTHON = [sys.executable, "-m", "autovibe.cli"]


@pytest.fixture
def wire() -> Iterator[Wire]:
    with wires.serving() as made:
        yield made


@pytest.fixture
def run(wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in [name for name in os.environ if name.startswith("AUTOVIBE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AUTOVIBE_HOME", str(tmp_path))
    monkeypatch.setenv("AUTOVIBE_URL", wire.url)
    monkeypatch.setenv("AUTOVIBE_API_KEY", "av_key")

    def invoke(*words: str, status: int = 0, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(app, list(words), input=stdin)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result

    return invoke


@pytest.fixture
def owner(wire: Wire) -> Row:
    return wire.put("projects", wires.project("hello"))


# Start and shape


def test_it_starts_quickly_and_loads_no_program() -> None:
    script = (
        "import sys\nfrom autovibe.cli import app\n"
        "heavy = {'httpx2', 'pydantic', 'fastapi', 'sqlmodel', 'paramiko', 'psutil', 'dbos', 'rich.progress', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def _walk(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, child in command.commands.items():
        yield from _walk(child, (*words, name))


def test_every_word_has_help_and_json() -> None:
    from typer.main import get_command

    without = {("serve", "hub"), ("serve", "node"), ("machine", "ssh")}
    for words, command in _walk(get_command(app)):
        assert command.help, words
        options = {option for parameter in command.params for option in getattr(parameter, "opts", [])}
        assert ("--json" in options) == (words not in without), words


def test_every_error_has_an_exit_status() -> None:
    assert set(EXIT_STATUS) == set(CLASSES)
    assert {2, 3, 4, 5, 6, 7} == set(EXIT_STATUS.values())


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("INVALID_REQUEST", 2),
        ("NOT_FOUND", 3),
        ("CONFLICT", 4),
        ("RESOURCE_LIMIT_EXCEEDED", 4),
        ("UNAUTHORIZED", 5),
        ("FORBIDDEN", 5),
        ("HYPERVISOR_UNAVAILABLE", 6),
        ("DEADLINE_EXCEEDED", 7),
    ],
)
def test_errors_become_exit_statuses(run: Run, wire: Wire, code: str, status: int) -> None:
    def refuse(_given: Any) -> None:
        raise Refuse(400, code, "What \x1b]0;happened.")

    wire.on("POST", "/projects", refuse)
    plain = run("project", "create", "hello", status=status)
    assert plain.stdout == ""
    assert "]0;happened." in plain.stderr
    assert "\x1b" not in plain.stderr
    told = json.loads(run("project", "create", "hello", "--json", status=status).stdout)
    assert told["success"] is False
    assert told["error"]["code"] == code


def test_a_hub_that_is_not_there_is_status_6(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOVIBE_URL", "http://127.0.0.1:9")
    assert "autovibe up" in run("machine", "list", status=6).stderr
    assert json.loads(run("status", "--json", status=6).stdout)["hub"]["health"] == "unreachable"


def test_wrong_usage_is_status_2(run: Run) -> None:
    run("machine", "exec", "one", status=2)
    run("machine", "spawn", status=2)
    run("checkpoint", "list", status=2)
    run("project", "create", "x", "--greediness", "7", status=2)
    run("nonsense", status=2)


def test_flags_win_over_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch, wire: Wire) -> None:
    monkeypatch.setenv("AUTOVIBE_URL", "http://127.0.0.1:9")
    assert run("--url", wire.url, "project", "list").exit_code == 0


def test_the_key_of_the_home_is_sent(run: Run, wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOVIBE_API_KEY")
    (tmp_path / "credentials").write_text("av_home\n")
    (tmp_path / "credentials").chmod(0o600)
    run("project", "list")
    assert wire.asked[-1][3]["Authorization"] == "Bearer av_home"
    (tmp_path / "credentials").chmod(0o644)
    assert "chmod 600" in run("project", "list", status=2).stderr


# Names


def test_names_and_prefixes_are_resolved(run: Run, wire: Wire, owner: Row) -> None:
    one = wire.put("machines", wires.machine("one", owner, uuid="aaaa1111-0000-4000-8000-000000000001"))
    two = wire.put("machines", wires.machine("two", owner, uuid="aaaa2222-0000-4000-8000-000000000002"))
    for word, meant in (
        ("one", one),
        ("aaaa1", one),
        ("AAAA2", two),
        (two["uuid"], two),
        (two["uuid"].replace("-", ""), two),
    ):
        assert json.loads(run("machine", "show", word, "--json").stdout)["uuid"] == meant["uuid"]
    ambiguous = run("machine", "show", "aaaa", status=2)
    assert one["uuid"] in ambiguous.stderr
    assert two["uuid"] in ambiguous.stderr
    run("machine", "show", "bbbb", status=3)
    run("machine", "show", "../projects", status=3)
    run("machine", "show", "11111111-0000-4000-8000-000000000001", status=3)


def test_a_name_wins_over_a_prefix_and_the_living_over_the_ended(run: Run, wire: Wire, owner: Row) -> None:
    wire.put("machines", wires.machine("other", owner, uuid="abcd0000-0000-4000-8000-000000000001"))
    living = wire.put("machines", wires.machine("abcd", owner))
    wire.put("machines", wires.machine("abcd", owner, status="terminated"))
    assert json.loads(run("machine", "show", "abcd", "--json").stdout)["uuid"] == living["uuid"]


def test_labels_are_found_and_told_apart_by_project(run: Run, wire: Wire, owner: Row) -> None:
    other = wire.put("projects", wires.project("other"))
    mine = wire.put("checkpoints", wires.checkpoint(owner, label="a"))
    wire.put("checkpoints", wires.checkpoint(other, label="a"))
    run("checkpoint", "show", "a", status=2)
    assert json.loads(run("checkpoint", "show", "a", "-p", "hello", "--json").stdout)["uuid"] == mine["uuid"]
    listed = json.loads(run("checkpoint", "list", "--project", "hello", "--json").stdout)
    assert [item["uuid"] for item in listed["checkpoints"]] == [mine["uuid"]]
    assert listed == json.loads(run("checkpoint", "list", "hello", "--json").stdout)


# Machines


def test_spawn_sends_the_order(run: Run, wire: Wire, owner: Row, tmp_path: Path) -> None:
    local = tmp_path / "local.sh"
    local.write_text("echo hi\n")
    local.chmod(0o755)
    wire.on("POST", "/machines", lambda given: wire.put("machines", wires.machine(given["name"], owner)))
    words = ["machine", "spawn", "-p", "hello", "--name", "one", "--prompt", "-", "--file", f"/opt/x={local}"]
    words += ["--file", "/etc/gone=", "--max-money", "1.5", "--detach", "--json"]
    made = json.loads(run(*words, stdin="true\n").stdout)
    assert made["name"] == "one"
    sent = next(given for method, path, given, _ in wire.asked if (method, path) == ("POST", "/machines"))
    assert sent["prompt"] == "true\n"
    assert sent["file_modifications"] == {
        "/opt/x": {"content_base64": "ZWNobyBoaQo=", "mode": "0755"},
        "/etc/gone": None,
    }
    assert sent["resource_constraints"] == {"max_money": {"amount": 1.5}}
    run("machine", "spawn", "-p", "hello", "--file", "relative=x", status=2)
    run("machine", "spawn", "-p", "hello", "--file", "/a=/no/such/file", status=2)


def test_a_spawn_that_fails_is_status_7(run: Run, wire: Wire, owner: Row) -> None:
    error = {"code": "GUEST_UNREACHABLE", "message": "The guest never answered.", "details": {}}
    failed = wire.put("operations", wires.operation(status="failed", error=error))
    row = wires.machine("one", owner, status="spawning", operation_uuid=failed["uuid"])
    wire.on("POST", "/machines", lambda _given: wire.put("machines", row))
    assert "never answered" in run("machine", "spawn", "-p", "hello", status=7).stderr


def test_exec_hands_on_output_and_status(run: Run, wire: Wire, owner: Row) -> None:
    wire.put("machines", wires.machine("one", owner))
    result = {"exit_status": 3, "stdout": "out\n", "stderr": "err\n", "truncated": False, "duration_ms": 5}
    wire.on("POST", r"/machines/(.*)/exec", lambda *_: result)
    done = run("machine", "exec", "one", "--env", "A=b=c", "--", "ls", "-l", "--json", status=3)
    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    assert wire.asked[-1][2] == {"argv": ["ls", "-l", "--json"], "env": {"A": "b=c"}}
    told = json.loads(run("machine", "exec", "one", "--script", "exit 3", "--timeout", "5", "--json", status=3).stdout)
    assert told == result
    assert wire.asked[-1][2] == {"script": "exit 3", "timeout_seconds": 5}
    run("machine", "exec", "one", "--env", "nonsense", "--", "ls", status=2)


def test_lists_show_the_living_and_hide_control_characters(run: Run, wire: Wire, owner: Row) -> None:
    wire.put("machines", wires.machine("gone", owner, status="terminated"))
    assert "ended" in run("machine", "list").stderr
    wire.put("machines", wires.machine("evil", owner, progress="\x1b[2J\x9b31m\u202egood\nbye"))
    shown = run("machine", "list").stdout
    assert "gone" not in shown
    assert "\\x1b[2J\\x9b31m\\u202egood\\nbye" in shown
    assert not set("\x1b\x9b\u202e") & set(shown)
    assert "gone" in run("machine", "list", "--all").stdout
    listed = json.loads(run("machine", "list", "--json").stdout)
    assert listed["total_count"] == 2


def test_logs_are_printed_as_they_are_into_a_pipe(run: Run, wire: Wire, owner: Row) -> None:
    wire.put("machines", wires.machine("one", owner))
    text = "\x1b[31mred\x1b[0m\n"

    def logs(given: Any, _uuid: str) -> Row:
        rest = text[int(given.get("offset", 0)) :]
        return {"offset": 0, "next_offset": len(text), "text": rest, "finished": True}

    wire.on("GET", r"/machines/(.*)/logs", logs)
    assert run("machine", "logs", "one").stdout == text
    assert run("machine", "logs", "one", "-f").stdout == text
    assert json.loads(run("machine", "logs", "one", "--json").stdout)["finished"] is True


def test_a_terminal_gets_colours_and_nothing_else() -> None:
    hostile = "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[6n \x9b2J\r\n"
    assert output.stream(hostile, is_terminal=False) == hostile
    shown = output.stream(hostile, is_terminal=True)
    assert shown == "\x1b[31mred\x1b[0m \\x1b]0;title\\x07 \\x1b[6n \\x9b2J\r\n\x1b[0m"


def test_ssh_needs_the_home_of_the_hub(run: Run, wire: Wire, owner: Row) -> None:
    wire.put("machines", wires.machine("one", owner))
    assert "machine exec" in run("machine", "ssh", "one", status=2).stderr


def test_ssh_runs_openssh_with_the_pinned_key(
    run: Run, wire: Wire, owner: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = wire.put("machines", wires.machine("one", owner))
    there = {"host": "127.1.35.40", "port": 8007, "user": "agent", "host_key": "ssh-ed25519 AAAA"}
    wire.on("GET", r"/machines/(.*)/ssh", lambda *_: there)
    key = tmp_path / "hub" / "ssh" / "id_ed25519"
    key.parent.mkdir(parents=True)
    key.write_text("key")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ssh").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (programs / "ssh").chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    command = [*PYTHON, "machine", "ssh", "one", "--", "hostname"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    known_hosts = key.parent / "known_hosts.d" / row["uuid"]
    assert known_hosts.read_text() == f"{row['uuid']} ssh-ed25519 AAAA\n"
    assert told[:6] == ["-i", str(key), "-p", "8007", "-l", "agent"]
    assert f"UserKnownHostsFile={known_hosts}" in told
    assert "StrictHostKeyChecking=yes" in told
    assert told[-2:] == ["127.1.35.40", "hostname"]


def test_ctrl_c_leaves_a_wait_and_says_how_to_come_back(run: Run, wire: Wire, owner: Row) -> None:
    running = wire.put("operations", wires.operation())
    wire.put("machines", wires.machine("one", owner, status="spawning", operation_uuid=running["uuid"]))
    process = subprocess.Popen(
        [*PYTHON, "machine", "show", "one", "--wait", "ready"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 20
    while not any(path.startswith("/operations") for _, path, *_ in wire.asked):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "autovibe machine show one --wait ready" in stderr
    assert stdout == ""
    assert "Traceback" not in stderr


def test_watch_prints_a_line_an_event(run: Run, wire: Wire, owner: Row) -> None:
    row = wire.put("machines", wires.machine("worker", owner))
    machine, short = row["uuid"], row["uuid"][:8]
    blocks = [
        ": listening\nid: 1\n\n",
        wires.event(2, "machine.status", machine, status="active", exit_status=3),
        wires.event(3, "operation.step", str(UUID(int=7)), operation="spawn", machine_uuid=machine, step="clone"),
        wires.event(4, "budget.warning", owner["uuid"], scope="project", percent=80, note="\x1b[2J"),
        wires.event(5, "reset", None, message="Some were missed."),
    ]

    def events(_given: Row) -> Any:
        if any(headers.get("Last-Event-ID") == "5" for *_, headers in wire.asked):
            raise Refuse(403, "FORBIDDEN", "The key is revoked.")
        return wires.Sse(blocks)

    wire.on("GET", "/events", events)
    result = run("watch", "-p", "hello", "-o", "worker", "-k", "machine", "-k", "operation", "--since", "1", status=5)
    lines = [line[9:] for line in result.stdout.splitlines()]
    assert lines[0] == f"machine.status      worker ({short})        active, exit status 3"
    assert lines[1] == f"operation.step      worker ({short})        spawn: clone"
    assert lines[2].startswith(f"budget.warning      hello ({owner['uuid'][:8]})         scope project, percent 80")
    assert "\x1b" not in lines[2]
    assert lines[3].endswith("Some were missed.")
    asked = [(given, headers.get("Last-Event-ID")) for _, path, given, headers in wire.asked if path == "/events"]
    assert [last for _, last in asked] == ["1", "5"]
    assert asked[0][0] == {"project_uuid": owner["uuid"], "object_uuid": machine, "kind": "operation"}


def test_watch_prints_an_object_a_line_as_json(run: Run, wire: Wire) -> None:
    parts = [[wires.event(2, "machine.status", None, status="active"), wires.event(3, "hub.started", None)]]

    def events(_given: Row) -> Any:
        if not parts:
            raise Refuse(403, "FORBIDDEN", "The key is revoked.")
        return wires.Sse(parts.pop())

    wire.on("GET", "/events", events)
    lines = run("watch", "--json", status=5).stdout.splitlines()
    assert [json.loads(line)["kind"] for line in lines[:2]] == ["machine.status", "hub.started"]


# Checkpoints


@pytest.fixture
def changed(wire: Wire, owner: Row) -> tuple[Row, Row]:
    a = wire.put("checkpoints", wires.checkpoint(owner, label="a"))
    b = wire.put("checkpoints", wires.checkpoint(owner, label="b"))
    sha = "00" * 32

    def entry(path: str, size: int) -> Row:
        return {"path": path, "kind": "file", "size": size, "sha256": sha}

    change = {"kind": "file", "old_sha256": sha, "new_sha256": sha}
    found = wires.diff(
        a,
        b,
        added=[entry("/w/new\x1b[2J", 1200)],
        modified=[{**change, "path": "/w/m", "what": ["mode"], "old_size": 5, "new_size": 5}],
        deleted=[entry("/w/d", 30)],
    )
    wire.on("GET", f"/checkpoints/{a['uuid']}/diff/{b['uuid']}", lambda _given: found)
    wire.on("GET", f"/checkpoints/{a['uuid']}/diff/{a['uuid']}", lambda _given: wires.diff(a, a))
    return a, b


def test_diff_in_its_forms(run: Run, changed: tuple[Row, Row]) -> None:
    assert run("checkpoint", "diff", "a", "b").stdout.splitlines() == [
        "D  /w/d",
        "M  /w/m  (mode)",
        "A  /w/new\\x1b[2J",
        "3 changes",
    ]
    assert run("checkpoint", "diff", "a", "b", "--name-only").stdout.splitlines() == ["/w/d", "/w/m", "/w/new\\x1b[2J"]
    stat = run("checkpoint", "diff", "a", "b", "--stat").stdout.splitlines()
    assert stat[0].startswith(" D /w/d")
    assert stat[0].endswith("-")
    assert stat[2].endswith("+" * 40)
    assert json.loads(run("checkpoint", "diff", "a", "b", "--json").stdout)["total_changes"] == 3


def test_diff_exit_code(run: Run, changed: tuple[Row, Row]) -> None:
    run("checkpoint", "diff", "a", "b", "--exit-code", status=1)
    run("checkpoint", "diff", "a", "a", "--exit-code", status=0)
    assert json.loads(run("checkpoint", "diff", "a", "b", "--exit-code", "--json", status=1).stdout)["added"]
    run("checkpoint", "diff", "a", "nope", "--exit-code", status=3)
    run("checkpoint", "diff", "a", "b", "--stat", "--name-only", status=2)


def test_a_manifest_is_read_page_by_page(run: Run, wire: Wire, owner: Row) -> None:
    row = wire.put("checkpoints", wires.checkpoint(owner, label="a"))
    file = {"size": 1, "sha256": "ab" * 32, "kind": "file", "mode": "0644", "uid": 0, "gid": 0}

    def show(given: Any) -> Row:
        if "include" not in given:
            return row
        page = {"manifest": {"/b": file}} if given.get("cursor") else {"manifest": {"/a": file}, "manifest_next": "c1"}
        return {**row, **page}

    wire.on("GET", f"/checkpoints/{row['uuid']}", show)
    told = json.loads(run("checkpoint", "show", row["uuid"], "--manifest", "--json").stdout)
    assert list(told["manifest"]) == ["/a", "/b"]
    assert "/b" in run("checkpoint", "show", row["uuid"], "--manifest").stdout
