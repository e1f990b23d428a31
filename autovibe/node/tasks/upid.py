"""UPIDs, Proxmox's names of tasks: `UPID:node:pid:pstart:starttime:type:id:user:`, the three numbers in hexadecimal."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from autovibe.node.refusal import faulty

_UPID = re.compile(
    r"UPID:([a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?):([0-9A-F]{8}):([0-9A-F]{8,9}):([0-9A-F]{8}):"
    r"([^:\s/]+):([^:\s/]*):([^:\s/]+):"
)


class Upid(NamedTuple):
    """`user` is the full name, of a token too: `root@pam!autovibe`."""

    node: str
    pid: int
    pstart: int
    starttime: int
    type: str
    id: str
    user: str

    def __str__(self) -> str:
        numbers = f"{self.pid:08X}:{self.pstart:08X}:{self.starttime:08X}"
        return f"UPID:{self.node}:{numbers}:{self.type}:{self.id}:{self.user}:"

    @classmethod
    def parse(cls, text: str) -> Upid:
        """Raises the 400 of a malformed UPID."""
        match = _UPID.fullmatch(text)
        if match is None:
            raise faulty({"upid": "unable to parse worker upid"})
        node, pid, pstart, starttime, kind, object_id, user = match.groups()
        return cls(node, int(pid, 16), int(pstart, 16), int(starttime, 16), kind, object_id, user)

    def facts(self) -> dict[str, Any]:
        """The fields that every answer about a task carries."""
        user, bang, token = self.user.partition("!")
        facts: dict[str, Any] = {
            "upid": str(self),
            "node": self.node,
            "pid": self.pid,
            "pstart": self.pstart,
            "starttime": self.starttime,
            "type": self.type,
            "id": self.id,
            "user": user,
        }
        return {**facts, "tokenid": token} if bang else facts
