"""What the command line keeps in a home: settings, processes, and the checks of doctor."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autovibe.cli import app, checks_proxmox, config, demo_texts, prepare
from autovibe.cli.processes import Claim, PidFile, Process, is_claimed, tail
from autovibe.cli.supervise import Child, Supervisor
from autovibe.errors import ConfigurationError
from autovibe.settings import load

SECRET = "root@pam!autovibe=00000000-1111-2222-3333-444444444444"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AUTOVIBE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AUTOVIBE_HOME", str(tmp_path))


def until(look: Callable[[], Any], seconds: float = 15) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


def run(*words: str, status: int = 0) -> Any:
    result = CliRunner().invoke(app, list(words))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


# Settings


def test_config_show_names_sources_and_masks_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.toml").write_text(f'vmid_first = 9100\nproxmox_token = "{SECRET}"\n')
    monkeypatch.setenv("AUTOVIBE_API_KEY", "av_secret")
    monkeypatch.setenv("AUTOVIBE_DATABASE_URL", "postgresql://me:hidden@db/autovibe")
    for words in (("config", "show"), ("config", "show", "--json")):
        shown = run("--url", "http://hub:1", *words).stdout
        assert not [secret for secret in (SECRET, "av_secret", "hidden") if secret in shown]
    found = {
        row["name"]: row
        for row in json.loads(run("--url", "http://hub:1", "config", "show", "--json").stdout)["settings"]
    }
    assert (found["url"]["value"], found["url"]["source"]) == ("http://hub:1", "flag")
    assert (found["vmid_first"]["value"], found["vmid_first"]["source"]) == (9100, "config.toml")
    assert (found["api_key"]["value"], found["api_key"]["source"]) == (config.MASK, "AUTOVIBE_API_KEY")
    assert found["database_url"]["value"] == f"postgresql://me:{config.MASK}@db/autovibe"
    assert found["hub_port"]["source"] == "default"
    assert set(found) == set(type(load()).model_fields)


def test_wrong_settings_are_status_2(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("hub_prot = 1\n")
    assert "hub_prot" in run("config", "show", status=2).stderr
    (tmp_path / "config.toml").write_text("hub_port 1\n")
    assert "config.toml" in run("machine", "list", status=2).stderr


def test_a_misspelt_variable_is_named_with_what_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOVIBE_GUEST_CORE", "4")
    with pytest.raises(ConfigurationError, match="is no setting; did you mean AUTOVIBE_GUEST_CORES"):
        load()
    monkeypatch.delenv("AUTOVIBE_GUEST_CORE")
    monkeypatch.setenv("AUTOVIBE_MACHINE_NAME", "one")  # what a machine finds in its own environment
    load()


def test_remembered_settings_leave_the_rest_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    config.remember(tmp_path, hub_port=8081)
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text('# mine\nimage = "debian-12"  # theirs\nhub_port = 8081\n')
    path.chmod(0o640)
    config.remember(tmp_path, hub_port=8082, node_port=8007)
    assert path.read_text() == 'node_port = 8007\n# mine\nimage = "debian-12"  # theirs\nhub_port = 8082\n'
    assert path.stat().st_mode & 0o777 == 0o640
    assert (load().hub_port, load().node_port) == (8082, 8007)


# Processes


def test_a_pid_file_forgets_what_has_gone(tmp_path: Path) -> None:
    me = Process.of("up", os.getpid())
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        child = Process.of("hub", sleeper.pid)
        file = PidFile(tmp_path)
        file.write([me, child])
        assert file.path.read_text().split()[0] == str(os.getpid())
        assert [process.name for process in file.read()] == ["up", "hub"]
        assert child.end(5)
        assert [process.name for process in file.read()] == ["up"]
    # The same pid of another time is another process.
    file.write([Process("up", os.getpid(), me.created - 1000)])
    assert file.read() == []
    file.path.write_text("garbage\n\n12 x\n")
    assert file.read() == []


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as stubborn:
        assert stubborn.stdout is not None
        stubborn.stdout.readline()
        process = Process.of("hub", stubborn.pid)
        assert not process.end(0.3)
        assert stubborn.wait(5) == -signal.SIGKILL


def test_a_home_is_claimed_once_and_the_claim_can_be_handed_on(tmp_path: Path) -> None:
    assert not is_claimed(tmp_path)
    claim = Claim(tmp_path)
    assert claim.take()
    assert is_claimed(tmp_path)
    assert not Claim(tmp_path).take()
    assert claim.descriptor is not None
    with subprocess.Popen(["sleep", "60"], pass_fds=(claim.descriptor,)) as heir:
        claim.let_go()
        assert is_claimed(tmp_path)
        heir.kill()
    assert not is_claimed(tmp_path)


def test_children_are_started_again_and_stopped_in_order(tmp_path: Path) -> None:
    said: list[str] = []
    recorded: list[list[Process]] = []
    stamp = tmp_path / "ends"
    script = (
        "import signal, sys, time\n"
        f"def end(*_): open({str(stamp)!r}, 'a').write(sys.argv[1] + '\\n'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('up', sys.argv[1], flush=True); time.sleep(60)"
    )
    children = [
        Child(name, [sys.executable, "-c", script, name], tmp_path / name / "console.log") for name in ("node", "hub")
    ]
    supervisor = Supervisor(said.append, recorded.append)
    for child in children:
        supervisor.start(child)
        until(lambda child=child: "up" in child.last_words())
    supervisor.watch()
    first = children[1].process
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    again = until(lambda: (now := children[1].process) is not None and now.pid != first.pid and now)
    assert "The hub ended with signal 9; it is started again in 0.5 s." in said
    until(lambda: "up" in children[1].last_words())
    assert [process.name for process in recorded[-1]] == ["node", "hub"]
    assert recorded[-1][1].pid == again.pid
    started = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - started < 5
    assert stamp.read_text().split() == ["hub", "node"]
    assert recorded[-1] == []


def test_the_console_of_a_child_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autovibe.cli.supervise.CONSOLE_LIMIT_BYTES", 1000)
    child = Child("hub", [], tmp_path / "console.log")
    child.console.write_bytes(b"x" * 2000)
    child.trim()
    assert child.console.stat().st_size == 0


def test_tail_reads_the_end_of_a_long_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"{number} \xe4\n" for number in range(100_000)))
    assert tail(log, 2) == "99998 \xe4\n99999 \xe4"
    assert tail(tmp_path / "none") == ""


# Ports and programs


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def test_up_names_the_port_that_is_in_use(taken: int) -> None:
    settings = load(hub_port=taken)
    with pytest.raises(ConfigurationError, match=rf"Port {taken} .* --port"):
        prepare.require_ports(settings)
    with pytest.raises(ConfigurationError, match="--node-port"):
        prepare.require_ports(load(hub_port=_free(), node_port=taken))


def _free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_missing_programs_come_with_the_apt_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="sudo apt-get install -y --no-install-recommends no-such-package"):
        prepare.require_programs({"no-such-program": "no-such-package", "sh": "dash"}, "This")
    prepare.require_programs({"sh": "dash"}, "This")


def test_doctor_fails_on_a_taken_port_and_says_what_to_do(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOVIBE_HUB_PORT", str(taken))
    monkeypatch.setenv("AUTOVIBE_NODE_PORT", str(_free()))
    found = json.loads(run("doctor", "--json", status=7).stdout)
    checks = {check["name"]: check for check in found["checks"]}
    assert not found["ok"]
    assert checks[f"port {taken}"]["status"] == "fail"
    assert "--port" in checks[f"port {taken}"]["remedy"]
    assert {"installation", "home", "disk", "open files", "image", "qemu", "accelerator", "hub"} <= set(checks)
    monkeypatch.setenv("AUTOVIBE_HUB_PORT", str(_free()))
    assert json.loads(run("doctor", "--json").stdout)["ok"]
    assert "warn" in run("doctor").stdout


def test_doctor_on_a_proxmox_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOVIBE_PROXMOX_URL", f"https://127.0.0.1:{_free()}")
    monkeypatch.setenv("AUTOVIBE_PROXMOX_TOKEN", SECRET)
    monkeypatch.setenv("AUTOVIBE_HUB_PORT", str(_free()))
    result = run("doctor", "--json", status=7)
    proxmox = next(check for check in json.loads(result.stdout)["checks"] if check["name"] == "proxmox")
    assert proxmox["status"] == "fail"
    assert SECRET.partition("=")[2] not in result.output


def test_down_and_status_on_a_home_where_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOVIBE_HUB_PORT", str(_free()))
    assert json.loads(run("down", "--json").stdout) == {"was_running": False, "terminated": [], "running_vmids": []}
    found = json.loads(run("status", "--json", status=6).stdout)
    assert (found["hub"]["pid"], found["hub"]["health"]) == (None, "unreachable")
    assert (found["node"]["name"], found["node"]["storage"]) == ("autovibe", "local-lvm")
    assert "start it" in run("down", "--machines", status=6).stderr


# Privileges on a real Proxmox


def test_privileges_are_inherited_as_proxmox_does() -> None:
    listed = {"/": {"VM.Audit": 1, "Sys.Audit": 0}, "/vms": {"VM.Clone": 1}, "/storage": {"Datastore.Audit": 1, "X": 0}}
    assert checks_proxmox.held_on("/vms", listed) == {"VM.Clone"}
    assert checks_proxmox.held_on("/vms/100", listed) == {"VM.Clone"}
    assert checks_proxmox.held_on("/storage/local", listed) == {"Datastore.Audit"}
    assert checks_proxmox.held_on("/nodes/pve", listed) == {"VM.Audit"}
    assert checks_proxmox.held_on("/nodes/pve", {}) == set()


def test_what_is_needed_follows_the_settings() -> None:
    needed = checks_proxmox.needed(load(proxmox_storage="ceph", proxmox_import_storage="local", proxmox_pool="agents"))
    assert set(needed) == {
        "/vms",
        "/storage/ceph",
        "/storage/local",
        "/sdn/zones/localnetwork/vmbr0",
        "/nodes/autovibe",
        "/pool/agents",
    }
    one = checks_proxmox.needed(load(proxmox_storage="local", proxmox_import_storage="local"))
    assert set(one["/storage/local"]) == {
        "Datastore.Allocate",
        "Datastore.AllocateSpace",
        "Datastore.AllocateTemplate",
        "Datastore.Audit",
    }


def test_the_line_that_grants(tmp_path: Path) -> None:
    line = checks_proxmox.grant_line("/vms", ["VM.Clone", "VM.Audit"], "hub@pve!autovibe")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "pveum").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    (programs / "pveum").chmod(0o755)
    subprocess.run(["bash", "-c", line], env={"PATH": f"{programs}:/bin:/usr/bin"}, check=True)
    assert (tmp_path / "calls").read_text().splitlines() == [
        "role add AutovibeVms",
        "role modify AutovibeVms --append 1 --privs VM.Clone,VM.Audit",
        "acl modify /vms --users hub@pve --tokens hub@pve!autovibe --roles AutovibeVms",
    ]


# The demo's scripts


def test_the_demos_scripts_do_what_its_diff_expects(tmp_path: Path) -> None:
    """They run here as in a guest, with /workspace elsewhere."""

    def script(text: str) -> str:
        return text.replace("/workspace", str(tmp_path / "workspace"))

    def bash(text: str) -> str:
        done = subprocess.run(["bash", "-c", script(text)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    bash(demo_texts.PROMPT)
    assert "OK" in bash(demo_texts.PROOF)
    before = {path for path in (tmp_path / "workspace").rglob("*") if path.is_file()}
    assert bash(demo_texts.CHANGES) == "Goodbye, Proxmox.\n"
    after = {path for path in (tmp_path / "workspace").rglob("*") if path.is_file()}
    names = {script(path): kind for path, kind in demo_texts.EXPECTED.items()}
    assert {str(path) for path in after - before} == {name for name, kind in names.items() if kind == "added"}
    assert {str(path) for path in before - after} == {name for name, kind in names.items() if kind == "deleted"}
    failed = subprocess.run(["bash", "-c", script(demo_texts.PROOF)], capture_output=True, check=False)
    assert failed.returncode != 0


# What a stranger meets


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert load(hub_host="::1", hub_port=8080).hub_url == "http://[::1]:8080"


def test_force_builds_an_image_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, asked = tmp_path / "image.qcow2", []
    monkeypatch.setattr("autovibe.images.built", lambda *_: image)
    monkeypatch.setattr("autovibe.images.build", lambda *_, **options: asked.append(options["force"]) or image)
    assert prepare.build_image(load(), lambda *_: None) == image
    assert not asked
    assert prepare.build_image(load(), lambda *_: None, force=True) == image
    assert asked == [True]


def test_a_home_that_cannot_be_is_a_message_and_never_status_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "choose another with --home" in run("up", "--home", str(tmp_path / "file" / "home"), status=2).stderr
