"""How a table of steps is carried out, on tables made for it; the product's own tables are in test_steps.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from sqlmodel import select

from autovibe.domain import Event, Machine, Operation, Project
from autovibe.domain.machine import WANTED_TERMINATED
from autovibe.durable import Durable
from autovibe.errors import AutovibeError, HypervisorUnavailable, NotYet, OperationFailed
from autovibe.store import Store
from autovibe.workflows import Step, Workflow, Workflows, World
from autovibe.workflows.engine import Repeat, end_in

Carry = Callable[..., Operation]


class Bench:
    """Runs one operation of a table at a time; `said` is what the steps noted."""

    def __init__(self, store: Store, directory: Path) -> None:
        self.store, self.directory = store, directory
        self.said: list[str] = []
        self.failures: list[tuple[str, str]] = []
        self.durable: Durable | None = None

    def says(self, word: str) -> Callable[[World, UUID], None]:
        return lambda world, operation_uuid: self.said.append(word)

    def raises(self, *errors: Exception | None) -> Callable[[World, UUID], None]:
        """Raises one after the other; None and the end mean that it works."""
        left = list(errors)

        def do(world: World, operation_uuid: UUID) -> None:
            self.said.append("try")
            error = left.pop(0) if left else None
            if error is not None:
                raise error

        return do

    def fail(self, world: World, operation_uuid: UUID, error: AutovibeError, pending: str) -> None:
        self.failures.append((error.code, pending))
        with world.store.transaction() as session:
            end_in(session, operation_uuid, error, pending)

    def succeed(self, world: World, operation_uuid: UUID) -> None:
        with world.store.transaction() as session:
            end_in(session, operation_uuid, None)

    def start(
        self, *table_steps: Step, heeds_wanted: bool = False, machine_uuid: UUID | None = None, **row: Any
    ) -> UUID:
        given: dict[str, Any] = dict.fromkeys(World.__dataclass_fields__, None)
        for name in ("check", "is_parking", "yield_turn", "tasks", "asked_at", "boot_deadline", "provision_deadline"):
            del given[name]
        world = World(**{**given, "store": self.store, "patience": 0.4})
        durable = Durable(f"sqlite:///{self.directory / 'durable.db'}", home=self.directory, workers=2, host="bench")
        table = Workflow((*table_steps, Step("mark", self.succeed)), self.fail, heeds_wanted=heeds_wanted)
        workflows = Workflows(world, durable, {"test": table})
        durable.launch()
        self.durable = durable
        operation = Operation(kind="test", object_uuid=machine_uuid or uuid4(), machine_uuid=machine_uuid, **row)
        with self.store.transaction() as session:
            session.add(operation)
        workflows.start(operation.uuid, "test")
        return operation.uuid

    def await_end(self, operation_uuid: UUID, seconds: float = 20) -> Operation:
        deadline = time.monotonic() + seconds
        while True:
            with self.store.reading() as session:
                found = cast(Operation, session.get(Operation, operation_uuid))
            if found.finished_at is not None:
                return found
            assert time.monotonic() < deadline, f"It is still {found.status} at step {found.step}: {self.said}"
            time.sleep(0.02)

    def run(self, *steps: Step, **given: Any) -> Operation:
        return self.await_end(self.start(*steps, **given))

    def close(self) -> None:
        if self.durable is not None:
            assert self.durable.close(5)


@pytest.fixture
def bench(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr("autovibe.workflows.engine._FIRST_RETRY", 0.05)
    made = Bench(store, tmp_path)
    yield made
    made.close()


def settle(bench: Bench) -> None:
    """Let a workflow that has marked its operation finish what comes after."""
    time.sleep(0.3)


def test_steps_run_in_order_and_leave_a_trace(bench: Bench) -> None:
    operation = bench.run(Step("one", bench.says("one")), Step("two", bench.says("two")))
    assert (operation.status, operation.error, bench.said) == ("succeeded", None, ["one", "two"])
    with bench.store.reading() as session:
        events = session.exec(select(Event).where(Event.object_uuid == operation.uuid).order_by(Event.id)).all()  # type: ignore[arg-type]
    assert [event.body.get("step") for event in events] == ["one", "two", "mark", None]


def test_a_step_that_an_operation_leaves_out_is_not_announced(bench: Bench) -> None:
    operation = bench.run(Step("one", bench.says("one")), Step("two", bench.says("two")), steps=["two", "mark"])
    assert (operation.status, operation.steps) == ("succeeded", ["two", "mark"])
    with bench.store.reading() as session:
        events = session.exec(select(Event).where(Event.object_uuid == operation.uuid).order_by(Event.id)).all()  # type: ignore[arg-type]
    assert [event.body.get("step") for event in events] == ["two", "mark", None]


def test_what_a_guest_said_fits_into_every_table(bench: Bench) -> None:
    operation = bench.run(Step("one", bench.raises(OperationFailed("It said '\x00\x1b[31m\ud800\nbye'."))))
    assert operation.error is not None
    assert operation.error["message"] == "It said '��[31m�\nbye'."


def test_what_is_not_yet_is_asked_again(bench: Bench) -> None:
    operation = bench.run(Step("one", bench.raises(NotYet("a"), NotYet("b"))))
    assert (operation.status, bench.said) == ("succeeded", ["try"] * 3)


def test_a_deadline_names_what_was_waited_for(bench: Bench) -> None:
    def never(world: World, operation_uuid: UUID) -> None:
        raise NotYet("the guest at 'somewhere' is silent")

    explain = lambda world, operation_uuid: "VM 9000 is running."  # noqa: E731
    operation = bench.run(Step("reach", never, deadline=0.6, explain=explain))
    assert operation.error is not None
    assert operation.error["code"] == "DEADLINE_EXCEEDED"
    assert operation.error["message"] == (
        "Step 'reach' gave up after 0.6 seconds: the guest at 'somewhere' is silent. VM 9000 is running."
    )


def test_a_failure_undoes_in_reverse_with_the_failed_step_itself(bench: Bench) -> None:
    operation = bench.run(
        Step("one", bench.says("one"), undo=bench.says("undo one")),
        Step("two", bench.says("two")),
        Step("three", bench.raises(OperationFailed("It broke.")), undo=bench.says("undo three")),
        Step("four", bench.says("four"), undo=bench.says("undo four")),
    )
    assert operation.error == {"code": "OPERATION_FAILED", "message": "It broke.", "details": {}}
    assert bench.said == ["one", "two", "try", "undo three", "undo one"]
    assert bench.failures == [("OPERATION_FAILED", "")]


def test_a_part_that_does_not_answer_is_tried_until_patience_ends(bench: Bench) -> None:
    silent = HypervisorUnavailable("The node is down.")
    assert bench.run(Step("one", bench.raises(silent, silent))).status == "succeeded"


def test_patience_ends_with_the_reason(bench: Bench) -> None:
    silent = HypervisorUnavailable("The node is down.")
    operation = bench.run(Step("one", bench.raises(*[silent] * 50)))
    assert operation.error is not None
    assert (operation.error["code"], operation.error["message"]) == ("HYPERVISOR_UNAVAILABLE", "The node is down.")


def test_an_undo_is_tried_until_the_hypervisor_is_back_and_says_so(bench: Bench) -> None:
    silent = HypervisorUnavailable("The node is down.")
    operation_uuid = bench.start(
        Step("one", bench.says("one"), undo=bench.raises(silent, silent, None)),
        Step("two", bench.raises(OperationFailed("It broke."))),
    )
    operation = bench.await_end(operation_uuid)  # before the undo works, so that nobody waits for it
    assert "still to be undone" in operation.progress
    deadline = time.monotonic() + 10
    while len(bench.failures) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    settle(bench)
    assert [pending.startswith("Step 'one' is still to be undone") for _, pending in bench.failures] == [True, False]
    assert bench.await_end(operation_uuid).progress == ""


def test_an_undo_that_fails_is_tried_and_does_not_keep_the_others_from_running(bench: Bench) -> None:
    operation = bench.run(
        Step("one", bench.says("one"), undo=bench.says("undo one")),
        Step("two", bench.raises(OperationFailed("It broke.")), undo=bench.raises(*[OperationFailed("No.")] * 50)),
    )
    assert bench.said == ["one", *["try"] * 7, "undo one"]
    assert operation.progress == "Step 'two' could not be undone: No."


def test_a_defect_becomes_an_internal_error_and_is_undone(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    operation = bench.run(Step("one", bench.raises(ZeroDivisionError("secret")), undo=bench.says("undone")))
    assert operation.error is not None
    assert operation.error["code"] == "INTERNAL_ERROR"
    assert "secret" not in operation.error["message"]
    assert "ZeroDivisionError" in caplog.text
    assert bench.said == ["try", "undone"]


def test_a_step_can_go_back(bench: Bench) -> None:
    operation = bench.run(
        Step("one", bench.says("one")),
        Step("two", bench.raises(Repeat("one"), Repeat("one"), None)),
    )
    assert (operation.status, bench.said) == ("succeeded", ["one", "try"] * 3)


def test_a_machine_that_is_unwanted_backs_out(bench: Bench) -> None:
    project = Project(name="p")
    machine = Machine(name="m", type="shell", project_uuid=project.uuid)
    with bench.store.transaction() as session:
        session.add(project)
        session.flush()
        session.add(machine)

    def never(world: World, operation_uuid: UUID) -> None:
        with bench.store.transaction() as session:
            row = cast(Machine, session.get(Machine, machine.uuid))
            row.wanted = WANTED_TERMINATED
            session.add(row)
        raise NotYet("something")

    operation = bench.run(Step("one", never, undo=bench.says("undone")), heeds_wanted=True, machine_uuid=machine.uuid)
    assert operation.error is not None
    assert operation.error["code"] == "CONFLICT"
    assert bench.said == ["undone"]


def test_the_engines_own_share_of_a_spawn_is_small(bench: Bench) -> None:
    """Nine steps that do nothing: what is left is the journal, the rows and the events."""
    operation_uuid = bench.start(*[Step(f"step {n}", lambda world, operation_uuid: None) for n in range(8)])
    operation = bench.await_end(operation_uuid)
    with bench.store.reading() as session:
        first = session.exec(select(Event).where(Event.object_uuid == operation_uuid)).first()
    assert first is not None
    assert operation.finished_at is not None
    seconds = (operation.finished_at - first.created_at).total_seconds()
    print(f"nine empty steps: {seconds * 1000:.0f} ms")
    assert seconds < 2  # no timed test: a bound that only a defect passes
