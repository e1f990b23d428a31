"""The Hub itself over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

from autovibe import schemas
from autovibe.sdk.connection import Connection, canonical, order
from autovibe.sdk.operations import Operations
from autovibe.sdk.waiting import Watch, each
from autovibe.types import ExperimentStatus, HubCheckpointStatus, HubCheckpointType


class TheHub:
    def __init__(self, connection: Connection, operations: Operations) -> None:
        self._connection = connection
        self._operations = operations

    def status(self) -> schemas.HubStatus:
        return self._connection.get(schemas.HubStatus, "/hub/status")

    def checkpoint(
        self,
        *,
        type: HubCheckpointType | str = HubCheckpointType.manual,
        reason: str = "",
        description: str = "",
        wait: bool = False,
        watch: Watch | None = None,
    ) -> schemas.HubCheckpoint:
        """Begin a checkpoint of the Hub; with `wait` it is ready. Raises OperationFailed when it could not be made."""
        body = order(schemas.HubCheckpointOrder, type=type, reason=reason, description=description)
        made = self._connection.post(schemas.HubCheckpoint, "/hub/checkpoint", body)
        return self.wait(made.uuid, watch=watch) if wait else made

    def wait(self, uuid: UUID | str, *, watch: Watch | None = None) -> schemas.HubCheckpoint:
        """Wait until a checkpoint of the Hub is ready. Raises OperationFailed when it could not be made."""
        found = self.get_checkpoint(uuid)
        if found.status is not HubCheckpointStatus.ready and found.operation_uuid is not None:
            self._operations.wait(found.operation_uuid, watch=watch)
            found = self.get_checkpoint(uuid)
        return found

    def checkpoints(
        self,
        *,
        type: HubCheckpointType | str | None = None,
        limit: int | None = None,
        offset: int | None = None,
    ) -> schemas.HubCheckpointPage:
        return self._connection.get(
            schemas.HubCheckpointPage, "/hub/checkpoints", type=type, limit=limit, offset=offset
        )

    def each_checkpoint(self) -> Iterator[schemas.HubCheckpoint]:
        """Every checkpoint of the Hub, newest first, page by page."""
        return each(lambda offset: self.checkpoints(limit=200, offset=offset), lambda page: page.checkpoints)

    def get_checkpoint(self, uuid: UUID | str, *, wait_seconds: float | None = None) -> schemas.HubCheckpoint:
        """A checkpoint of the Hub; with `wait_seconds` the answer waits so long for its end."""
        path = f"/hub/checkpoints/{canonical(uuid)}"
        return self._connection.get(schemas.HubCheckpoint, path, wait=wait_seconds)

    def spawn_experimental(
        self,
        name: str,
        *,
        checkpoint_uuid: UUID | str | None = None,
        configuration: schemas.ExperimentConfiguration | None = None,
        duration_days: float | None = None,
        budget_share: float | None = None,
    ) -> schemas.Experiment:
        """Plan a second Hub, restored from a checkpoint of this one; it runs within seconds, see `get_experiment`."""
        body = order(
            schemas.ExperimentOrder,
            name=name,
            checkpoint_uuid=checkpoint_uuid,
            configuration=configuration,
            duration_days=duration_days,
            budget_share=budget_share,
        )
        return self._connection.post(schemas.Experiment, "/hub/spawn-experimental", body)

    def experiments(
        self,
        *,
        status: ExperimentStatus | str | None = None,
        limit: int | None = None,
        offset: int | None = None,
    ) -> schemas.ExperimentPage:
        return self._connection.get(
            schemas.ExperimentPage, "/hub/experiments", status=status, limit=limit, offset=offset
        )

    def each_experiment(self) -> Iterator[schemas.Experiment]:
        """Every experiment, newest first, page by page."""
        return each(lambda offset: self.experiments(limit=200, offset=offset), lambda page: page.experiments)

    def get_experiment(
        self, uuid: UUID | str, *, wait_seconds: float | None = None, wait_for: ExperimentStatus | str | None = None
    ) -> schemas.Experiment:
        """An experiment with its comparison; with `wait_seconds` the answer waits so long until it runs, or has the
        status `wait_for`, or is over.
        """
        path = f"/hub/experiments/{canonical(uuid)}"
        return self._connection.get(schemas.Experiment, path, wait=wait_seconds, wait_for=wait_for)

    def stop_experiment(self, uuid: UUID | str) -> schemas.Experiment:
        """End an experiment before its time; it takes a while, see `get_experiment`."""
        path = f"/hub/experiments/{canonical(uuid)}/stop"
        return self._connection.post(schemas.Experiment, path, schemas.Request())
