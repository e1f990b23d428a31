"""What a route needs of a key, and whether a key has it.

    role        viewer < operator < admin; a machine key has none of these and enters only where `own_machine` says so
    project     a key for one project: the objects the path names must be that project's (403; 404 where there is none).
                Routes that name no object are closed to it, unless they narrow themselves (`narrows`): lists show what
                is its project's, and what is made is made there
    scopes      a key may be narrowed to nouns and verbs: "machines:write", "checkpoints:read", "*:read". The noun is
                the first word of the path; GET reads, everything else writes; who may write may read. Whoever has
                any scope may follow operations and events

The table is the `needs(…)` beside each route. A route without one is for admins alone. An admin key costs no question
to the database, a key for one project one question by primary key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlmodel import select

from autovibe.domain import Checkpoint, Machine, Operation, Project
from autovibe.domain.actor import Actor
from autovibe.errors import Forbidden, InvalidRequest, NotFound
from autovibe.store import Store
from autovibe.types import Role

_RANK = {Role.machine: 0, Role.viewer: 1, Role.operator: 2, Role.admin: 3}
_FOR_ANY_SCOPE = ("operations", "events")

SCOPED_NOUNS = (
    "projects",
    "machines",
    "checkpoints",
    "operations",
    "resources",
    "analytics",
    "hub",
    "events",
    "keys",
    "audit",
    "metrics",
)
"""What the noun of a scope can be, beside `*`."""


@dataclass(frozen=True)
class Rule:
    """`objects`: path parameter -> the noun of what it names. `is_heavy`: ten a minute, see `hub.limits`."""

    role: Role = Role.admin
    objects: Mapping[str, str] = field(default_factory=dict)
    narrows: bool = False
    own_machine: bool = False
    is_heavy: bool = False


@dataclass(frozen=True)
class Verb:
    """A route as rules and the audit log see it: `POST /machines/{machine_uuid}/terminate`, and what it needs."""

    method: str
    path: str
    rule: Rule

    @property
    def label(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def noun(self) -> str:
        return self.path.split("/")[1]

    @property
    def is_reading(self) -> bool:
        return self.method in ("GET", "HEAD")


def require(actor: Actor, verb: Verb) -> None:
    """What can be said without looking at an object. Raises Forbidden."""
    rule = verb.rule
    if actor.role == Role.machine:
        if not rule.own_machine:
            raise Forbidden("A machine's own key may only ask for this machine, and report its usage and checkpoints.")
    elif _RANK[actor.role] < _RANK[rule.role]:
        raise Forbidden(
            f"The key '{actor.name}' has the role '{actor.role}', and this takes the role '{rule.role}'.",
            details={"role": str(actor.role), "needed": str(rule.role)},
        )
    elif actor.project_uuid is not None and not rule.objects and not rule.narrows:
        raise Forbidden(
            f"The key '{actor.name}' is for one project, and this concerns the whole Hub.",
            details={"project_uuid": str(actor.project_uuid)},
        )
    if actor.scopes and not _is_in_scope(actor, verb):
        needed = f"{verb.noun}:{'read' if verb.is_reading else 'write'}"
        raise Forbidden(
            f"The key '{actor.name}' is limited to {', '.join(actor.scopes)}, and this takes '{needed}'.",
            details={"scopes": list(actor.scopes), "needed": needed},
        )


def _is_in_scope(actor: Actor, verb: Verb) -> bool:
    if verb.is_reading and verb.noun in _FOR_ANY_SCOPE:
        return True
    verbs = ("read", "write") if verb.is_reading else ("write",)
    return any(f"{noun}:{word}" in actor.scopes for noun in (verb.noun, "*") for word in verbs)


def looks_at_objects(actor: Actor) -> bool:
    """Whether `require_own` has anything to ask for this actor."""
    return actor.project_uuid is not None or actor.machine_uuid is not None


def require_own(store: Store, actor: Actor, verb: Verb, parameters: Mapping[str, Any]) -> None:
    """That the objects the path names are the actor's. Raises Forbidden, NotFound, InvalidRequest for a bad uuid."""
    for parameter, noun in verb.rule.objects.items():
        uuid = _uuid(parameter, str(parameters.get(parameter, "")))
        if actor.machine_uuid is not None:
            if noun != "machine" or uuid != actor.machine_uuid:
                raise Forbidden("A machine's own key may only ask for this machine.", details={"uuid": str(uuid)})
        elif actor.project_uuid is not None and _project_of(store, noun, uuid) != actor.project_uuid:
            raise Forbidden(
                f"The {noun} '{uuid}' does not belong to the project that the key '{actor.name}' is for.",
                details={"uuid": str(uuid), "project_uuid": str(actor.project_uuid)},
            )


def _uuid(parameter: str, word: str) -> UUID:
    try:
        return UUID(word)
    except ValueError:
        raise InvalidRequest(
            f"The request is malformed: path.{parameter}: '{word[:80]}' is no uuid.",
            details={"fields": [{"field": f"path.{parameter}", "message": "It is no uuid.", "type": "uuid"}]},
        ) from None


def _project_of(store: Store, noun: str, uuid: UUID) -> UUID | None:
    """The project of an object, None where it has none. Raises NotFound."""
    found: Any = None
    statement: Any = None
    if noun == "project":
        statement = select(Project.uuid, Project.uuid).where(Project.uuid == uuid)
    elif noun == "machine":
        statement = select(Machine.uuid, Machine.project_uuid).where(Machine.uuid == uuid)
    elif noun == "checkpoint":
        statement = select(Checkpoint.uuid, Checkpoint.project_uuid).where(Checkpoint.uuid == uuid)
    elif noun == "operation":
        owner: Any = Operation.machine_uuid == Machine.uuid
        statement = select(Operation.uuid, Machine.project_uuid).outerjoin(Machine, owner)
        statement = statement.where(Operation.uuid == uuid)
    else:  # a thing of the whole Hub
        return None
    with store.reading() as session:
        found = session.exec(statement).first()
    if found is None:
        raise NotFound(f"There is no {noun} '{uuid}'.", details={"object": noun, "uuid": str(uuid)})
    return found[1]  # type: ignore[no-any-return]


def own_project(actor: Actor, asked: UUID | None = None) -> UUID | None:
    """The project a list is narrowed to: the one asked for, or the only one the actor may see; None for all.

    Raises Forbidden when another one is asked for.
    """
    if asked is not None:
        require_project(actor, asked)
    return asked or actor.project_uuid


def require_project(actor: Actor, project: UUID | None) -> None:
    """That the actor may touch what belongs to that project (None: to the whole Hub). Raises Forbidden."""
    if actor.project_uuid is not None and project != actor.project_uuid:
        what = f"project '{project}'" if project is not None else "the whole Hub"
        raise Forbidden(
            f"The key '{actor.name}' is for another project than {what}.",
            details={"project_uuid": str(actor.project_uuid)},
        )
