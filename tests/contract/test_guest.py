"""Guests over real SSH: the stub's local sshd, whose commands run in bubblewrap on a directory tree of its own."""

from __future__ import annotations

import getpass
import hashlib
import os
import stat
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast
from urllib.parse import quote

import pytest

from autovibe.errors import GuestCommandFailed, GuestUnreachable, InvalidRequest, LimitExceeded, NotFound, NotYet
from autovibe.guest import (
    Address,
    File,
    Guests,
    Result,
    Script,
    agent,
    brake,
    checked_path,
    fingerprint,
    generate_key,
    identity,
    scan,
)
from autovibe.node.vm.qemu import forward_address
from tests.stub.node import free_port
from tests.stub.qemu import StubQemu, make_base_tree

PORT = free_port()  # each worker of the suite has its own
VMIDS = iter(range(24100, 24199))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guest")


@pytest.fixture(scope="module")
def guests(home: Path) -> Iterator[Guests]:
    pool = Guests(home / "key")
    yield pool
    pool.close()


class Machine:
    def __init__(self, qemu: StubQemu, vmid: int, tree: Path, address: Address) -> None:
        self.qemu, self.vmid, self.tree, self.address = qemu, vmid, tree, address


def boot(home: Path, guests: Guests, vmid: int) -> Machine:
    qemu = StubQemu(home / "stub", forward_port=PORT)
    tree = home / f"tree-{vmid}"
    if not tree.exists():
        make_base_tree(tree)
    qemu.start(vmid, {"name": f"m{vmid}", "sshkeys": quote(guests.public_key, safe="")}, {"scsi0": tree})
    host, user = forward_address(vmid), getpass.getuser()
    return Machine(qemu, vmid, tree, Address(host, PORT, user, reach(guests, host, user)))


def reach(guests: Guests, host: str, user: str) -> str:
    end = time.monotonic() + 20
    while True:
        try:
            return guests.reach(host, PORT, user)
        except NotYet:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


@pytest.fixture(scope="module")
def machine(home: Path, guests: Guests) -> Iterator[Machine]:
    found = boot(home, guests, next(VMIDS))
    yield found
    found.qemu.stop(found.vmid)


@pytest.fixture
def own_machine(home: Path, guests: Guests) -> Iterator[Machine]:
    found = boot(home, guests, next(VMIDS))
    yield found
    found.qemu.stop(found.vmid)


# exec


def test_an_argv_arrives_as_it_was_given(guests: Guests, machine: Machine) -> None:
    words = ["", "a b", "it's", '"$HOME"', "$(id)", "`id`", "*", "\n", "a\\b", "ü☃", "-n", ";ls", "!x"]
    result = guests.exec(machine.address, ["printf", "%s\\0", *words])
    assert result.exit_status == 0
    assert result.stdout.decode().split("\0")[:-1] == words
    assert result.stderr == b""


def test_environment_directory_and_input(guests: Guests, machine: Machine) -> None:
    result = guests.exec(
        machine.address,
        ["sh", "-c", 'pwd; printf %s "$A_B"; cat'],
        cwd="/workspace",
        env={"A_B": "it's $x\n"},
        input=b"in\0put",
    )
    assert result.stdout == b"/workspace\nit's $x\nin\0put"
    assert guests.exec(machine.address, ["A=b"], env={"X": "1"}).exit_status == 127
    assert guests.exec(machine.address, ["true"], cwd="/no/such").exit_status != 0


def test_a_script_is_bash(guests: Guests, machine: Machine) -> None:
    result = guests.exec(machine.address, Script("a=(1 2 3)\necho ${#a[@]} 'q'\nexit 7"))
    assert (result.exit_status, result.stdout) == (7, b"3 q\n")


@pytest.mark.parametrize(
    "order",
    [
        {"argv": []},
        {"argv": [""]},
        {"argv": ["a\0b"]},
        {"argv": ["x" * 200_000]},
        {"argv": ["true"], "env": {"A-B": "1"}},
        {"argv": ["true"], "env": {"LD=1": "1"}},
        {"argv": ["true"], "cwd": "tmp"},
        {"argv": ["true"], "user": "root; id"},
        {"argv": ["true"], "timeout_seconds": 0},
        {"argv": ["true"], "timeout_seconds": float("nan")},
        {"argv": ["true"], "timeout_seconds": float("inf")},
    ],
)
def test_what_no_command_can_be_is_refused(guests: Guests, machine: Machine, order: dict) -> None:
    with pytest.raises(InvalidRequest):
        guests.exec(machine.address, **order)


