"""Every error autovibe raises, drawn as one tree.

AutovibeError
├── InvalidRequest              malformed input; the client must change it
├── Unauthorized                no valid key
├── Forbidden                   a valid key without the right
├── NotFound                    no such object
├── Conflict                    the object's state or name forbids it now
│   ├── IdempotencyMismatch     the key was used for another request
│   └── LimitExceeded           a limit, range or quota is used up
├── RateLimited                 too many requests in a minute
├── Unavailable                 a part autovibe needs does not answer; trying again may help
│   ├── HypervisorUnavailable
│   ├── GuestUnreachable
│   └── DatabaseUnavailable
├── OperationFailed             the work was carried out and went wrong
│   ├── HypervisorTaskFailed    a Proxmox task ended badly
│   ├── HypervisorRefused       Proxmox refused the call
│   ├── GuestCommandFailed      a command in the guest ended with another status than 0
│   ├── ProvisionFailed         a playbook failed
│   └── DeadlineExceeded        it took too long; the message names what was waited for
├── InsufficientSpace           a disk is (nearly) full; nothing was started
├── ConfigurationError          a setting is missing or wrong
└── InternalError               a defect of autovibe

`code` is the wire's `error.code`; the docstring is the default message; `message` is for the person, `details` are
values for a program, `log_detail` is for the log alone. The only table from code to HTTP status is in `api/errors.py`,
the only one to exit status in `cli/`. NotYet is no error of a user's: a step raises it to be called again later.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar


class AutovibeError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "ERROR"

    def __init__(self, message: str = "", *, details: dict[str, Any] | None = None, log_detail: str = "") -> None:
        self.message = _shown(message) or inspect.cleandoc(type(self).__doc__ or "")
        self.details = details or {}
        self.log_detail = log_detail
        super().__init__(self.message)

    def to_dict(self) -> dict[str, Any]:
        """The error as a value that survives a journal or the wire; `from_dict` turns it back."""
        return {"code": self.code, "message": self.message, "details": self.details}

    @staticmethod
    def from_dict(value: dict[str, Any]) -> AutovibeError:
        """The error of the class that `value["code"]` names; an unknown code gives a plain AutovibeError."""
        kind = CLASSES.get(str(value.get("code")), AutovibeError)
        return kind(str(value.get("message", "")), details=dict(value.get("details") or {}))


def _shown(text: str) -> str:
    """`text` as any terminal, table and journal takes it: messages quote what guests, playbooks and clients said."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


class InvalidRequest(AutovibeError):
    """The request is malformed."""

    code = "INVALID_REQUEST"


class Unauthorized(AutovibeError):
    """A valid API key is required: send 'Authorization: Bearer <key>'."""

    code = "UNAUTHORIZED"


class Forbidden(AutovibeError):
    """This key does not permit that."""

    code = "FORBIDDEN"


class NotFound(AutovibeError):
    """There is no such object."""

    code = "NOT_FOUND"


class Conflict(AutovibeError):
    """The object's present state does not permit that."""

    code = "CONFLICT"


class IdempotencyMismatch(Conflict):
    """This Idempotency-Key was used for another request; send a new key."""

    code = "IDEMPOTENCY_MISMATCH"


class LimitExceeded(Conflict):
    """A limit is used up."""

    code = "RESOURCE_LIMIT_EXCEEDED"


class RateLimited(AutovibeError):
    """Too many requests; wait as long as Retry-After says."""

    code = "RATE_LIMITED"


class Unavailable(AutovibeError):
    """A part that autovibe needs does not answer; try again."""

    code = "UNAVAILABLE"


class HypervisorUnavailable(Unavailable):
    """The Proxmox API does not answer; check that the node is up (autovibe doctor)."""

    code = "HYPERVISOR_UNAVAILABLE"


class GuestUnreachable(Unavailable):
    """The guest does not answer on SSH."""

    code = "GUEST_UNREACHABLE"


class DatabaseUnavailable(Unavailable):
    """The database does not answer."""

    code = "DATABASE_UNAVAILABLE"


class OperationFailed(AutovibeError):
    """The operation failed."""

    code = "OPERATION_FAILED"


class HypervisorTaskFailed(OperationFailed):
    """A Proxmox task failed."""

    code = "HYPERVISOR_TASK_FAILED"


class HypervisorRefused(OperationFailed):
    """Proxmox refused the call."""

    code = "HYPERVISOR_REFUSED"


class GuestCommandFailed(OperationFailed):
    """A command in the guest failed."""

    code = "GUEST_COMMAND_FAILED"


class ProvisionFailed(OperationFailed):
    """The playbook failed."""

    code = "PROVISION_FAILED"


class DeadlineExceeded(OperationFailed):
    """It took too long."""

    code = "DEADLINE_EXCEEDED"


class InsufficientSpace(AutovibeError):
    """There is not enough free disk space; nothing was started."""

    code = "INSUFFICIENT_SPACE"


class ConfigurationError(AutovibeError):
    """A setting is missing or wrong."""

    code = "CONFIGURATION_ERROR"


class InternalError(AutovibeError):
    """Something went wrong inside autovibe; the Hub's log has the details under the request id."""

    code = "INTERNAL_ERROR"


class NotYet(Exception):
    """What a step waits for has not happened yet; the step is called again. The text says what is waited for."""


def _tree(root: type[AutovibeError]) -> dict[str, type[AutovibeError]]:
    found = {root.code: root}
    for kind in root.__subclasses__():
        found.update(_tree(kind))
    return found


CLASSES: dict[str, type[AutovibeError]] = _tree(AutovibeError)
"""Every code and its class."""
