"""The Hub itself on the wire: operations, health, status, checkpoints of the Hub, experiments."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Field

from autovibe.schemas.analytics import OverallEfficiency
from autovibe.schemas.wire import Page, Reply, Request, Text
from autovibe.types import (
    ExperimentStatus,
    HubCheckpointKind,
    HubCheckpointStatus,
    HubCheckpointType,
    Name,
    OperationKind,
    OperationStatus,
)


class Operation(Reply):
    uuid: UUID
    kind: OperationKind
    status: OperationStatus
    step: str | None
    steps: list[str]
    progress: str
    error: dict[str, Any] | None
    object_uuid: UUID
    created_at: datetime
    finished_at: datetime | None


class ServiceHealth(Reply):
    status: Literal["healthy", "degraded", "unhealthy"]
    message: str = ""
    latency_ms: float | None = None


class Health(Reply):
    """`utilization_percent` is the highest of processor, memory and disk of the node that machines are made on."""

    status: Literal["healthy", "degraded", "unhealthy"]
    version: str
    services: dict[str, ServiceHealth]
    active_machine_count: int
    utilization_percent: float | None
    last_checkpoint_at: datetime | None
    timestamp: datetime


class Utilization(Reply):
    """Percent in use, of all there is."""

    cpu_percent: float
    memory_percent: float
    disk_percent: float


class ApiStatistics(Reply):
    """The last hour, over all processes. Requests that asked to be kept waiting are counted and not timed."""

    requests_per_hour: int
    average_response_ms: float | None
    error_rate_percent: float = Field(description="Answers of status 500 and above, in percent of all.")


class HubProcess(Reply):
    name: str
    seen_seconds_ago: float


class HubStatus(Reply):
    """`uuid` is the Hub's, however many processes serve it; uptime and utilization are of the one that answers."""

    uuid: UUID
    status: Literal["healthy", "degraded", "unhealthy"]
    uptime_hours: float
    version: str
    last_checkpoint_uuid: UUID | None
    last_checkpoint_at: datetime | None
    active_machine_count: int
    active_project_count: int
    resource_utilization: Utilization = Field(description="Of the computer the Hub runs on.")
    node_utilization: Utilization | None = Field(description="Of the Proxmox node; null while it does not answer.")
    api_statistics: ApiStatistics
    processes: list[HubProcess]
    experiment: dict[str, Any] | None = Field(description="Which one, where this Hub is an experiment of another.")
    timestamp: datetime


class HubCheckpointOrder(Request):
    type: HubCheckpointType = HubCheckpointType.manual
    reason: Text = Field(default="", max_length=1000)
    description: Text = Field(default="", max_length=10_000)


class HubCheckpoint(Reply):
    """`kind` logical: database, journal, settings and keys in the directory `path` of a home of the Hub; vm: with a
    snapshot of the VM the Hub runs in.
    """

    uuid: UUID
    type: HubCheckpointType
    kind: HubCheckpointKind
    status: HubCheckpointStatus
    reason: str
    description: str
    place: str = Field(description="Which home of the Hub holds it: <host>-<home id>.")
    path: str
    size_bytes: int
    size_mb: float
    file_count: int
    version: str
    schema_revision: str
    vmid: int | None
    proxmox_snapshot_id: str | None
    error_message: str | None
    operation_uuid: UUID | None
    created_at: datetime
    estimated_completion_at: datetime
    completed_at: datetime | None


class HubCheckpointPage(Page):
    checkpoints: list[HubCheckpoint]


SettingValue = (
    bool
    | Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
    | Annotated[float, Field(allow_inf_nan=False, strict=True)]
    | Annotated[Text, Field(max_length=1000)]
)
_Key = Annotated[Text, Field(min_length=1, max_length=100)]


class ExperimentConfiguration(Request):
    """What the experimental Hub does otherwise. `settings` are settings of autovibe; `algorithm` and `optimization` are
    kept with the experiment, in its own database too, for whatever code or person it is an experiment for.
    """

    algorithm: Text | None = Field(default=None, max_length=200)
    optimization: dict[_Key, SettingValue] = Field(default={}, max_length=50)
    settings: dict[_Key, SettingValue] = Field(default={}, max_length=50)


class ExperimentOrder(Request):
    checkpoint_uuid: UUID | None = Field(default=None, description="Of the Hub; the newest that is ready by default.")
    name: Name
    configuration: ExperimentConfiguration = ExperimentConfiguration()
    duration_days: float = Field(default=14, gt=0, le=90, allow_inf_nan=False, strict=True)
    budget_share: float = Field(
        default=0.1,
        ge=0,
        le=1,
        allow_inf_nan=False,
        strict=True,
        description="Of the Hub's budgets; it comes on top of them.",
    )


class ExperimentComparison(Reply):
    """Both over the time since the experiment's Hub runs; the formulas are those of /analytics/efficiency."""

    since: datetime
    until: datetime
    experiment: OverallEfficiency
    original: OverallEfficiency
    success_rate_difference: float | None = Field(description="The experiment's less the original's.")
    cost_per_success_ratio: float | None = Field(description="The experiment's by the original's; below 1 is cheaper.")


class Experiment(Reply):
    """`uuid` is the experiment's, `hub_uuid` that of its Hub."""

    uuid: UUID
    hub_uuid: UUID
    name: str
    status: ExperimentStatus
    checkpoint_uuid: UUID
    configuration: ExperimentConfiguration
    budget_share: float
    url: str
    path: str
    place: str
    pid: int | None
    vmid_first: int | None
    vmid_last: int | None
    start_count: int
    is_stopping: bool
    error_message: str | None
    created_at: datetime
    estimated_ready_at: datetime
    started_at: datetime | None
    ends_at: datetime
    ended_at: datetime | None
    comparison: ExperimentComparison | None


class ExperimentPage(Page):
    experiments: list[Experiment]
