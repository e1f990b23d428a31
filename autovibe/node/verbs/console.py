"""Consoles of VMs: display and serial terminal, asked for here and talked to over a websocket.

A ticket for the display begins with the password that its VNC server will ask for. The certificate is the node's own:
who checks it before he opens the websocket has what he needs.
"""

from __future__ import annotations

import re
import secrets
import string
from typing import Any

from autovibe.node import console
from autovibe.node.console import Session
from autovibe.node.http.messages import Channel, Talk
from autovibe.node.refusal import Refusal, not_implemented
from autovibe.node.state import Call, State, start_vm_task

_PASSWORD_LENGTH = 8  # all that VNC knows
REFUSED_SECONDS = 3.0
_SERIAL = re.compile(r"serial[0-3]")


def vncproxy(state: State, call: Call) -> dict[str, Any]:
    """A display. With `vga: serialN` a real one shows the serial line in a VNC client; here that takes `termproxy`."""
    config = state.configs.load(call.vmid)
    if _serial_of(config.get("vga")):
        raise not_implemented("A serial terminal over VNC is not implemented, use termproxy")
    session = state.consoles.open(call.vmid, call.actor.name, "vnc")
    upid = _start(state, call, session)
    password = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(_PASSWORD_LENGTH))
    return {
        **_facts(state, call, session, upid, prefix=f"{password}:"),
        "cert": (state.home / "cert.pem").read_text(encoding="ascii"),
        "password": password,
    }


def termproxy(state: State, call: Call) -> dict[str, Any]:
    """A terminal on a serial port; without one nothing comes up on the port, which is what a real one says then."""
    config = state.configs.load(call.vmid)
    port = call.get("serial") or _serial_of(config.get("vga")) or _first_serial(config.values)
    if config.get(port) != "socket":
        raise Refusal(f"Timeout while waiting for port '{console.PORTS.start}' to get ready!")
    session = state.consoles.open(call.vmid, call.actor.name, port)
    return _facts(state, call, session, _start(state, call, session))


def spiceproxy(state: State, call: Call) -> None:
    """The VMs of this node have no SPICE server, so this is what one without it answers."""
    state.configs.load(call.vmid)
    if not state.qemu.is_running(call.vmid):
        raise Refusal(f"VM {call.vmid} not running")
    raise Refusal("no spice port")


def vncwebsocket(state: State, call: Call) -> Channel:
    """The connection to what was asked for; as a plain request only the port."""
    vmid, port, ticket, user = call.vmid, call["port"], call["vncticket"], call.actor.name
    if not _admits(state, vmid, port, user, ticket):
        raise Refusal("permission denied - invalid PVEVNC ticket", status=401, delay_seconds=REFUSED_SECONDS)

    def open_console() -> Talk:
        session = state.consoles.take(port, vmid, user)
        if session.device == "vnc":
            return console.talk_vnc(state.qemu, session, ticket)
        return console.talk_terminal(
            state.qemu, session, lambda who, what: who == user and _admits(state, vmid, port, who, what)
        )

    return Channel({"port": str(port)}, open_console)


def _admits(state: State, vmid: int, port: int, user: str, ticket: str) -> bool:
    return state.auth.is_vnc_ticket_valid(ticket, user, f"/vms/{vmid}", port)


def _serial_of(vga: str) -> str:
    kind = vga.split(",")[0].removeprefix("type=")
    return kind if _SERIAL.fullmatch(kind) else ""


def _first_serial(values: dict[str, str]) -> str:
    return min((key for key in values if _SERIAL.fullmatch(key)), default="serial0")


def _start(state: State, call: Call, session: Session) -> str:
    """The task that runs while the console is open; of a terminal too it is called `vncproxy`."""
    try:
        return start_vm_task(state, call, "vncproxy", lambda task: _watch(state, session, task), device=session.device)
    except BaseException:
        state.consoles.close(session)
        raise


def _watch(state: State, session: Session, task: Any) -> None:
    try:
        session.watch(task)
    finally:
        state.consoles.close(session)


def _facts(state: State, call: Call, session: Session, upid: str, prefix: str = "") -> dict[str, Any]:
    ticket = state.auth.vnc_ticket(call.actor, f"/vms/{call.vmid}", session.port)
    return {"user": call.actor.name, "ticket": prefix + ticket, "port": str(session.port), "upid": upid}
