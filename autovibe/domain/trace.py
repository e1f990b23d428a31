"""What the code that runs now is about, for the log: set where the work begins, read where a line is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""The id of the request this code runs for."""

operation_id: ContextVar[str] = ContextVar("operation_id", default="-")
"""The operation whose workflow this code is a part of."""

machine: ContextVar[str] = ContextVar("machine", default="-")
"""The uuid of the machine it is about."""

actor: ContextVar[str] = ContextVar("actor", default="-")
"""The name of whom it is done for."""


@contextmanager
def about(*, operation: object = None, machine_uuid: object = None) -> Iterator[None]:
    """Lines that are written inside the block name the operation, the machine, or both."""
    tokens = [(operation_id, operation_id.set(str(operation)))] if operation is not None else []
    tokens.append((machine, machine.set(str(machine_uuid) if machine_uuid is not None else machine.get())))
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)
