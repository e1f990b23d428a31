"""The v1 wire shapes, shared by the server and the SDK.

Times are RFC 3339 in UTC; ids are uuid4; money is an object of amount, currency and micro-units. A request with an
unknown field is refused, so that a misspelt option is never silently ignored.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from autovibe.types import (
    ArtefactKind,
    CheckpointStatus,
    CheckpointType,
    MachineStatus,
    Money,
    Name,
    OperationKind,
    OperationStatus,
    ProjectStatus,
)


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", str_max_length=16 * 1024 * 1024)


class Reply(BaseModel):
    model_config = ConfigDict(from_attributes=True)


def _without_nul(text: str) -> str:
    if "\x00" in text:
        raise ValueError("A text cannot contain a NUL character.")
    return text


Text = Annotated[str, AfterValidator(_without_nul)]
"""PostgreSQL keeps no NUL in a text, and no prompt needs one."""

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]

_MOST_MICROS = 10**18


class MoneyAmount(Reply):
    amount: str
    currency: str
    micros: int

    @classmethod
    def of(cls, money: Money) -> MoneyAmount:
        return cls(amount=money.amount, currency=money.currency, micros=money.micros)


class MoneyOrder(Request):
    """Money in a request, as the object that replies carry. `micros`, where given, wins over `amount`."""

    amount: str | float | None = None
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")
    micros: int | None = Field(default=None, ge=0, le=_MOST_MICROS)

    @model_validator(mode="before")
    @classmethod
    def _accept_a_number(cls, value: Any) -> Any:
        return {"amount": value} if isinstance(value, int | float | str) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _is_money(self) -> MoneyOrder:
        self.to_money()
        return self

    def to_money(self) -> Money:
        if self.micros is not None:
            return Money(self.micros, self.currency)
        if self.amount is None:
            raise ValueError("Money takes 'amount' or 'micros'.")
        try:
            money = Money.of(self.amount, self.currency)
        except ArithmeticError as error:
            raise ValueError(f"'{self.amount}' is no amount of money.") from error
        if money.micros > _MOST_MICROS:
            raise ValueError(f"'{self.amount}' is more money than can be counted.")
        return money


# Errors


class ErrorBody(Reply):
    code: str
    message: str
    details: dict[str, Any] = {}
    request_id: str
    timestamp: datetime


class ErrorReply(Reply):
    success: Literal[False] = False
    error: ErrorBody


# Projects


class ResourceBudgets(Request):
    daily_money: MoneyOrder | None = None
    daily_time_hours: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    daily_api_calls: Count | None = None
    storage_gb: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_concurrent_machines: Count | None = None


class ProjectOrder(Request):
    name: Name
    description: Text = Field(default="", max_length=10_000)
    greediness: float = Field(default=0.1, ge=0, le=1, allow_inf_nan=False)
    resource_budgets: ResourceBudgets = ResourceBudgets()


class ProjectBudgets(Reply):
    daily_money: MoneyAmount | None = None
    daily_time_hours: float | None = None
    daily_api_calls: int | None = None
    storage_gb: float | None = None
    max_concurrent_machines: int | None = None


class Project(Reply):
    uuid: UUID
    name: str
    description: str
    status: ProjectStatus
    greediness: float
    current_checkpoint_uuid: UUID | None
    initial_checkpoint_uuid: UUID | None
    resource_budgets: ProjectBudgets
    active_machine_count: int
    checkpoint_count: int
    created_at: datetime
    updated_at: datetime


# Machines


class FileContent(Request):
    """A file to place in the guest before provisioning. Exactly one of `content` and `content_base64` is given."""

    content: str | None = None
    content_base64: str | None = None
    mode: str | None = Field(default=None, pattern=r"^0?[0-7]{3,4}$", description="Octal, such as '0644'.")
    owner: str | None = Field(default=None, pattern=r"^[a-z_][a-z0-9_-]{0,31}$")

    @model_validator(mode="after")
    def _has_one_content(self) -> FileContent:
        if (self.content is None) == (self.content_base64 is None):
            raise ValueError("A file modification takes exactly one of 'content' and 'content_base64'.")
        return self


FileModifications = Annotated[
    dict[str, str | FileContent | None],
    Field(description="Absolute path -> text, an object, or null to delete the file."),
]


class ResourceConstraints(Request):
    max_money: MoneyOrder | None = None
    max_time_minutes: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_api_calls: Count | None = None


class SpawnFromCheckpointOrder(Request):
    type: str = Field(default="shell", max_length=63, description="A machine type; '-' and '_' are the same in it.")
    prompt: Text | None = Field(default=None, max_length=1_000_000)
    file_modifications: FileModifications = {}
    resource_constraints: ResourceConstraints = ResourceConstraints()
    name: Name | None = None


class MachineOrder(SpawnFromCheckpointOrder):
    project_uuid: UUID
    checkpoint_uuid: UUID | None = Field(default=None, description="Default: the project's current checkpoint.")


class TerminateOrder(Request):
    reason: Text = Field(default="", max_length=1000)
    create_checkpoint: bool = False


class CheckpointOrder(Request):
    context: Text = Field(
        default="", max_length=1000, description="An identifier of yours, such as a commit or ticket."
    )
    description: Text = Field(default="", max_length=10_000)
    label: Name | None = None


class ExecOrder(Request):
    """Exactly one of `argv` and `script`; a script is run by bash."""

    argv: list[str] | None = Field(default=None, min_length=1, max_length=10_000)
    script: str | None = None
    cwd: str | None = Field(default=None, pattern=r"^/[^\x00]*$", description="Default: /workspace.")
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}
    timeout_seconds: float = Field(default=120, gt=0, le=3600, allow_inf_nan=False)
    user: str = Field(default="agent", pattern=r"^[a-z_][a-z0-9_-]{0,31}$")

    @model_validator(mode="after")
    def _has_one_command(self) -> ExecOrder:
        if (self.argv is None) == (self.script is None):
            raise ValueError("exec takes exactly one of 'argv' and 'script'.")
        if any("\x00" in text for text in [*(self.argv or []), self.script or "", *self.env.values()]):
            raise ValueError("A command cannot contain a NUL character.")
        return self


class ExecResult(Reply):
    exit_status: int = Field(description="The command's own; 124 when it ran into timeout_seconds.")
    stdout: str
    stderr: str
    truncated: bool
    duration_ms: int


class ConstraintsReply(Reply):
    max_money: MoneyAmount | None = None
    max_time_minutes: float | None = None
    max_api_calls: int | None = None


class Usage(Reply):
    """`null` means: not measured or not estimated."""

    estimated: float | None = None
    actual: float | None = None


class MoneyUsage(Reply):
    estimated: MoneyAmount | None = None
    actual: MoneyAmount | None = None


class ResourceUsage(Reply):
    money: MoneyUsage = MoneyUsage()
    time_minutes: Usage = Usage()
    api_calls: Usage = Usage()
    cpu_hours: Usage = Usage()


class Machine(Reply):
    uuid: UUID
    name: str
    vmid: int | None
    type: str
    status: MachineStatus
    project_uuid: UUID
    checkpoint_uuid: UUID | None
    prompt: str | None
    exit_status: int | None
    error_message: str | None
    resource_constraints: ConstraintsReply
    resource_usage: ResourceUsage
    progress: str
    last_checkpoint_uuid: UUID | None
    checkpoint_count: int
    operation_uuid: UUID | None
    spawned_at: datetime
    finished_at: datetime | None
    terminated_at: datetime | None
    updated_at: datetime


class TerminateReply(Machine):
    final_checkpoint_uuid: UUID | None = None


class MachineSsh(Reply):
    """How OpenSSH reaches a machine; `host_key` is the pinned one, as in a known_hosts file ("ssh-ed25519 AAAA…")."""

    host: str
    port: int
    user: str
    host_key: str


# Checkpoints


class Artefact(Reply):
    kind: ArtefactKind
    storage: str


class ManifestFile(Reply):
    """One path of a manifest. `path_base64` stands beside a path that is not UTF-8."""

    size: int
    sha256: str | None
    kind: str
    mode: str
    uid: int
    gid: int
    mtime: datetime | None = None
    target: str | None = None
    path_base64: str | None = None


class Checkpoint(Reply):
    uuid: UUID
    project_uuid: UUID
    parent_uuid: UUID | None
    machine_uuid: UUID | None
    type: CheckpointType
    label: str | None
    description: str
    context: str
    status: CheckpointStatus
    node: str | None
    vmid: int | None
    proxmox_snapshot_id: str | None
    artefact: Artefact | None
    root_digest: str | None
    file_count: int
    size_bytes: int
    size_mb: float
    unique_bytes: int
    verified_at: datetime | None
    metadata: dict[str, Any]
    operation_uuid: UUID | None = None
    created_at: datetime
    manifest: dict[str, ManifestFile] | None = None
    manifest_next: str | None = Field(default=None, description="Where to go on: ?include=manifest&cursor=…")


class DiffEntry(Reply):
    path: str
    kind: str
    size: int
    sha256: str | None
    path_base64: str | None = None


class DiffChange(Reply):
    path: str
    what: list[str]
    kind: str
    old_size: int
    new_size: int
    old_sha256: str | None
    new_sha256: str | None
    path_base64: str | None = None


class DiffRename(Reply):
    """A hint: a deleted and an added path with the same content. Both are also listed as such."""

    old_path: str
    new_path: str
    sha256: str


class Diff(Reply):
    base: UUID
    target: UUID
    is_cross_project: bool
    added: list[DiffEntry]
    modified: list[DiffChange]
    deleted: list[DiffEntry]
    renamed: list[DiffRename]
    total_changes: int
    summary: str


# Operations, health, lists


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
    status: Literal["healthy", "degraded", "unhealthy"]
    version: str
    services: dict[str, ServiceHealth]
    active_machine_count: int
    utilization_percent: float | None
    last_checkpoint_at: datetime | None
    timestamp: datetime


class Page(Reply):
    total_count: int
    has_more: bool
    next_offset: int | None


class ProjectPage(Page):
    projects: list[Project]


class MachinePage(Page):
    machines: list[Machine]


class CheckpointPage(Page):
    checkpoints: list[Checkpoint]


class LogChunk(Reply):
    """Output of the prompt from byte `offset` on; `next_offset` continues. `finished`: no more will come."""

    offset: int
    next_offset: int
    text: str
    finished: bool
