"""Machines on the wire, and what is done in their guests."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import Field, model_validator

from autovibe.schemas.wire import Count, MoneyAmount, MoneyOrder, Page, Reply, Request, Text
from autovibe.types import (
    MachineStatus,
    Name,
)


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
    max_time_minutes: float | None = Field(default=None, ge=0, le=10**9, allow_inf_nan=False, strict=True)
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
    create_checkpoint: bool = Field(default=False, strict=True)


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
    timeout_seconds: float = Field(default=120, gt=0, le=3600, allow_inf_nan=False, strict=True)
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


class MachinePage(Page):
    machines: list[Machine]


class LogChunk(Reply):
    """Output of the prompt from byte `offset` on; `next_offset` continues. `finished`: no more will come."""

    offset: int
    next_offset: int
    text: str
    finished: bool
