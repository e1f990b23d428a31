"""Playbook runs against a real sshd of the test's own, by the real ansible-runner."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from autovibe import provision
from autovibe.assets import asset
from autovibe.errors import ConfigurationError
from tests.stub.node import free_port

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or "/usr/sbin/sshd"
PATIENCE = 60.0


@dataclass
class Server:
    port: int
    host_key: str
    private_key: Path
    user: str
    log: Path

    def connections(self) -> int:
        return self.log.read_text().count("Accepted publickey")


def keygen(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path], check=True)
    return path.with_suffix(".pub").read_text().strip()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("sshd")
    host_key, user_key, log = home / "host", home / "user", home / "log"
    public = keygen(host_key)
    (home / "authorized_keys").write_text(keygen(user_key) + "\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    port = free_port()
    options = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": host_key,
        "AuthorizedKeysFile": home / "authorized_keys",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": "none",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "LogLevel": "INFO",
        "SetEnv": "SHLVL=5",  # bash reads no ~/.bashrc then
    }
    arguments = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    sshd = subprocess.Popen([SSHD, "-D", "-f", "/dev/null", "-E", log, *arguments])
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
    user = pwd.getpwuid(os.geteuid()).pw_name
    yield Server(port=port, host_key=public, private_key=user_key, user=user, log=log)
    sshd.terminate()
    sshd.wait(10)


class Bench:
    """Starts runs of playbooks written by the test, and ends whatever is left of them."""

    def __init__(self, server: Server, home: Path) -> None:
        self.server = server
        self.runs = home / "runs"
        self.playbooks = home / "playbooks"
        self.playbooks.mkdir()

    def order(self, tasks: str, **changes: Any) -> dict[str, Any]:
        path = self.playbooks / f"p{len(list(self.playbooks.iterdir()))}.yml"
        text = textwrap.indent(textwrap.dedent(tasks), "    ")
        path.write_text(f"- name: Test\n  hosts: all\n  gather_facts: false\n  tasks:\n{text}")
        return {
            "playbook": path,
            "host": "127.0.0.1",
            "port": self.server.port,
            "user": self.server.user,
            "host_key": self.server.host_key,
            "private_key": self.server.private_key,
            "variables": {},
            "project_dir": self.playbooks,
            **changes,
        }

    def start(self, name: str, tasks: str, **changes: Any) -> Path:
        run = self.runs / name
        provision.start(run, **self.order(tasks, **changes))
        return run

    def finish(self, run: Path) -> provision.Report:
        return eventually(lambda: provision.poll(run))


def eventually(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < deadline, "It took too long."
        time.sleep(0.05)
    return found


def processes_of(run: Path) -> list[psutil.Process]:
    return provision._marked(run.absolute())


@pytest.fixture
def bench(server: Server, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(server, tmp_path)
    yield bench
    for run in bench.runs.glob("*"):
        provision.stop(run)
        assert not processes_of(run)


WAIT = """
- name: Say hello
  ansible.builtin.raw: echo hello-from-the-guest
- name: Wait
  ansible.builtin.raw: touch {{ began }}; sleep 120
