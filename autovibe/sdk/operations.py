"""Operations: what a client can wait for."""

from __future__ import annotations

from uuid import UUID

from autovibe import schemas
from autovibe.errors import AutovibeError, OperationFailed
from autovibe.sdk.connection import Connection, canonical
from autovibe.sdk.waiting import LONG_POLL_SECONDS, LOOK_AGAIN_SECONDS, POLL_SECONDS, Changes, Deadline, Watch
from autovibe.types import OperationStatus


class Operations:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, uuid: UUID | str, *, wait_seconds: float | None = None) -> schemas.Operation:
        """The operation; with `wait_seconds` the answer waits so long for its end."""
        return self._connection.get(schemas.Operation, f"/operations/{canonical(uuid)}", wait=wait_seconds)

    def wait(
        self, uuid: UUID | str, *, timeout_seconds: float | None = None, watch: Watch | None = None
    ) -> schemas.Operation:
        """Wait until the operation has succeeded, across a restart of the Hub.

        Raises OperationFailed, or the class below it that the failure names; DeadlineExceeded after `timeout_seconds`.
        """
        deadline = Deadline(timeout_seconds)
        operation = deadline.poll(self.get, uuid)
        with Changes(self._connection, deadline, operation.uuid) as changes:
            while True:
                if watch:
                    watch(operation)
                if operation.status is OperationStatus.succeeded:
                    return operation
                if operation.status is OperationStatus.failed:
                    raise failure(operation)
                deadline.check(f"the {operation.kind} to end; operation {operation.uuid} is at step '{operation.step}'")
                operation = changes.look(
                    lambda wait: self.get(uuid, wait_seconds=wait),
                    LOOK_AGAIN_SECONDS if watch else LONG_POLL_SECONDS,
                    POLL_SECONDS if watch else LONG_POLL_SECONDS,
                )


def failure(operation: schemas.Operation) -> OperationFailed:
    """A failed operation is an OperationFailed, whatever kind of error ended it; that one is its cause."""
    error = AutovibeError.from_dict(operation.error or {"message": "The reason is not known."})
    error.details.setdefault("operation_uuid", str(operation.uuid))
    if isinstance(error, OperationFailed):
        return error
    failed = OperationFailed(error.message, details={"code": error.code, **error.details})
    failed.__cause__ = error
    return failed
