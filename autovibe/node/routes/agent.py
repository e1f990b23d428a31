"""Routes about a guest's agent."""

from __future__ import annotations

from functools import partial

from autovibe.node.access.permissions import ALL_USERS
from autovibe.node.routes.route import START, A, Route, on_vm, route
from autovibe.node.schema.options import FLAG
from autovibe.node.schema.parameters import Param, Table
from autovibe.node.verbs import agent

_FILE_READ: Table = {
    "file": Param(optional=False),
    "count": Param("integer", minimum=1, maximum=16777216),
    "offset": START,
    "decode": FLAG,
}
_FILE_WRITE: Table = {
    "file": Param(optional=False),
    "content": Param(optional=False, max_length=61440, is_multiline=True, is_binary=True),
    "encode": FLAG,
}
_EXEC: Table = {
    "command": Param("array", optional=False, is_multiline=True),
    "input-data": Param(max_length=65536, is_multiline=True, is_binary=True),
}
_PASSWORD: Table = {
    "username": Param(optional=False),
    "password": Param(optional=False, min_length=5, max_length=1024),
    "crypted": FLAG,
}

_ANY = "VM.GuestAgent.Unrestricted"
_AUDIT = on_vm("VM.GuestAgent.Audit", _ANY, any=True)
_FILE_SYSTEMS = on_vm("VM.GuestAgent.FileSystemMgmt", _ANY, any=True)
_POWER = on_vm("VM.PowerMgmt", _ANY, any=True)
_ACTING = {
    "fsfreeze-freeze": _FILE_SYSTEMS,
    "fsfreeze-status": on_vm("VM.GuestAgent.Audit", "VM.GuestAgent.FileSystemMgmt", _ANY, any=True),
    "fsfreeze-thaw": _FILE_SYSTEMS,
    "fstrim": _FILE_SYSTEMS,
    "ping": _AUDIT,
    "shutdown": _POWER,
    "suspend-disk": _POWER,
    "suspend-hybrid": _POWER,
    "suspend-ram": _POWER,
}

ROUTES: tuple[Route, ...] = (
    route("GET", A, agent.index, ALL_USERS),
    route(
        "POST",
        A,
        agent.run,
        on_vm("VM.GuestAgent.Unrestricted", any=True),
        {"command": Param(optional=False, enum=agent.COMMANDS)},
    ),
    *(route("GET", f"{A}/{name}", partial(agent.command, name), _AUDIT) for name in agent.READING),
    *(route("POST", f"{A}/{name}", partial(agent.command, name), _ACTING[name]) for name in agent.ACTING),
    route("POST", f"{A}/exec", agent.execute, on_vm("VM.GuestAgent.Unrestricted"), _EXEC),
    route(
        "GET",
        f"{A}/exec-status",
        agent.execution,
        on_vm("VM.GuestAgent.Unrestricted"),
        {"pid": Param("integer", optional=False)},
    ),
    route(
        "GET",
        f"{A}/file-read",
        agent.read_file,
        on_vm("VM.GuestAgent.FileRead", "VM.GuestAgent.Unrestricted", any=True),
        _FILE_READ,
    ),
    route(
        "POST",
        f"{A}/file-write",
        agent.write_file,
        on_vm("VM.GuestAgent.FileWrite", "VM.GuestAgent.Unrestricted", any=True),
        _FILE_WRITE,
    ),
    route(
        "POST",
        f"{A}/set-user-password",
        agent.set_password,
        on_vm("VM.GuestAgent.Unrestricted"),
        _PASSWORD,
    ),
)
