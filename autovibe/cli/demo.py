"""autovibe demo: everything once, on real virtual machines, from an empty home to nothing left running."""

from __future__ import annotations

import secrets
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autovibe.cli import connection, demo_texts, leftovers, output, prepare, progress
from autovibe.cli.diff import lines as diff_lines
from autovibe.cli.exits import INTERRUPTED, exit_status
from autovibe.cli.output import Json
from autovibe.cli.processes import Claim, tail
from autovibe.cli.steps import Steps
from autovibe.cli.up import Home
from autovibe.errors import AutovibeError, OperationFailed

if TYPE_CHECKING:
    from autovibe import schemas
    from autovibe.sdk import Client
    from autovibe.settings import Settings

UP = "Bring up the node and the Hub"
PROJECT = "Create a project with its genesis checkpoint"
SPAWN = "Spawn a machine from genesis"
PROMPT = "Let it run the prompt: a git repository with a test"
CHECKPOINT_A = "Checkpoint A"
CHANGE = "Change files with exec"
CHECKPOINT_B = "Checkpoint B"
DIFF = "Compare A and B"
BRANCH = "Spawn a second machine from A, meanwhile"
PROOF = "Prove it has A's files and none of B's"
TERMINATE = "Terminate both machines"
DOWN = "Stop what was started"
TITLES = [UP, PROJECT, SPAWN, PROMPT, CHECKPOINT_A, CHANGE, CHECKPOINT_B, DIFF, BRANCH, PROOF, TERMINATE, DOWN]

CLEAN_UP_SECONDS = 120


@dataclass
class Made:
    """What the demo has made so far, so that its end can be told and undone whatever happened."""

    project: schemas.Project | None = None
    machines: list[schemas.Machine] = field(default_factory=list)
    checkpoints: dict[str, schemas.Checkpoint] = field(default_factory=dict)
    diff: schemas.Diff | None = None


def demo(
    home: Home = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The Hub's port.")] = None,
    node_port: Annotated[int | None, typer.Option(min=1, max=65534, help="The node's port.")] = None,
    json: Json = False,
) -> None:
    """Show everything once: spawn, prompt, checkpoint, diff, branch, terminate. Takes a few minutes the first time."""
    settings = _with_free_ports(connection.own_settings(home=home, hub_port=port, node_port=node_port))
    prepare.require_extras(settings)
    claim = Claim(settings.home)
    is_ours = claim.take()
    vms_before = leftovers.running_vms(settings)
    made, steps = Made(), Steps(TITLES, is_silent=json)
    failure: AutovibeError | KeyboardInterrupt | None = None
    signal.signal(signal.SIGTERM, _interrupt)
    with steps.live():
        running = _Ours(settings, claim) if is_ours else None
        try:
            with steps.step(UP) as step:
                if running:
                    running.start()
                    step(f"Hub at {settings.hub_url}, node at {settings.hypervisor_url}")
                else:
                    step(f"a Hub is already running at {settings.hub_url}; it stays")
            with connection.client(settings) as client:
                try:
                    _tour(client, steps, made)
                finally:
                    _terminate_rest(client, made)
        except (AutovibeError, KeyboardInterrupt) as error:
            failure = error
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            with steps.step(DOWN) as step:
                _stop(settings, running, vms_before, step)
    if failure is not None:
        raise typer.Exit(_explain(failure, settings, json))
    _close(settings, steps, made, json=json)


def _tour(client: Client, steps: Steps, made: Made) -> None:
    with steps.step(PROJECT) as step:
        project = made.project = client.projects.create(f"demo-{secrets.token_hex(2)}", description="autovibe demo")
        step(f"{project.name}, genesis {output.short(project.initial_checkpoint_uuid)}")
    with steps.step(SPAWN) as step:
        first = client.machines.spawn(project.uuid, prompt=demo_texts.PROMPT)
        made.machines.append(first)
        first = client.machines.wait(first.uuid, watch=lambda operation: step(*progress.describe(operation)))
        step(f"{first.name}, vmid {first.vmid}")
    with steps.step(PROMPT) as step:
        text = ""
        for chunk in client.machines.follow(first.uuid):
            text += chunk.text
            step(_last_line(text))
        first = client.machines.wait(first.uuid, until="finished", timeout_seconds=600)
        if first.exit_status != 0:
            raise OperationFailed(f"The prompt ended with exit status {first.exit_status}:\n{text[-2000:]}")
        step(f"exit status 0: {_last_line(text)}")
    _checkpoint(client, steps, made, CHECKPOINT_A, first, "a", "after the prompt")
    # It boots while the first machine goes on; what follows in the first is no part of A.
    second, ordered = client.checkpoints.spawn(made.checkpoints["a"].uuid), time.monotonic()
    made.machines.append(second)
    with steps.step(CHANGE) as step:
        step(_last_line(_run(client, first, demo_texts.CHANGES)))
    _checkpoint(client, steps, made, CHECKPOINT_B, first, "b", "after the changes")
    with steps.step(DIFF) as step:
        found = made.diff = client.checkpoints.diff(made.checkpoints["a"].uuid, made.checkpoints["b"].uuid)
        _check_diff(found)
        step(found.summary)
    with steps.step(BRANCH) as step:
        step.started = ordered
        second = client.machines.wait(second.uuid, watch=lambda operation: step(*progress.describe(operation)))
        step(f"{second.name}, vmid {second.vmid}")
    with steps.step(PROOF) as step:
        step(f"no trace of B; its test says: {_last_line(_run(client, second, demo_texts.PROOF))}")
    with steps.step(TERMINATE) as step:
        for machine in (first, second):
            client.machines.terminate(
                machine.uuid, reason="demo", wait=True, watch=lambda one: step(*progress.describe(one))
            )
        step("their virtual machines are gone; the checkpoints stay")