"""


def test_a_run_goes_well_and_is_reported_once_and_for_all(bench: Bench) -> None:
    run = bench.start(
        "good", "- name: Greet\n  ansible.builtin.command: echo hello-{{ who }}", variables={"who": "you"}
    )
    assert provision.poll(run) is None
    report = bench.finish(run)
    assert (report.status, report.failed_task, report.message) == ("ok", "", "")
    assert report.stats["ok"] == 1
    assert report.stats["changed"] == 1
    assert 0 < report.duration < PATIENCE
    lines, offset = provision.events(run)
    assert any("Greet" in line for line in lines)
    assert "\x1b" not in "".join(lines)
    assert provision.events(run, offset) == ([], offset)
    assert not processes_of(run)
    shutil.rmtree(run / "artifacts")
    assert provision.poll(run) == report


def test_starting_twice_makes_one_run(bench: Bench, tmp_path: Path) -> None:
    counted = tmp_path / "counted"
    order = bench.order(f"- ansible.builtin.raw: echo once >> {counted}; sleep 1")
    run = bench.runs / "twice"
    for _ in range(2):
        provision.start(run, **order)
    assert bench.finish(run).status == "ok"
    provision.start(run, **order)
    assert bench.finish(run).status == "ok"
    assert counted.read_text() == "once\n"


def test_events_come_while_the_run_goes_on(bench: Bench, tmp_path: Path) -> None:
    run = bench.start("events", WAIT, variables={"began": str(tmp_path / "began")})
    seen: list[str] = []
    offset = 0

    def hello_is_seen() -> bool:
        nonlocal offset
        lines, offset = provision.events(run, offset)
        seen.extend(lines)
        return any("Wait" in line for line in seen)

    eventually(hello_is_seen)
    assert provision.poll(run) is None
    assert len([line for line in seen if "Say hello" in line]) == 1


def test_a_failing_task_is_named_with_its_message(bench: Bench) -> None:
    run = bench.start(
        "bad",
        """
        - name: Ignored
          ansible.builtin.raw: exit 4
          ignore_errors: true
        - name: Fail on purpose
          ansible.builtin.command: sh -c "echo the-reason >&2; exit 3"
        """,
    )
    report = bench.finish(run)
    assert report.status == "failed"
    assert report.failed_task == "Fail on purpose"
    assert "the-reason" in report.message
    assert report.stats["failures"] == 1


def test_a_playbook_that_is_no_playbook_fails_with_ansibles_words(bench: Bench) -> None:
    order = bench.order("- nonsense: true")
    run = bench.runs / "syntax"
    provision.start(run, **order)
    report = bench.finish(run)
    assert report.status == "failed"
    assert "nonsense" in report.message


def test_a_playbook_that_is_missing_is_refused(bench: Bench, tmp_path: Path) -> None:
    order = bench.order("- ansible.builtin.raw: 'true'", playbook=tmp_path / "none.yml")
    with pytest.raises(ConfigurationError, match=r"There is no playbook '.*none.yml'"):
        provision.start(bench.runs / "none", **order)
    assert not (bench.runs / "none").exists()


def test_a_guest_that_does_not_answer_is_unreachable(bench: Bench) -> None:
    run = bench.start("away", "- ansible.builtin.raw: 'true'", port=free_port())
    report = bench.finish(run)
    assert report.status == "unreachable"
    assert "refused" in report.message


def test_another_host_key_than_the_pinned_one_is_refused(bench: Bench, tmp_path: Path) -> None:
    before = bench.server.connections()
    run = bench.start("foreign", "- ansible.builtin.raw: 'true'", host_key=keygen(tmp_path / "other"))
    report = bench.finish(run)
    assert report.status == "unreachable"
    assert "Host key verification failed" in report.message
    assert bench.server.connections() == before


def test_the_users_ssh_configuration_and_agent_are_not_used(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ssh").mkdir(mode=0o700)
    (tmp_path / ".ssh/config").write_text("Host *\n  Port 1\n  ProxyCommand false\n")
    (tmp_path / ".ansible.cfg").write_text("[defaults]\nremote_user = nobody\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
    monkeypatch.setenv("ANSIBLE_REMOTE_PORT", "1")
    run = bench.start("clean", "- ansible.builtin.raw: test -z $SSH_AUTH_SOCK")
    assert bench.finish(run).status == "ok"


def test_nothing_leaks_from_one_run_into_the_next(bench: Bench) -> None:
    show = """
    - name: Show
      ansible.builtin.debug:
        msg: "{{ hidden | default('nothing') }}"
    """
    first = bench.start("first", show, variables={"hidden": "of-the-first-run"})
    assert bench.finish(first).status == "ok"
    second = bench.start("second", show, variables={})
    assert bench.finish(second).status == "ok"
    assert "of-the-first-run" in "\n".join(provision.events(first)[0])
    assert "of-the-first-run" not in "\n".join(provision.events(second)[0])
    assert not (first / "env/extravars").exists()


def test_secrets_are_masked_in_events_and_in_what_lies_on_the_disk(bench: Bench) -> None:
    secret = "s3cr3t-v4lue-of-the-test"
    run = bench.start(
        "secret",
        "- name: Fail\n  ansible.builtin.command: sh -c 'echo {{ service.api_key }} >&2; exit 1'",
        variables={"service": {"api_key": secret}},
    )
    report = bench.finish(run)
    assert report.status == "failed"
    assert "[hidden]" in report.message
    assert secret not in "\n".join(provision.events(run)[0])
    for path in run.rglob("*"):
        if path.is_file():
            assert secret not in path.read_text(errors="replace"), path


def test_stop_ends_every_process(bench: Bench, tmp_path: Path) -> None:
    began = tmp_path / "began"
    run = bench.start("stopped", WAIT, variables={"began": str(began)})
    eventually(began.exists)
    assert len(processes_of(run)) >= 3  # program, ansible-playbook, ssh
    begin = time.monotonic()
    provision.stop(run)
    assert time.monotonic() - begin < 8
    assert not processes_of(run)
    report = provision.poll(run)
    assert report is not None
    assert report.status == "failed"
    provision.stop(run)
    assert provision.poll(run) == report


def test_stop_of_a_run_that_never_began_does_nothing(tmp_path: Path) -> None:
    provision.stop(tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_run_outlives_its_starter(bench: Bench, tmp_path: Path) -> None:
    """A starter killed with kill -9 leaves a run that another process finds, by pid or without process.json."""
    began, go = tmp_path / "began", tmp_path / "go"
    order = bench.order(
        "- ansible.builtin.raw: touch {{ began }}; while ! test -e {{ go }}; do sleep 0.1; done; echo went",
        variables={"began": str(began), "go": str(go)},
    )
    run = bench.runs / "orphan"
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in order.items()}
    script = tmp_path / "starter.py"
    script.write_text(
        "import json, sys, time\nfrom pathlib import Path\nfrom autovibe import provision\n"
        "order = json.loads(sys.argv[2])\n"
        "for name in ('playbook', 'private_key', 'project_dir'):\n    order[name] = Path(order[name])\n"
        "provision.start(Path(sys.argv[1]), **order)\ntime.sleep(300)\n"
    )
    starter = subprocess.Popen([sys.executable, script, run, json.dumps(plain)])
    eventually(began.exists)
    starter.send_signal(signal.SIGKILL)
    starter.wait(10)
    assert provision.poll(run) is None
    (run / "process.json").unlink()  # as if it had been killed between the start and the note
    assert provision.poll(run) is None
    provision.start(run, **order)  # the repeated step finds the run
    assert provision.sweep(bench.runs) == []
    assert provision.poll(run) is None
    go.touch()
    assert bench.finish(run).status == "ok"
    assert "went" in "\n".join(str(event) for _, event in provision._events(run, 0))


def test_a_run_whose_program_is_killed_is_lost_and_its_children_are_ended(bench: Bench, tmp_path: Path) -> None:
    began = tmp_path / "began"
    run = bench.start("lost", WAIT, variables={"began": str(began)})
    eventually(began.exists)
    program = json.loads((run / "process.json").read_text())["pid"]
    os.kill(program, signal.SIGKILL)
    eventually(lambda: not provision._is_running(run))
    assert processes_of(run)  # ansible-playbook goes on without its parent
    assert provision.sweep(bench.runs) == ["lost"]
    assert not processes_of(run)
    report = provision.poll(run)
    assert report is not None
    assert report.status == "lost"


def test_a_run_with_a_long_path_reaches_its_guest(bench: Bench) -> None:
    """A control socket inside the run would exceed 108 bytes; blanks and percent signs are OpenSSH's own syntax."""
    run = bench.start("deep %h " + "x" * 120, "- ansible.builtin.raw: 'true'\n- ansible.builtin.raw: 'true'")
    before = bench.server.connections()
    assert bench.finish(run).status == "ok"
    assert bench.server.connections() == before + 1  # one connection for all tasks


@pytest.mark.parametrize("name", ["base.yml", "shell.yml"])
def test_the_playbooks_that_travel_with_autovibe_are_sound(name: str, tmp_path: Path) -> None:
    checked = subprocess.run(
        [
            Path(sys.executable).parent / "ansible-playbook",
            "--syntax-check",
            "-i",
            "machine,",
            asset("playbooks") / name,
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C.UTF-8", "ANSIBLE_HOME": str(tmp_path)},
    )
    assert checked.returncode == 0, checked.stderr
