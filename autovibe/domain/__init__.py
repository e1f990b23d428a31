"""What things are: tables, states and their arithmetic. No I/O; importing this package declares every table."""

from autovibe.domain.actor import ApiKey, HubKey, ServerKey
from autovibe.domain.audit import AuditEntry, RateLease
from autovibe.domain.budget import Account, LedgerEntry, Reservation
from autovibe.domain.checkpoint import Checkpoint
from autovibe.domain.hub_instance import ApiTraffic, Experiment, HubCheckpoint, HubState
from autovibe.domain.machine import Allotment, Machine, Output
from autovibe.domain.operation import Event, IdempotencyKey, Operation
from autovibe.domain.project import Project

__all__ = [
    "Account",
    "Allotment",
    "ApiKey",
    "ApiTraffic",
    "AuditEntry",
    "Checkpoint",
    "Event",
    "Experiment",
    "HubCheckpoint",
    "HubKey",
    "HubState",
    "IdempotencyKey",
    "LedgerEntry",
    "Machine",
    "Operation",
    "Output",
    "Project",
    "RateLease",
    "Reservation",
    "ServerKey",
]