def _checkpoint(
    client: Client, steps: Steps, made: Made, title: str, machine: schemas.Machine, label: str, description: str
) -> None:
    with steps.step(title) as step:
        checkpoint = made.checkpoints[label] = client.machines.checkpoint(
            machine.uuid,
            label=label,
            description=description,
            wait=True,
            watch=lambda operation: step(*progress.describe(operation)),
        )
        step(f"{output.short(checkpoint.uuid)}: {checkpoint.file_count} files, {output.size(checkpoint.size_bytes)}")


def _run(client: Client, machine: schemas.Machine, script: str) -> str:
    result = client.machines.exec(machine.uuid, script=script)
    if result.exit_status != 0:
        raise OperationFailed(f"A script in '{machine.name}' ended with {result.exit_status}:\n{result.stderr[-2000:]}")
    return result.stdout


def _check_diff(found: schemas.Diff) -> None:
    kinds = {"A": "added", "M": "modified", "D": "deleted"}
    seen = {line.path: kinds[line.letter] for line in diff_lines(found)}
    if wrong := [path for path, kind in demo_texts.EXPECTED.items() if seen.get(path) != kind]:
        raise OperationFailed(f"The comparison misses what was changed: {', '.join(wrong)}. It says: {found.summary}")


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


# The way in and the way out


class _Ours:
    """The home's Hub and node, started by the demo and stopped by it."""

    def __init__(self, settings: Settings, claim: Claim) -> None:
        from autovibe.cli.running import Running

        self.news: list[str] = []
        self._running = Running(settings, claim, tell=self.news.append)

    def start(self) -> None:
        self._running.start()

    def stop(self) -> None:
        self._running.stop()


def _with_free_ports(settings: Settings) -> Settings:
    """The demo shows autovibe, not the search for a port: defaults that are taken are replaced for its time."""
    from autovibe.cli.processes import is_claimed

    if is_claimed(settings.home):
        return settings
    chosen: dict[str, Any] = {}
    for name, host, apart in (("hub_port", settings.hub_host, 1), ("node_port", settings.node_host, 2)):
        port = getattr(settings, name)
        if name in settings.model_fields_set or prepare.is_free(host, port):
            continue
        candidates = range(port + 10, min(port + 1000, 65000), apart)
        chosen[name] = next((one for one in candidates if prepare.is_free(host, one)), port)
    return settings.model_copy(update=chosen)


def _interrupt(number: int, frame: Any) -> None:  # noqa: ARG001
    raise KeyboardInterrupt


def _terminate_rest(client: Client, made: Made) -> None:
    """After a failure or Ctrl-C: no machine of the demo lives on."""
    for machine in made.machines:
        try:
            if not client.machines.get(machine.uuid).status.is_final:
                client.machines.terminate(machine.uuid, reason="the demo ended early", wait=True)
        except AutovibeError as error:
            output.warn(f"Machine '{machine.name}' could not be terminated: {error}")


def _stop(settings: Settings, running: _Ours | None, vms_before: list[int], step: Any) -> None:
    if running is None:
        step("the Hub was running before and stays")
        return
    running.stop()
    remaining = [vmid for vmid in leftovers.running_vms(settings) if vmid not in vms_before]
    leftovers.stop(settings, remaining)
    step("nothing is left running" + (f"; stopped vmid {', '.join(map(str, remaining))}" if remaining else ""))


def _explain(failure: AutovibeError | KeyboardInterrupt, settings: Settings, json: bool) -> int:
    if isinstance(failure, KeyboardInterrupt):
        output.warn("Interrupted. What the demo had started is stopped.")
        return INTERRUPTED
    output.failed(failure)
    if not json:
        name = "node" if failure.code.startswith("HYPERVISOR") and settings.uses_embedded_node else "hub"
        log = (settings.node_home if name == "node" else settings.hub_home) / f"{name}.log"
        if words := tail(log, 12, without="autovibe.access"):
            output.warn(f"\nThe {name}'s log ({log}) ends:")
            output.say(output.escape(words, keep="\n\t"), "dim")
        output.say("See also: autovibe doctor")
    return exit_status(failure) or 1


def _close(settings: Settings, steps: Steps, made: Made, *, json: bool) -> None:
    project, diff = made.project, made.diff
    assert project is not None and diff is not None  # noqa: S101, PT018 - the tour ended well
    if json:
        return output.print_json(
            {
                "steps": steps.as_json(),
                "project": project,
                "machines": made.machines,
                "checkpoints": list(made.checkpoints.values()),
                "diff": diff,
            }
        )
    sys.stdout.write("\n")
    output.table(
        ("made", "", "what"),
        [
            ("project", project.name, project.uuid),
            *(("machine", one.name, f"vmid {one.vmid}, terminated") for one in made.machines),
            *(
                (
                    f"checkpoint {label}",
                    output.short(one.uuid),
                    f"{one.file_count} files, root {str(one.root_digest)[:12]}",
                )
                for label, one in made.checkpoints.items()
            ),
            ("difference a to b", f"{diff.total_changes} paths", diff.summary),
        ],
        empty="",
    )
    times = [(one.title, one.time) for one in steps.steps]
    output.table(("step", "time"), [*times, ("In all", output.duration(steps.seconds))], empty="")
    home = "" if settings.home == connection.settings().home else f" --home {settings.home}"
    sys.stdout.write("Next:\n")
    for line in (
        f"autovibe{home} up --detach",
        f"autovibe{home} checkpoint diff a b --stat --project {project.name}",
        f"autovibe{home} machine spawn --project {project.name} --checkpoint a --name mine",
        f"autovibe{home} machine ssh mine",
        f"autovibe{home} down --machines",
    ):
        sys.stdout.write(f"  {line}\n")
    return None