def test_exit_statuses_and_signals(guests: Guests, machine: Machine) -> None:
    assert guests.exec(machine.address, ["no-such-command"]).exit_status == 127
    assert guests.exec(machine.address, ["/etc"]).exit_status == 126
    assert guests.exec(machine.address, ["sh", "-c", "exit 255"]).exit_status == 255
    assert guests.exec(machine.address, ["sh", "-c", "kill -SEGV $$"]).exit_status == 139


def test_output_is_kept_to_the_limit_and_the_rest_is_read(guests: Guests, machine: Machine) -> None:
    argv = ["sh", "-c", "head -c 9000000 /dev/zero; head -c 9000000 /dev/zero >&2; exit 4"]
    result = guests.exec(machine.address, argv, output_limit=1000)
    assert (result.exit_status, result.truncated) == (4, True)
    assert len(result.stdout) == len(result.stderr) == 1000


def test_large_input_and_output_do_not_wait_for_each_other(guests: Guests, machine: Machine) -> None:
    data = os.urandom(1 << 20) * 6
    assert guests.exec(machine.address, ["cat"], input=data, output_limit=1 << 24).stdout == data
    assert guests.exec(machine.address, ["head", "-c", "1"], input=data).stdout == data[:1]


def is_gone(process: Path) -> None:
    end = time.monotonic() + 10
    while process.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not process.exists()


@pytest.mark.parametrize("ignores", ["", "trap '' TERM;"])
def test_the_time_out_ends_the_whole_process_group(guests: Guests, machine: Machine, ignores: str) -> None:
    began = time.monotonic()
    script = f"{ignores} echo out; sh -c '{ignores} echo $$ > /tmp/child; while :; do sleep 0.1; done' & wait; sleep 60"
    result = guests.exec(machine.address, ["sh", "-c", script], timeout_seconds=1.2)
    assert (result.exit_status, result.stdout) == (124, b"out\n")
    assert 1.2 <= time.monotonic() - began < 8
    is_gone(Path("/proc", (machine.tree / "tmp/child").read_text().strip()))


def test_a_command_is_ended_although_the_hub_died(home: Path, guests: Guests, machine: Machine) -> None:
    other = Guests(home / "key")
    script = "echo $$ > /tmp/orphan; sleep 60"

    def order() -> None:
        with pytest.raises(GuestUnreachable):
            other.exec(machine.address, ["sh", "-c", script], timeout_seconds=3)

    thread = threading.Thread(target=order)
    thread.start()
    time.sleep(1.8)  # the guard is up after a second
    other.close()
    thread.join(20)
    orphan = Path("/proc", (machine.tree / "tmp/orphan").read_text().strip())
    assert orphan.exists()
    is_gone(orphan)


def test_what_a_command_leaves_behind_is_not_waited_for(guests: Guests, machine: Machine) -> None:
    began = time.monotonic()
    result = guests.exec(machine.address, ["sh", "-c", "sleep 30 & echo left"], timeout_seconds=20)
    assert (result.exit_status, result.stdout) == (0, b"left\n")
    assert time.monotonic() - began < 5


def test_streaming_tells_pieces_as_they_come(guests: Guests, machine: Machine) -> None:
    argv = ["sh", "-c", "echo one; sleep 0.6; echo two >&2; exit 3"]
    seen = [(name, piece, time.monotonic()) for name, piece in guests.stream(machine.address, argv)]
    assert [item[:2] for item in seen] == [("stdout", b"one\n"), ("stderr", b"two\n"), ("exit", b"3")]
    assert seen[1][2] - seen[0][2] > 0.4


def test_a_stream_can_be_left(guests: Guests, machine: Machine) -> None:
    stream = guests.stream(machine.address, ["yes"])
    assert next(stream)[0] == "stdout"
    stream.close()
    assert guests.exec(machine.address, ["true"]).exit_status == 0


# The pool


def test_many_commands_at_once(guests: Guests, machine: Machine) -> None:
    with ThreadPoolExecutor(24) as pool:
        results = list(
            pool.map(lambda n: guests.exec(machine.address, ["sh", "-c", f"sleep 0.3; echo {n}"]), range(48))
        )
    assert [int(result.stdout) for result in results] == list(range(48))


