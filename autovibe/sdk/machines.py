"""Machines over HTTP."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from uuid import UUID

from autovibe import schemas
from autovibe.errors import AutovibeError, ConfigurationError, OperationFailed, Unavailable
from autovibe.sdk.connection import Connection, canonical, order
from autovibe.sdk.operations import Operations
from autovibe.sdk.waiting import (
    LONG_POLL_SECONDS,
    REST_SECONDS,
    SHORTEST_POLL_SECONDS,
    Changes,
    Deadline,
    Watch,
    each,
)
from autovibe.types import MachineStatus

if TYPE_CHECKING:
    import fabric

    from autovibe.settings import Settings

Files = Mapping[str, str | schemas.FileContent | None]


class Machines:
    def __init__(self, connection: Connection, operations: Operations) -> None:
        self._connection = connection
        self._operations = operations

    def spawn(
        self,
        project_uuid: UUID | str,
        *,
        type: str = "shell",
        checkpoint_uuid: UUID | str | None = None,
        prompt: str | None = None,
        file_modifications: Files | None = None,
        resource_constraints: schemas.ResourceConstraints | None = None,
        name: str | None = None,
        wait: bool = False,
        watch: Watch | None = None,
    ) -> schemas.Machine:
        """Spawn from a checkpoint, the project's current one by default. `wait`: until it is reachable (see `wait`)."""
        body = _order(project_uuid, type, checkpoint_uuid, prompt, file_modifications, resource_constraints, name)
        machine = self._connection.post(schemas.Machine, "/machines", body)
        return self.wait(machine.uuid, watch=watch) if wait else machine

    def plan(
        self,
        project_uuid: UUID | str,
        *,
        type: str = "shell",
        checkpoint_uuid: UUID | str | None = None,
        prompt: str | None = None,
        file_modifications: Files | None = None,
        resource_constraints: schemas.ResourceConstraints | None = None,
        name: str | None = None,
    ) -> schemas.SpawnPlan:
        """What such a spawn would use, where it would be put, and all that stands against it; nothing is done."""
        body = _order(project_uuid, type, checkpoint_uuid, prompt, file_modifications, resource_constraints, name)
        return self._connection.post(schemas.SpawnPlan, "/machines?dry_run=true", body)

    def list(
        self,
        *,
        status: MachineStatus | str | None = None,
        project_uuid: UUID | str | None = None,
        name: str | None = None,
        limit: int | None = None,
        offset: int | None = None,
    ) -> schemas.MachinePage:
        """Machines, newest first; `name` finds also those that had it and have ended."""
        return self._connection.get(
            schemas.MachinePage,
            "/machines",
            status=status,
            project_uuid=None if project_uuid is None else canonical(project_uuid),
            name=name,
            limit=limit,
            offset=offset,
        )

    def each(
        self, *, status: MachineStatus | str | None = None, project_uuid: UUID | str | None = None
    ) -> Iterator[schemas.Machine]:
        """Every machine, newest first, page by page."""
        return each(
            lambda offset: self.list(status=status, project_uuid=project_uuid, limit=200, offset=offset),
            lambda page: page.machines,
        )

    def get(
        self,
        uuid: UUID | str,
        *,
        wait_seconds: float | None = None,
        wait_for: Literal["ready", "finished"] | None = None,
    ) -> schemas.Machine:
        """The machine; with `wait_seconds` the answer waits so long until it is reachable, or its prompt has ended."""
        path = f"/machines/{canonical(uuid)}"
        return self._connection.get(schemas.Machine, path, wait=wait_seconds, wait_for=wait_for)

    def wait(
        self,
        uuid: UUID | str,
        *,
        until: Literal["ready", "finished"] = "ready",
        timeout_seconds: float | None = None,
        watch: Watch | None = None,
    ) -> schemas.Machine:
        """Wait until the machine is reachable, or until its prompt has ended (`exit_status` is set).

        Raises OperationFailed (or a class below it) when the spawn failed, DeadlineExceeded after `timeout_seconds`.
        """
        deadline = Deadline(timeout_seconds)
        machine = deadline.poll(self.get, uuid)
        if machine.status is MachineStatus.spawning and machine.operation_uuid is not None:
            self._operations.wait(machine.operation_uuid, timeout_seconds=deadline.left(), watch=watch)
            machine = deadline.poll(self.get, uuid)
        with Changes(self._connection, deadline, machine.uuid) as changes:
            while not _is_there(machine, until):
                deadline.check(f"machine '{machine.name}' to be {until}; it is {machine.status}")
                machine = changes.look(
                    lambda wait: self.get(uuid, wait_seconds=wait, wait_for=until if wait is not None else None),
                    LONG_POLL_SECONDS,
                    LONG_POLL_SECONDS,
                )
        if machine.status is MachineStatus.failed:
            raise OperationFailed(
                f"Machine '{machine.name}' failed: {machine.error_message or 'the reason is not known.'}",
                details={"machine_uuid": str(machine.uuid)},
            )
        return machine

    def logs(
        self, uuid: UUID | str, *, offset: int = 0, limit: int | None = None, wait_seconds: float | None = None
    ) -> schemas.LogChunk:
        """The prompt's output from byte `offset` on; with `wait_seconds` the answer waits until there is some."""
        path = f"/machines/{canonical(uuid)}/logs"
        return self._connection.get(schemas.LogChunk, path, offset=offset, limit=limit, wait=wait_seconds)

    def follow(self, uuid: UUID | str, *, offset: int = 0) -> Iterator[schemas.LogChunk]:
        """The prompt's output as it comes, until no more will come. A lost connection is taken up where it was."""
        deadline, can_stream = Deadline(None), not self._connection.has_no_events
        while True:
            if can_stream:
                try:
                    for chunk in self._output(uuid, offset):
                        if chunk.text:
                            yield chunk
                        offset = chunk.next_offset
                        if chunk.finished:
                            return
                except Unavailable:
                    pass  # asked for below, for as long as a Hub may take to come back
                except AutovibeError:
                    can_stream = False
            asked_at = time.monotonic()
            chunk = deadline.poll(self.logs, uuid, offset=offset, wait_seconds=LONG_POLL_SECONDS)
            if chunk.text:
                yield chunk
            if chunk.finished:
                return
            offset = chunk.next_offset
            time.sleep(max(0.0, asked_at + REST_SECONDS - time.monotonic()))

    def _output(self, uuid: UUID | str, offset: int) -> Iterator[schemas.LogChunk]:
        """One stream of output, until it ends or is lost."""
        frames = self._connection.stream(f"/machines/{canonical(uuid)}/logs", follow="true", offset=offset)
        try:
            for frame in frames:
                if frame.data:
                    yield schemas.LogChunk.model_validate_json(frame.data)
        finally:
            frames.close()

    def exec(
        self,
        uuid: UUID | str,
        argv: Sequence[str] | None = None,
        *,
        script: str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
        user: str | None = None,
    ) -> schemas.ExecResult:
        """Run a command in the guest, or a bash script. A time-out answers exit status 124."""
        body = order(
            schemas.ExecOrder,
            argv=None if argv is None else list(argv),
            script=script,
            cwd=cwd,
            env=dict(env) if env else None,
            timeout_seconds=timeout_seconds,
            user=user,
        )
        return self._connection.post(
            schemas.ExecResult,
            f"/machines/{canonical(uuid)}/exec",
            body,
            is_repeatable=False,
            extra_seconds=2 * body.timeout_seconds,  # it may wait as long for a checkpoint to be over
        )

    def ssh(self, uuid: UUID | str) -> schemas.MachineSsh:
        """Where OpenSSH reaches the machine, and its pinned host key."""
        return self._connection.get(schemas.MachineSsh, f"/machines/{canonical(uuid)}/ssh")

    def connect(
        self, machine: schemas.Machine | UUID | str, *, key_file: str | Path | None = None
    ) -> fabric.Connection:
        """A fabric Connection to the machine, which knows its pinned host key and no other; close it, or use `with`.

        It logs in with the Hub's key, so it is there where the Hub's home is (or `key_file`), and fabric with the extra
        'hub'. Raises ConfigurationError without either. Opening it raises GuestUnreachable when the machine does not
        answer, refuses the key, or shows another host key.
        """
        try:
            from autovibe.sdk.ssh import MachineConnection
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                "A connection to a machine needs fabric; install it with: pip install 'autovibe[hub]'"
            ) from error
        key = readable_key_file() if key_file is None else Path(key_file)
        uuid = machine.uuid if isinstance(machine, schemas.Machine) else machine
        return MachineConnection(self.ssh(uuid), key)

    def checkpoint(
        self,
        uuid: UUID | str,
        *,
        label: str | None = None,
        description: str = "",
        context: str = "",
        wait: bool = False,
        watch: Watch | None = None,
    ) -> schemas.Checkpoint:
        """Checkpoint a machine. `wait`: until it is ready; raises OperationFailed when it could not be made."""
        body = order(schemas.CheckpointOrder, label=label, description=description, context=context)
        checkpoint = self._connection.post(schemas.Checkpoint, f"/machines/{canonical(uuid)}/checkpoint", body)
        if wait and checkpoint.operation_uuid is not None:
            self._operations.wait(checkpoint.operation_uuid, watch=watch)
            checkpoint = self._connection.get(schemas.Checkpoint, f"/checkpoints/{checkpoint.uuid}")
        return checkpoint

    def resume(
        self,
        uuid: UUID | str,
        *,
        resource_constraints: schemas.ResourceConstraints | None = None,
        wait: bool = False,
        watch: Watch | None = None,
    ) -> schemas.Machine:
        """Let a blocked machine go on; constraints that are given replace its own. `wait`: until it runs.

        Raises LimitExceeded where it does not fit into its budgets, OperationFailed when it could not be resumed.
        """
        body = order(schemas.ResumeOrder, resource_constraints=resource_constraints)
        machine = self._connection.post(schemas.Machine, f"/machines/{canonical(uuid)}/resume", body)
        if wait and machine.operation_uuid is not None:
            self._operations.wait(machine.operation_uuid, watch=watch)
            machine = self.get(uuid)
        return machine

    def report_usage(
        self,
        uuid: UUID | str,
        *,
        api_calls: int = 0,
        money: schemas.MoneyOrder | float | str | None = None,
        note: str = "",
    ) -> schemas.UsageReply:
        """Charge model calls and money the machine used; answers what is left of its limits.

        Raises LimitExceeded where it does not fit; nothing is charged then, and the machine is blocked.
        """
        body = order(schemas.UsageOrder, api_calls=api_calls, money=money, note=note)
        return self._connection.post(schemas.UsageReply, f"/machines/{canonical(uuid)}/usage", body)

    def terminate(
        self,
        uuid: UUID | str,
        *,
        reason: str = "",
        create_checkpoint: bool = False,
        wait: bool = False,
        watch: Watch | None = None,
    ) -> schemas.TerminateReply:
        """Terminate a machine; one that has ended is answered as it is. `wait`: until its VM is gone."""
        body = order(schemas.TerminateOrder, reason=reason, create_checkpoint=create_checkpoint)
        path = f"/machines/{canonical(uuid)}/terminate"
        machine = self._connection.post(schemas.TerminateReply, path, body)
        if wait and not machine.status.is_final:
            self._outlast(machine, watch)
            machine = self._connection.post(schemas.TerminateReply, path, body)
        return machine

    def _outlast(self, machine: schemas.Machine, watch: Watch | None) -> None:
        """Wait until the machine has ended. What is under way on it may be a spawn that is being undone."""
        while not machine.status.is_final:
            if machine.operation_uuid is not None:
                try:
                    self._operations.wait(machine.operation_uuid, watch=watch)
                except OperationFailed:
                    machine = self.get(machine.uuid)
                    if not machine.status.is_final:
                        raise
            time.sleep(0 if machine.status.is_final else SHORTEST_POLL_SECONDS)
            machine = Deadline(None).poll(self.get, machine.uuid)


