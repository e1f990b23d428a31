"""How the node says no, in Proxmox's own words: an HTTP error before a task is started, `TASK ERROR` inside one."""

from __future__ import annotations

from collections.abc import Mapping


class Refusal(Exception):
    """`status` and `message` become the status line; `errors` names the faulty parameters (400).

    Proxmox answers 500 for nearly everything that goes wrong, also for what does not exist. `is_bare` answers have
    neither a body nor a content type (failed authentication, unknown methods); `delay_seconds` slows down guessing.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 500,
        errors: Mapping[str, str] | None = None,
        is_bare: bool = False,
        delay_seconds: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.errors = dict(errors or {})
        self.is_bare = is_bare
        self.delay_seconds = delay_seconds


def faulty(errors: Mapping[str, str]) -> Refusal:
    """The 400 that reports every faulty parameter together."""
    return Refusal("Parameter verification failed.", status=400, errors=errors)


def not_implemented(what: str) -> Refusal:
    """The 501 of a path or an option this node does not have."""
    return Refusal(what, status=501)
