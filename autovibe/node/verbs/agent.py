"""The guest agent's calls. Bytes of the guest come and go as Latin-1, as on a real Proxmox."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any

from autovibe.node.refusal import Refusal, faulty
from autovibe.node.state import Call, State, is_agent_enabled

if TYPE_CHECKING:
    from autovibe.node.agent import Agent

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


def _reach(state: State, call: Call) -> Agent:
    """The agent, once it has answered; raises one of Proxmox's three reasons why it cannot."""
    config = state.configs.load(call.vmid)
    if not state.qemu.is_running(call.vmid):
        raise Refusal(f"VM {call.vmid} is not running")
    if not is_agent_enabled(config):
        raise Refusal("No QEMU guest agent configured")
    agent = state.qemu.agent(call.vmid)
    agent.ping()
    return agent


def index(state: State, call: Call) -> list[dict[str, str]]:
    state.configs.load(call.vmid)
    return [{"name": name} for name in sorted((*COMMANDS, "exec", "exec-status", "file-read", "file-write"))]


def run(state: State, call: Call) -> dict[str, Any]:
    """`POST agent?command=…`, the form of old."""
    return command(call["command"], state, call)


def command(name: str, state: State, call: Call) -> dict[str, Any]:
    agent = _reach(state, call)
    return {"result": {} if name == "ping" else agent.call(name)}


def execute(state: State, call: Call) -> dict[str, int]:
    argv = call["command"]
    if not argv or not argv[0]:
        raise faulty({"command": "property is missing and it is not optional"})
    data = call.get("input-data")
    return {"pid": _reach(state, call).exec(argv, input_data=None if data is None else data.encode())}


def execution(state: State, call: Call) -> dict[str, Any]:
    """How a program goes; its end is told once."""
    return _reach(state, call).exec_status(call["pid"])


def read_file(state: State, call: Call) -> dict[str, Any]:
    if call.get("offset"):
        raise faulty({"offset": "reading from an offset is not implemented by this node"})
    answer = _reach(state, call).read_file(call["file"], limit=call.get("count", 16 << 20))
    if call.get("decode", True):
        return answer
    return {**answer, "content": base64.b64encode(answer["content"].encode("latin1")).decode()}


def write_file(state: State, call: Call) -> None:
    """Text goes as UTF-8; `encode=0` says that the content is base64 already, the way for bytes."""
    content = call["content"].encode()
    if not call.get("encode", True):
        try:
            content = base64.b64decode(content, validate=True)
        except binascii.Error:
            raise faulty({"content": "value is not valid base64"}) from None
    _reach(state, call).write_file(call["file"], content)


def set_password(state: State, call: Call) -> dict[str, Any]:
    password = base64.b64encode(call["password"].encode()).decode()
    crypted = bool(call.get("crypted"))
    agent = _reach(state, call)
    return {"result": agent.call("set-user-password", username=call["username"], password=password, crypted=crypted)}
