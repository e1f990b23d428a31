"""What things are: tables, states and their arithmetic. No I/O; importing this package declares every table."""

from autovibe.domain.actor import ApiKey, HubKey
from autovibe.domain.checkpoint import Checkpoint
from autovibe.domain.machine import Allotment, Machine, Output
from autovibe.domain.operation import Event, IdempotencyKey, Operation
from autovibe.domain.project import Project

__all__ = [
    "Allotment",
    "ApiKey",
    "Checkpoint",
    "Event",
    "HubKey",
    "IdempotencyKey",
    "Machine",
    "Operation",
    "Output",
    "Project",
]
