"""High availability, of which a single node has none: nothing is managed, and the manager stands by."""

from __future__ import annotations

import re
from typing import Any

from autovibe.node.refusal import Refusal
from autovibe.node.state import Call, State

_GROUPS_ARE_GONE = "ha groups have been migrated to rules"
"""What Proxmox 9 says of groups where none is left to migrate, as on every fresh installation."""


def resource_id(text: str) -> None:
    if not re.fullmatch(r"[a-z]+:\S+|\d{1,18}", text, re.ASCII):
        raise ValueError("value does not look like a valid ha resource id")


def index(_state: State, _call: Call) -> list[dict[str, str]]:
    return [{"id": name} for name in ("status", "resources", "groups", "rules")]


def status_index(_state: State, _call: Call) -> list[dict[str, str]]:
    return [{"name": name} for name in ("current", "manager_status")]


def status(state: State, _call: Call) -> list[dict[str, Any]]:
    standby = {"id": "fencing", "type": "fencing", "armed-state": "standby", "status": "standby (CRM watchdog standby)"}
    return [
        {"id": "quorum", "type": "quorum", "node": state.name, "status": "OK", "quorate": 1},
        {**standby, "node": state.name},
    ]


def manager_status(state: State, _call: Call) -> dict[str, Any]:
    return {"manager_status": {}, "quorum": {"node": state.name, "quorate": "1"}}


def resource(state: State, call: Call) -> None:
    sid = call["sid"]
    if sid.isdecimal():
        if not state.configs.exists(int(sid)):
            raise Refusal(f"unable do add resource - VM/CT {sid} does not exist")
        sid = f"vm:{sid}"
    raise Refusal(f"no such resource '{sid}'")


def list_groups(_state: State, _call: Call) -> None:
    raise Refusal(f"cannot index groups: {_GROUPS_ARE_GONE}")


def group(_state: State, call: Call) -> None:
    raise Refusal(f"cannot read group '{call['group']}': {_GROUPS_ARE_GONE}")


def rule(_state: State, call: Call) -> None:
    raise Refusal(f"no such ha rule '{call['rule']}'")
