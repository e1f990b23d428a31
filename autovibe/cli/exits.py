"""The only table from an error's code to the exit status of the command line."""

from __future__ import annotations

from autovibe.errors import AutovibeError

OK = 0
DIFFERENT = 1
"""`checkpoint diff --exit-code` found a difference."""
USAGE = 2
NOT_FOUND = 3
CONFLICT = 4
ACCESS = 5
UNREACHABLE = 6
FAILED = 7
INTERRUPTED = 130

EXIT_STATUS: dict[str, int] = {
    "ERROR": FAILED,
    "INVALID_REQUEST": USAGE,
    "UNAUTHORIZED": ACCESS,
    "FORBIDDEN": ACCESS,
    "NOT_FOUND": NOT_FOUND,
    "CONFLICT": CONFLICT,
    "IDEMPOTENCY_MISMATCH": CONFLICT,
    "RESOURCE_LIMIT_EXCEEDED": CONFLICT,
    "RATE_LIMITED": CONFLICT,
    "UNAVAILABLE": UNREACHABLE,
    "HYPERVISOR_UNAVAILABLE": UNREACHABLE,
    "GUEST_UNREACHABLE": UNREACHABLE,
    "DATABASE_UNAVAILABLE": UNREACHABLE,
    "OPERATION_FAILED": FAILED,
    "HYPERVISOR_TASK_FAILED": FAILED,
    "HYPERVISOR_REFUSED": FAILED,
    "GUEST_COMMAND_FAILED": FAILED,
    "PROVISION_FAILED": FAILED,
    "DEADLINE_EXCEEDED": FAILED,
    "INSUFFICIENT_SPACE": CONFLICT,
    "CONFIGURATION_ERROR": USAGE,
    "INTERNAL_ERROR": FAILED,
}


def exit_status(error: AutovibeError) -> int:
    return EXIT_STATUS.get(error.code, FAILED)