def test_who_finds_every_channel_taken_waits_for_one_and_is_told_when_none_comes(
    home: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autovibe.guest.pool._MOST_LINKS", 1)
    pool = Guests(home / "key")
    with ThreadPoolExecutor(4) as threads:
        slow = [threads.submit(pool.exec, machine.address, ["sleep", "1.5"]) for _ in range(4)]
        time.sleep(0.7)
        with pytest.raises(LimitExceeded, match="runs 4 commands"):
            pool.exec(machine.address, ["true"], timeout_seconds=0.2)
        assert pool.exec(machine.address, ["true"]).exit_status == 0
        assert [one.result().exit_status for one in slow] == [0] * 4
    pool.close()


def test_while_a_guest_is_held_others_wait(home: Path, machine: Machine) -> None:
    pool = Guests(home / "key")
    pool.pin(machine.address, 60)
    with pytest.raises(LimitExceeded, match="held still"):
        pool.exec(machine.address, ["true"], timeout_seconds=0.2)
    assert pool.exec(machine.address, ["true"], is_holder=True).exit_status == 0
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(pool.exec, machine.address, ["true"])
        time.sleep(0.2)
        assert not other.done()
        pool.unpin(machine.address)
        assert other.result(10).exit_status == 0
    pool.pin(machine.address, 0.1)  # a holder that never came back
    assert pool.exec(machine.address, ["true"], timeout_seconds=10).exit_status == 0
    pool.close()


def test_another_host_key_is_refused_by_name(home: Path, guests: Guests, machine: Machine) -> None:
    wrong = generate_key(home / "other").rsplit(" ", 1)[0]
    with pytest.raises(GuestUnreachable) as error:
        guests.exec(machine.address.with_key(wrong), ["true"])
    assert fingerprint(wrong) in error.value.message
    assert fingerprint(machine.address.host_key) in error.value.message


def test_a_lost_connection_is_replaced_before_a_command_and_told_during_one(
    guests: Guests, own_machine: Machine, home: Path
) -> None:
    address = own_machine.address
    assert guests.exec(address, ["true"]).exit_status == 0
    own_machine.qemu.stop(own_machine.vmid)
    with pytest.raises(GuestUnreachable):
        guests.exec(address, ["true"])
    again = boot(home, guests, own_machine.vmid)
    assert again.address == address
    assert guests.exec(address, ["true"]).exit_status == 0
    threading.Timer(0.5, own_machine.qemu.stop, [own_machine.vmid]).start()
    with pytest.raises(GuestUnreachable, match="lost while"):
        guests.exec(address, ["sleep", "10"])


def test_reaching_nobody_is_not_yet_and_a_refused_key_ends(home: Path, machine: Machine, monkeypatch) -> None:
    stranger = Guests(home / "stranger")
    with pytest.raises(NotYet):
        stranger.reach("127.9.9.9", PORT, "agent")
    with pytest.raises(NotYet, match="key"):
        stranger.reach(machine.address.host, PORT, machine.address.user)
    monkeypatch.setattr("autovibe.guest.pool._REFUSAL_SECONDS", 0)
    with pytest.raises(GuestUnreachable, match="refuses"):
        stranger.reach(machine.address.host, PORT, machine.address.user)
    stranger.close()


def test_idle_connections_are_closed(home: Path, guests: Guests, machine: Machine) -> None:
    pool = Guests(home / "key")
    pool.exec(machine.address, ["true"])
    (link,) = pool._links[machine.address]
    pool.close_idle()
    assert link.is_alive
    pool.close_idle(0)
    assert not link.is_alive
    assert pool.exec(machine.address, ["true"]).exit_status == 0
    pool.close()


def test_a_key_is_made_once_and_private(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        lines = set(pool.map(lambda _: generate_key(tmp_path / "ssh/key"), range(8)))
    assert len(lines) == 1
    assert stat.S_IMODE((tmp_path / "ssh/key").stat().st_mode) == 0o600
    assert sorted(path.name for path in (tmp_path / "ssh").iterdir()) == ["key", "key.pub"]
    told = subprocess.run(
        ["ssh-keygen", "-lf", str(tmp_path / "ssh/key.pub")], capture_output=True, text=True, check=True
    )
    assert fingerprint(lines.pop()) in told.stdout


# Files


def test_pushed_files_have_content_mode_and_owner(guests: Guests, machine: Machine) -> None:
    content = os.urandom(300_000)
    guests.push(
        machine.address,
        [
            File("/workspace/new/deep/a b'ü.bin", content),
            File("/workspace/run.sh", b"#!/bin/sh\n", mode=0o4755, owner=getpass.getuser()),
            File("/workspace/empty", b""),
        ],
    )
    assert guests.pull(machine.address, "/workspace/new/deep/a b'ü.bin") == content
    assert stat.S_IMODE((machine.tree / "workspace/run.sh").stat().st_mode) == 0o4755
    assert stat.S_IMODE((machine.tree / "workspace/empty").stat().st_mode) == 0o644
    (machine.tree / "workspace/empty").chmod(0o640)
    guests.push(machine.address, [File("/workspace/empty", b"1"), File("/workspace/run.sh", None)])
    assert stat.S_IMODE((machine.tree / "workspace/empty").stat().st_mode) == 0o640
    assert not (machine.tree / "workspace/run.sh").exists()
    guests.push(machine.address, [File("/workspace/run.sh", None), File("/no/such/dir/x", None)])
    assert not (machine.tree / "no").exists()


@pytest.mark.parametrize(
    "path", ["etc/x", "/a/../b", "/a/./b", "//a", "/a//b", "/a/", "/", "", "/a\0b", "/" + "x" * 300, "/x" * 2100]
)
def test_paths_that_cannot_be_are_refused(guests: Guests, machine: Machine, path: str) -> None:
    with pytest.raises(InvalidRequest):
        checked_path(path)
    with pytest.raises(InvalidRequest):
        guests.push(machine.address, [File(path, b"x")])


def test_a_push_is_all_or_nothing(guests: Guests, machine: Machine) -> None:
    (machine.tree / "workspace/there").mkdir(exist_ok=True)
    (machine.tree / "workspace/kept").write_text("kept")
    before = sorted(str(path) for path in (machine.tree / "workspace").rglob("*"))
    orders = [
        [File("/workspace/kept", b"lost"), File("/workspace/n/e/w", b"x"), File("/workspace/there", b"x")],
        [File("/workspace/kept", None), File("/workspace/x", b"x", owner="nobody-such")],
        [File("/workspace/kept", None), File("/workspace/kept/below", b"x")],
    ]
    for order in orders:
        with pytest.raises(GuestCommandFailed, match="/workspace"):
            guests.push(machine.address, order)
        assert sorted(str(path) for path in (machine.tree / "workspace").rglob("*")) == before
        assert (machine.tree / "workspace/kept").read_text() == "kept"
    with pytest.raises(InvalidRequest, match="twice"):
        guests.push(machine.address, [File("/workspace/x", b"1"), File("/workspace/x", b"2")])


def test_links_that_a_user_can_have_made_lead_nowhere(guests: Guests, machine: Machine) -> None:
    work = machine.tree / "workspace"
    work.chmod(0o777)
    (work / "trap").symlink_to("/etc")
    (work / "to-file").symlink_to("/etc/hosts")
    hosts = (machine.tree / "etc/hosts").read_text()
    with pytest.raises(GuestCommandFailed, match="link"):
        guests.push(machine.address, [File("/workspace/trap/shadowed", b"x")])
    assert not (machine.tree / "etc/shadowed").exists()
    guests.push(machine.address, [File("/workspace/to-file", b"own")])  # replaces the link itself
    assert (machine.tree / "etc/hosts").read_text() == hosts
    assert (work / "to-file").read_text() == "own"
    (machine.tree / "opt/real").mkdir()
    (machine.tree / "opt/link").symlink_to("real")
    guests.push(machine.address, [File("/opt/link/through", b"system link")])
    assert (machine.tree / "opt/real/through").read_text() == "system link"


def test_pull_takes_regular_files_up_to_the_limit(guests: Guests, machine: Machine) -> None:
    os.mkfifo(machine.tree / "workspace/fifo")
    (machine.tree / "workspace/ten").write_bytes(b"0123456789")
    assert guests.pull(machine.address, "/workspace/ten", 10) == b"0123456789"
    with pytest.raises(InvalidRequest, match="larger"):
        guests.pull(machine.address, "/workspace/ten", 9)
    for path in ("/workspace/fifo", "/workspace", "/workspace/none", "/dev/zero"):
        with pytest.raises(NotFound):
            guests.pull(machine.address, path)


# Identity and agent


def test_identify_once_an_instance(guests: Guests, own_machine: Machine) -> None:
    tree, address = own_machine.tree, own_machine.address
    before = (Path("/etc/hostname").read_text(), os.uname().nodename)
    assert identity.identify(guests, address, "first", machine_uuid="one") == address.host_key
    assert (tree / "etc/hostname").read_text() == "first\n"
    assert "127.0.1.1 first\n" in (tree / "etc/hosts").read_text()
    machine_id = (tree / "etc/machine-id").read_text()
    assert len(machine_id) == 33
    identity.identify(guests, address, "first", machine_uuid="one")
    assert (tree / "etc/machine-id").read_text() == machine_id
    identity.identify(guests, address, "second", machine_uuid="two")
    assert (tree / "etc/machine-id").read_text() != machine_id
    assert (tree / "etc/hosts").read_text().count("127.0.1.1") == 1
    assert (Path("/etc/hostname").read_text(), os.uname().nodename) == before


def run_agent(guests: Guests, address: Address, script: str, uuid: str) -> None:
    command = ["/bin/sh", "-c", 'exec /bin/bash -- "$AUTOVIBE_PROMPT"']
    agent.start(guests, address, machine_uuid=uuid, command=command, prompt=script, env={"GREETING": "hi 'x"})


def ended(guests: Guests, address: Address) -> agent.AgentState:
    end = time.monotonic() + 20
    while (state := agent.poll(guests, address)).is_running and time.monotonic() < end:
        time.sleep(0.05)
    return state


def test_the_agent_runs_once_and_its_end_is_recorded(guests: Guests, own_machine: Machine) -> None:
    address = own_machine.address
    assert not agent.poll(guests, address).was_started
    script = 'echo run >> runs; echo "$GREETING in $PWD"; sleep 0.8; echo end >&2; exit 5\n'
    run_agent(guests, address, script, "one")
    state = agent.poll(guests, address)
    assert (state.is_running, state.exit_status) == (True, None)
    run_agent(guests, address, script, "one")
    state = ended(guests, address)
    assert (state.is_running, state.exit_status) == (False, 5)
    assert state.output == b"hi 'x in /workspace\nend\n"
    assert agent.poll(guests, address, 3, 4).output == state.output[3:7]
    assert agent.poll(guests, address, state.output_size).output == b""
    run_agent(guests, address, script, "one")
    assert (own_machine.tree / "workspace/runs").read_text() == "run\n"
    assert agent.poll(guests, address).exit_status == 5


def test_an_agent_that_is_stopped_and_followed_by_another(guests: Guests, own_machine: Machine) -> None:
    address = own_machine.address
    run_agent(guests, address, "sleep 2", "one")
    agent.stop(guests, address)
    assert not ended(guests, address).is_running
    run_agent(guests, address, "echo second", "two")
    state = ended(guests, address)
    assert (state.exit_status, state.output) == (0, b"second\n")


# Scan


def everything(guests: Guests, machine: Machine, **options: bool) -> dict[bytes, scan.Entry]:
    return {entry.path: entry for entry in scan.scan(guests, machine.address, scan.WORKSPACE, **options)}


def test_a_scan_lists_what_the_profile_covers(guests: Guests, own_machine: Machine) -> None:
    tree = own_machine.tree
    work = tree / "workspace"
    (work / "b").mkdir()
    (work / "b/z").write_bytes(b"z" * 100_000)
    (work / "b-").write_bytes(b"sorts between b and b/z as text, after b as a name")
    (work / "b/link").symlink_to("../nowhere")
    os.mkfifo(work / "fifo")
    (work / "secret").write_text("s")
    (work / "secret").chmod(0o600)
    os.makedirs(work / "__pycache__/deep")
    Path(os.fsdecode(os.fsencode(work) + b"/\xff\xfe")).write_bytes(b"no utf-8")
    (tree / "home/agent/.cache").mkdir(parents=True)
    (tree / "etc/kept").write_text("kept")
    found = everything(guests, own_machine)
    assert found[b"/workspace/b/z"].size == 100_000
    assert found[b"/workspace/b/z"].digest == hashlib.sha256(b"z" * 100_000).digest()
    assert found[b"/workspace/b/link"].target == b"../nowhere"
    assert found[b"/workspace/fifo"].kind == "p"
    assert found[b"/workspace/secret"].mode == 0o600
    assert found[b"/workspace/\xff\xfe"].size == 8
    assert found[b"/usr"].kind == "d"
    assert found[b"/etc/kept"].size == 4
    for path in (b"/workspace/__pycache__", b"/etc/hostname", b"/etc/machine-id", b"/home/agent/.cache", b"/usr/bin"):
        assert path not in found
    order = [path.split(b"/") for path in found]
    assert order == sorted(order)


def test_the_index_is_used_and_never_wrong(guests: Guests, own_machine: Machine) -> None:
    file = own_machine.tree / "workspace/file"
    file.write_bytes(b"one")
    first = everything(guests, own_machine)[b"/workspace/file"]
    file.write_bytes(b"two")  # same size, within the grain of the clock
    os.utime(file, ns=(first.mtime_ns, first.mtime_ns))
    second = everything(guests, own_machine)[b"/workspace/file"]
    assert second.mtime_ns == first.mtime_ns
    assert second.digest != first.digest
    index = own_machine.tree / "var/lib/autovibe/scan-index"
    assert stat.S_IMODE(index.stat().st_mode) == 0o600
    time.sleep(2.2)
    before = everything(guests, own_machine)
    index.write_bytes(index.read_bytes().replace(second.digest, bytes(32)))
    assert everything(guests, own_machine) == before  # a damaged index counts for nothing
    assert everything(guests, own_machine, full=True) == before


def test_an_unchanged_file_is_not_read_again(guests: Guests, own_machine: Machine) -> None:
    big = own_machine.tree / "workspace/big"
    with big.open("wb") as file:
        file.truncate(1 << 30)
    time.sleep(2.2)
    began = time.monotonic()
    first = everything(guests, own_machine)
    middle = time.monotonic()
    assert everything(guests, own_machine) == first
    assert time.monotonic() - middle < (middle - began) / 2


ENDED = (b".", 0, b"", b"", b'{"entries":%d}')
DEEP = b"[" * 60_000


def stream_of(*records: tuple[bytes, int, bytes, bytes, bytes], count: int | None = None) -> bytes:
    """What a guest may send: (kind, mode, path, digest, target) each."""
    body = b""
    for kind, mode, path, digest, target in records:
        text = target % (len(records) - 1 if count is None else count) if kind == b"." else target
        body += scan._HEAD.pack(kind, mode, 0, 0, 0, 0, len(path), len(digest), len(text)) + path + digest + text
    return scan.MAGIC + zlib.compress(body)


def parsed(data: bytes, step: int = 1 << 16) -> list[bytes]:
    reader = scan._Reader(Address("127.0.0.1", 22, "agent", "k"), scan.WORKSPACE)
    found = [entry.path for at in range(0, len(data), step) for entry in reader.feed(data[at : at + step])]
    reader.finish()
    return found


FOLDER = (b"d", 0o755, b"/workspace", b"", b"")
ENTRY = (b"f", 0o644, b"/workspace/f", bytes(32), b"")


def test_a_stream_is_read_in_pieces_of_any_size() -> None:
    data = stream_of((b"d", 0o755, b"/usr", b"", b""), (b"d", 0o755, b"/usr/local", b"", b""), FOLDER, ENTRY, ENDED)
    for step in (1, 2, 7, 1000):
        assert parsed(data, step) == [b"/usr", b"/usr/local", b"/workspace", b"/workspace/f"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello, this is no scan at all",
        scan.MAGIC + b"not zlib",
        stream_of(FOLDER, ENTRY),
        stream_of(FOLDER, ENTRY, ENDED, count=1),
        scan.MAGIC + zlib.compress(scan._HEAD.pack(b".", 0, 0, 0, 0, 0, 0, 0, len(DEEP)) + DEEP),
        stream_of(FOLDER, ENTRY, ENDED)[:-8],
        stream_of(FOLDER, ENTRY, ENDED, ENTRY),
        stream_of(FOLDER, ENTRY, ENDED) + b"more",
        stream_of(ENTRY, FOLDER, ENDED),
        stream_of(FOLDER, ENTRY, ENTRY, ENDED),
        stream_of(FOLDER, (b"f", 0, b"/workspace/no/parent", b"", b""), ENDED),
        stream_of(FOLDER, (b"x", 0, b"/workspace/f", b"", b""), ENDED),
        stream_of(FOLDER, (b"f", 0o70000, b"/workspace/f", b"", b""), ENDED),
        stream_of(FOLDER, (b"f", 0, b"/workspace/f", b"short", b""), ENDED),
        stream_of(FOLDER, (b"l", 0, b"/workspace/f", bytes(32), b"x"), ENDED),
        stream_of(FOLDER, (b"f", 0, b"/workspace/f", b"", b"target"), ENDED),
        stream_of(FOLDER, (b"f", 0, b"/workspace/../etc/x", b"", b""), ENDED),
        stream_of(FOLDER, (b"f", 0, b"/workspace/a\0b", b"", b""), ENDED),
        stream_of(FOLDER, (b"f", 0, b"/workspace//b", b"", b""), ENDED),
        stream_of(FOLDER, (b"f", 0, b"workspace/b", b"", b""), ENDED),
        stream_of((b"d", 0, b"/var", b"", b""), ENDED),
        stream_of((b"d", 0, b"/", b"", b""), ENDED),
        stream_of(FOLDER, (b".", 0, b"", b"", b"[%d]")),
        stream_of(FOLDER, (b".", 0, b"", b"", b"{%d")),
    ],
)
def test_a_hostile_stream_is_refused(data: bytes) -> None:
    with pytest.raises(GuestCommandFailed, match="no valid scan"):
        parsed(data)


@pytest.mark.parametrize(
    "said", [b"[" * 60_000, b"\xff", b"[]", b'{"host_key":"ssh-ed25519 AAAA\\n* ssh-ed25519 BBBB"}']
)
def test_a_hostile_answer_is_refused(said: bytes) -> None:
    class Hostile:
        def exec(self, *_: object, **__: object) -> Result:
            return Result(0, said, b"", False, 1)

    with pytest.raises(GuestCommandFailed):
        identity.identify(cast(Guests, Hostile()), Address("127.0.0.1", 22, "agent", "k"), "m", machine_uuid="u")


def test_a_scan_that_fails_says_so(guests: Guests, own_machine: Machine) -> None:
    broken = scan.Profile("broken", ("/workspace",), (), index="/proc/none/index")
    with pytest.raises(GuestCommandFailed, match="scan"):
        list(scan.scan(guests, own_machine.address, broken))


def test_hold_and_release_and_the_watchdog(guests: Guests, own_machine: Machine) -> None:
    address = own_machine.address
    scan.hold(guests, address, token="a", watchdog_seconds=60)
    scan.hold(guests, address, token="a", watchdog_seconds=60)
    assert guests.exec(address, ["true"], is_holder=True).exit_status == 0
    assert scan.release(guests, address, "a")
    assert not scan.release(guests, address, "a")
    scan.hold(guests, address, token="b", watchdog_seconds=0.3)
    time.sleep(1)
    assert not scan.release(guests, address, "b")
    scan.hold(guests, address, token="c", watchdog_seconds=60)
    scan.hold(guests, address, token="d", watchdog_seconds=60)  # of another Hub, after the first one died
    assert not scan.release(guests, address, "c")
    assert scan.release(guests, address, "d")


def test_a_hold_for_good_has_no_watchdog_and_is_checked_as_often_as_wanted(
    guests: Guests, own_machine: Machine
) -> None:
    address = own_machine.address
    scan.hold(guests, address, token="e", watchdog_seconds=None)
    assert scan.check(guests, address, "e")
    assert scan.check(guests, address, "e")
    assert not scan.check(guests, address, "f")
    guests.forget(address)  # as after a restart of the VM; a new connection is let in
    assert scan.check(guests, address, "e")
    assert scan.release(guests, address, "e")
    assert not scan.check(guests, address, "e")


def test_a_brake_freezes_at_a_word_and_not_without_one(
    guests: Guests, own_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = own_machine.address
    monkeypatch.setattr(agent, "FREEZER", "/workspace/freezer")
    left = brake.ready(guests, address)
    left.close()
    assert not left.pull(1.0)
    assert guests.exec(address, ["test", "-e", "/workspace/freezer"]).exit_status == 1
    pulled = brake.ready(guests, address)
    assert pulled.is_ready
    assert pulled.pull(20.0)
    assert not pulled.is_ready
    assert guests.pull(address, "/workspace/freezer") == b"1\n"
    monkeypatch.setattr(agent, "FREEZER", "/proc/none/freezer")
    assert not brake.ready(guests, address).pull(20.0)
    agent.freeze(guests, address, timeout_seconds=30)  # where there is nothing to freeze nothing is done
