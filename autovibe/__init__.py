"""autovibe: AI agents in virtual machines on your own Proxmox VE cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autovibe.errors import (
    AutovibeError,
    ConfigurationError,
    Conflict,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    OperationFailed,
    Unauthorized,
    Unavailable,
)
from autovibe.version import __version__

if TYPE_CHECKING:
    from autovibe.sdk import Client

__all__ = [
    "AutovibeError",
    "Client",
    "ConfigurationError",
    "Conflict",
    "DeadlineExceeded",
    "Forbidden",
    "InvalidRequest",
    "LimitExceeded",
    "NotFound",
    "OperationFailed",
    "Unauthorized",
    "Unavailable",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """`Client` is imported when it is first used: the two programs need no HTTP client to start."""
    if name == "Client":
        from autovibe.sdk import Client

        return Client
    raise AttributeError(f"module 'autovibe' has no attribute '{name}'")