def readable_key_file(settings: Settings | None = None) -> Path:
    """The Hub's SSH key. Raises ConfigurationError where it is not: on another computer, or for another user."""
    from autovibe.settings import load

    settings = settings or load()
    key = settings.ssh_key_file or settings.hub_home / "ssh" / "id_ed25519"
    if not os.access(key, os.R_OK):
        raise ConfigurationError(
            f"'{key}' cannot be read: SSH to a machine works where the Hub's home is. "
            "Elsewhere use: autovibe machine exec"
        )
    return key


def _order(
    project_uuid: UUID | str,
    type: str,
    checkpoint_uuid: UUID | str | None,
    prompt: str | None,
    file_modifications: Files | None,
    resource_constraints: schemas.ResourceConstraints | None,
    name: str | None,
) -> schemas.MachineOrder:
    return order(
        schemas.MachineOrder,
        project_uuid=canonical(project_uuid),
        checkpoint_uuid=None if checkpoint_uuid is None else canonical(checkpoint_uuid),
        type=type,
        prompt=prompt,
        file_modifications=dict(file_modifications) if file_modifications else None,
        resource_constraints=resource_constraints,
        name=name,
    )


def _is_there(machine: schemas.Machine, until: Literal["ready", "finished"]) -> bool:
    if machine.status.is_final or machine.status is MachineStatus.spawning:
        return machine.status.is_final
    return until == "ready" or machine.prompt is None or machine.exit_status is not None
