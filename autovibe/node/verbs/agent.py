"""The guest agent's calls. Bytes of the guest come and go as Latin-1, as on a real Proxmox."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from autovibe.node.refusal import Refusal, faulty
from autovibe.node.state import Call, State
from autovibe.node.vm.agent import READ_LIMIT_BYTES, AgentRefused

if TYPE_CHECKING:
    from autovibe.node.vm.agent import Agent

READING = (
    "get-fsinfo", "get-host-name", "get-memory-block-info", "get-memory-blocks", "get-osinfo", "get-time",
    "get-timezone", "get-users", "get-vcpus", "info", "network-get-interfaces",
)  # fmt: skip
ACTING = (
    "fsfreeze-freeze", "fsfreeze-status", "fsfreeze-thaw", "fstrim", "ping", "shutdown", "suspend-disk",
    "suspend-hybrid", "suspend-ram",
)  # fmt: skip
COMMANDS = tuple(sorted((*READING, *ACTING)))
"""Commands without arguments; the API's name is the agent's without `guest-`."""

TAKING = ("exec", "exec-status", "file-read", "file-write", "set-user-password")
"""Those with arguments, which have a verb each."""


def _reach(state: State, call: Call) -> Agent:
    """The agent, once it has answered; raises one of Proxmox's three reasons why it cannot."""
    config = state.configs.load(call.vmid)
    if "agent" not in config.values:
        raise Refusal("No QEMU guest agent configured")
    if not state.qemu.is_running(call.vmid):
        raise Refusal(f"VM {call.vmid} is not running")
    agent = state.qemu.agent(call.vmid)
    agent.ping()
    return agent


def index(_state: State, _call: Call) -> list[dict[str, str]]:
    """The same for every VM, also for one that does not exist."""
    return [{"name": name} for name in sorted((*COMMANDS, *TAKING))]


def run(state: State, call: Call) -> dict[str, Any]:
    """`POST agent?command=…`, the form of old."""
    return command(call["command"], state, call)


def command(name: str, state: State, call: Call) -> dict[str, Any]:
    """What the agent returned; its own error is a result too, with status 200, and clients look for it there."""
    agent = _reach(state, call)
    try:
        return {"result": {} if name == "ping" else agent.call(name)}
    except AgentRefused as refused:
        return {"result": {"error": refused.error}}


def execute(state: State, call: Call) -> dict[str, int]:
    argv, data = call["command"], call.get("input-data")
    if not argv and data is None:
        raise Refusal("command or input-data (or both) required")
    return {"pid": _reach(state, call).exec(argv, input_data=None if data is None else _bytes(data))}


def execution(state: State, call: Call) -> dict[str, Any]:
    """How a program goes; its end is told once."""
    return _reach(state, call).exec_status(call["pid"])


def read_file(state: State, call: Call) -> dict[str, Any]:
    limit, offset = call.get("count", READ_LIMIT_BYTES), call.get("offset", 0)
    answer = _reach(state, call).read_file(call["file"], limit=limit, offset=offset)
    if call.get("decode", True):
        return answer
    return {**answer, "content": base64.b64encode(answer["content"].encode("latin1")).decode()}


def write_file(state: State, call: Call) -> None:
    """Replace a guest's file; `encode=0` says that the content is base64 already, the way for any bytes."""
    if call.get("encode", True):
        content = _bytes(call["content"])
    else:
        try:
            content = base64.b64decode(call["content"], validate=True)
        except ValueError:
            raise faulty({"content": "value is not valid base64"}) from None
    _reach(state, call).write_file(call["file"], content)


def set_password(state: State, call: Call) -> dict[str, Any]:
    password = base64.b64encode(_bytes(call["password"])).decode()
    crypted = bool(call.get("crypted"))
    agent = _reach(state, call)
    return {"result": agent.call("set-user-password", username=call["username"], password=password, crypted=crypted)}


def _bytes(text: str) -> bytes:
    """Each character is a byte, so that what `file-read` told can be written again; others are refused, as by Perl."""
    try:
        return text.encode("latin1")
    except UnicodeEncodeError:
        raise Refusal("Wide character in subroutine entry") from None
