"""Names, labels and unique uuid prefixes, as words take them, turned into the objects they mean."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from autovibe.cli import output
from autovibe.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from autovibe import schemas
    from autovibe.sdk import Client

_PREFIX = re.compile(r"^[0-9a-f][0-9a-f-]{0,35}$")

Named = TypeVar("Named", bound="schemas.Project | schemas.Machine | schemas.Checkpoint")


def project(client: Client, word: str) -> schemas.Project:
    if (uuid := _uuid(word)) is not None:
        return client.projects.get(uuid)
    if _is_name(word) and (named := client.projects.list(name=word).projects):
        return named[0]
    return _pick("project", word, list(client.projects.each()), lambda item: item.name)


def machine(client: Client, word: str) -> schemas.Machine:
    """By name the machine that lives, else the newest that had the name."""
    if (uuid := _uuid(word)) is not None:
        return client.machines.get(uuid)
    if _is_name(word) and (named := client.machines.list(name=word, limit=200).machines):
        living = [item for item in named if not item.status.is_final]
        return (living or named)[0]
    return _pick("machine", word, list(client.machines.each()), lambda item: item.name)


def checkpoint(client: Client, word: str, *, of: str | None = None) -> schemas.Checkpoint:
    """By label or uuid prefix, among all projects or those of the project `of`."""
    if (uuid := _uuid(word)) is not None:
        return client.checkpoints.get(uuid)
    projects = [project(client, of)] if of else list(client.projects.each())
    found = [item for one in projects for item in client.checkpoints.each(one.uuid)]
    return _pick("checkpoint", word, found, lambda item: item.label)


def experiment(client: Client, word: str) -> UUID:
    """By name the one that is not over, else the newest that had the name."""
    if (uuid := _uuid(word)) is not None:
        return uuid
    found = list(client.hub.each_experiment())
    named = [item for item in found if item.name == word]
    living = [item for item in named if not item.status.is_final]
    return (living or named)[0].uuid if named else by_uuid("experiment", word, found)


def by_uuid(noun: str, word: str, found: Iterable[Any]) -> UUID:
    """The uuid that `word` is, or the one that starts so. Raises NotFound; InvalidRequest for several."""
    if (uuid := _uuid(word)) is not None:
        return uuid
    matches = [item.uuid for item in found if str(item.uuid).startswith(word.lower())]
    if len(matches) == 1:
        return UUID(str(matches[0]))
    shown = output.escape(word[:80])
    if not matches:
        raise NotFound(f"There is no {noun} '{shown}'.", details={"noun": noun, "word": word[:80]})
    raise InvalidRequest(f"'{shown}' means {len(matches)} of them; give more of the uuid.", details={"noun": noun})


def _is_name(word: str) -> bool:
    from autovibe.types import is_name

    return is_name(word)


def _uuid(word: str) -> UUID | None:
    try:
        return UUID(word) if len(word) in (32, 36) else None
    except ValueError:
        return None


def _pick(noun: str, word: str, found: Iterable[Named], name: Any) -> Named:
    """The one object of that name, else the one whose uuid starts so. Raises NotFound; InvalidRequest for several."""
    objects = list(found)
    matches = [item for item in objects if name(item) == word]
    if not matches and _PREFIX.match(word.lower()):
        matches = [item for item in objects if str(item.uuid).startswith(word.lower())]
    if len(matches) == 1:
        return matches[0]
    shown = output.escape(word[:80])
    if not matches:
        raise NotFound(
            f"There is no {noun} '{shown}'; see: autovibe {noun} list{' PROJECT' if noun == 'checkpoint' else ''}",
            details={"noun": noun, "word": word[:80]},
        )
    candidates = ", ".join(sorted(str(item.uuid) for item in matches)[:10])
    raise InvalidRequest(
        f"'{shown}' means {len(matches)} {noun}s; give one of their uuids: {candidates}.",
        details={"noun": noun, "word": word[:80]},
    )
