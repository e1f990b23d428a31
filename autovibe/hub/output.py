"""The prompt's output as it is kept: stretches of bytes in order, collected from the guest, read in chunks."""

from __future__ import annotations

from typing import Any, NamedTuple
from uuid import UUID

from sqlmodel import Session, col, select

from autovibe import schemas
from autovibe.domain import Machine, Output
from autovibe.domain.columns import now
from autovibe.domain.machine_type import machine_type
from autovibe.guest import agent
from autovibe.hub import Hub
from autovibe.store import rows
from autovibe.types import MachineStatus

CHUNK_BYTES = 256 * 1024
KEPT_BYTES = 64 * 1024 * 1024
"""Of one prompt; what it writes beyond that is not kept, so that no guest can fill the hub's disk."""

_LONGEST_CHARACTER = 4  # bytes, in UTF-8
_NOTE = b"\n[autovibe: what the prompt wrote beyond 64 MiB is not kept]\n"
_LOST_STATUS = 255  # of a prompt that vanished with its guest's memory, as when the guest was restarted


class Found(NamedTuple):
    """`is_news`: something was kept. `is_behind`: there is more to fetch at once."""

    is_news: bool
    is_behind: bool


NOTHING = Found(is_news=False, is_behind=False)


def collect(hub: Hub, machine: Machine) -> Found:
    """Ask the guest for what the prompt wrote since the last time, and keep it; when the prompt has ended, record that.

    Raises GuestUnreachable, GuestCommandFailed, Conflict for a machine without an address.
    """
    begin = machine.output_bytes
    state = agent.poll(hub.guests, hub.address_of(machine), begin, max(min(CHUNK_BYTES, KEPT_BYTES - begin), 0))
    body = state.output
    if begin < KEPT_BYTES <= begin + len(body) < state.output_size:
        body += _NOTE
    end = begin + len(body)
    is_behind = end < min(state.output_size, KEPT_BYTES)
    changes: dict[str, Any] = {}
    if body:
        tail = body[-4096:].decode(errors="replace")
        line = machine_type(machine.type).parse_progress(tail)
        changes |= {"output_bytes": end, "progress": "".join(c if c.isprintable() else " " for c in line)[:200]}
    if not state.is_running and not is_behind:
        changes |= {"status": MachineStatus.active, "finished_at": now(), "watched_by": None, "watched_until": None}
        changes["exit_status"] = _LOST_STATUS if state.exit_status is None else state.exit_status
        if state.exit_status is None:
            changes["error_message"] = "The prompt was lost: its guest was restarted while it ran."
    if not changes:
        return NOTHING
    with hub.store.transaction() as session:
        # A checkpoint or a terminate may have taken the machine meanwhile; it is then asked again later, or never.
        expected = {"output_bytes": begin, "status": MachineStatus.working}
        if not rows.compare_and_set(
            session, Machine, machine.uuid, expect=expected, change={**changes, "updated_at": now()}
        ):
            return NOTHING
        if body:
            session.add(Output(machine_uuid=machine.uuid, start=begin, body=body))
            rows.record(session, "machine.output", machine.uuid, machine.project_uuid, end=end)
        if "status" in changes:
            body_of_event = {"status": str(changes["status"]), "exit_status": changes["exit_status"]}
            rows.record(session, "machine.status", machine.uuid, machine.project_uuid, **body_of_event)
    return Found(is_news=True, is_behind=is_behind)


def chunk(hub: Hub, machine: UUID, offset: int, limit: int = CHUNK_BYTES) -> schemas.LogChunk:
    """At most `limit` bytes of output from byte `offset` on, cut between characters.

    `finished` says that nothing will come behind the end of this chunk. Raises NotFound.
    """
    with hub.store.reading() as session:
        row = rows.get(session, Machine, machine)
        is_over = _is_over(row)
        body = _read(session, machine, offset, limit)
        is_last = offset + len(body) >= row.output_bytes
    kept = _whole_characters(body) if not (is_over and is_last) else body
    if body and not kept and limit < _LONGEST_CHARACTER:  # never stand still
        kept = body
    end = offset + len(kept)
    return schemas.LogChunk(
        offset=offset, next_offset=end, text=kept.decode(errors="replace"), finished=is_over and end >= row.output_bytes
    )


def _is_over(machine: Machine) -> bool:
    """Whether no more output will come: the prompt has ended, there is none, or the machine is gone."""
    if MachineStatus(machine.status).is_final or machine.finished_at is not None:
        return True
    return machine.prompt is None and machine.status != MachineStatus.spawning


def _read(session: Session, machine: UUID, offset: int, limit: int) -> bytes:
    # The stretch that holds `offset` is the last one that begins at or before it.
    before = select(Output.start).where(Output.machine_uuid == machine, Output.start <= offset)
    first = session.exec(before.order_by(col(Output.start).desc()).limit(1)).first()
    statement = (
        select(Output)
        .where(Output.machine_uuid == machine, Output.start >= (first or 0), Output.start < offset + limit)
        .order_by(col(Output.start))
    )
    body = bytearray()
    for stretch in session.exec(statement):
        begin = max(offset - stretch.start, 0)
        body += stretch.body[begin : begin + limit - len(body)]
        if len(body) >= limit:
            break
    return bytes(body)


def _whole_characters(body: bytes) -> bytes:
    """Without the beginning of a UTF-8 character whose rest has not come; other bytes that are not UTF-8 stay."""
    for length in range(1, min(_LONGEST_CHARACTER, len(body) + 1)):
        byte = body[-length]
        if byte & 0b1100_0000 == 0b1000_0000:  # a continuation: look for the lead before it
            continue
        wanted = 4 if byte >= 0b1111_0000 else 3 if byte >= 0b1110_0000 else 2 if byte >= 0b1100_0000 else 1
        return body[:-length] if wanted > length else body
    return body
