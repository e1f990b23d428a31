"""API keys: create, show, list, revoke."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

from sqlmodel import Session, col, select

from autovibe import schemas
from autovibe.domain import ApiKey, Project
from autovibe.domain.actor import Actor
from autovibe.domain.columns import now
from autovibe.errors import Conflict, InvalidRequest, NotFound
from autovibe.hub import Hub, rules
from autovibe.hub.operations import Accepted, Once, accept
from autovibe.hub.pages import Cut, cut
from autovibe.store import rows
from autovibe.types import KeyStatus, Role


def create(hub: Hub, actor: Actor, order: schemas.ApiKeyOrder, once: Once | None = None) -> schemas.ApiKeyMade:
    """A new key; its text is in this answer and nowhere else. Raises InvalidRequest, NotFound (no such project)."""
    expires_at = _end(order)
    _require_known(order.scopes)
    made: list[str] = []

    def decide(session: Session, _attempt: int) -> Accepted:
        if order.project_uuid is not None:
            rows.get(session, Project, order.project_uuid)
        row, key = hub.keyring.issue(
            session,
            name=order.name,
            role=order.role,
            created_by=actor.name,
            project_uuid=order.project_uuid,
            scopes=" ".join(sorted(set(order.scopes))),
            expires_at=expires_at,
        )
        made[:] = [key]
        rows.record(session, "key.created", row.uuid, row.project_uuid, actor=actor.name)
        return Accepted(row.uuid)

    shown = show(hub, accept(hub, actor, once, "key", decide))
    return schemas.ApiKeyMade(**dict(shown), key=made[0] if made else None)


def _end(order: schemas.ApiKeyOrder) -> datetime | None:
    if order.expires_in_days is not None:
        return now() + timedelta(days=order.expires_in_days)
    if order.expires_at is not None and order.expires_at <= now():
        raise InvalidRequest("'expires_at' is in the past.", details={"field": "expires_at"})
    return order.expires_at


def _require_known(scopes: list[str]) -> None:
    for scope in scopes:
        noun = scope.partition(":")[0]
        if noun != "*" and noun not in rules.SCOPED_NOUNS:
            raise InvalidRequest(
                f"'{scope}' is no scope: its noun is one of {', '.join(rules.SCOPED_NOUNS)}, or *.",
                details={"field": "scopes", "nouns": list(rules.SCOPED_NOUNS)},
            )


def show(hub: Hub, uuid: UUID) -> schemas.ApiKey:
    """Raises NotFound."""
    with hub.store.reading() as session:
        return _wire(_get(session, uuid))


def index(hub: Hub, part: Cut, *, status: KeyStatus | None = None, machines: bool = False) -> schemas.ApiKeyPage:
    """Newest first; those of machines only when asked for, since every machine has one."""
    statement = select(ApiKey)
    if not machines:
        statement = statement.where(col(ApiKey.machine_uuid).is_(None))
    expires, is_over = col(ApiKey.expires_at), col(ApiKey.expires_at) <= now()
    if status is KeyStatus.revoked:
        statement = statement.where(col(ApiKey.revoked_at).is_not(None))
    elif status is not None:
        state = is_over if status is KeyStatus.expired else (expires.is_(None) | ~is_over)
        statement = statement.where(col(ApiKey.revoked_at).is_(None), state)
    with hub.store.reading() as session:
        found = cut(session, statement.order_by(col(ApiKey.created_at).desc(), col(ApiKey.uuid)), part)
        return schemas.ApiKeyPage(keys=[_wire(row) for row in found.rows], **found.page())


def revoke(hub: Hub, actor: Actor, uuid: UUID) -> schemas.ApiKey:
    """End the key: at once here, within five seconds on other hub processes. Again: it stays as it is.

    Raises NotFound, Conflict for the last usable admin key.
    """

    def decide(session: Session, _attempt: int) -> Accepted:
        # All admin keys are held, so that of two that revoke each other's one comes second and is refused.
        session.exec(select(ApiKey.id).where(ApiKey.role == Role.admin).order_by(col(ApiKey.id)).with_for_update())
        row = _get(session, uuid)
        if row.revoked_at is None:
            _require_another_admin(session, row)
            row.revoked_at = now()
            session.add(row)
            rows.record(session, "key.revoked", row.uuid, row.project_uuid, actor=actor.name)
        return Accepted(uuid)

    accept(hub, actor, None, "key", decide)
    with hub.store.reading() as session:
        row = _get(session, uuid)
    hub.keys.forget(row.id)
    return _wire(row)


def _require_another_admin(session: Session, row: ApiKey) -> None:
    if not _makes_keys(row):
        return
    others = session.exec(select(ApiKey).where(ApiKey.role == Role.admin, ApiKey.id != row.id))
    if not any(_makes_keys(other) for other in others):
        raise Conflict(f"'{row.name}' ({row.id}) is the last usable admin key; create another one, then revoke it.")


def _makes_keys(row: ApiKey) -> bool:
    """Whether other keys can be made with it, and so whatever is needed: not with one for other nouns alone."""
    scopes = row.scopes.split()
    is_narrowed = bool(scopes) and not {"keys:write", "*:write"} & set(scopes)
    return row.role == Role.admin and row.status == KeyStatus.usable and not is_narrowed


def _get(session: Session, uuid: UUID) -> ApiKey:
    row = session.exec(select(ApiKey).where(ApiKey.uuid == uuid)).first()
    if row is None:
        raise NotFound(f"There is no key '{uuid}'.", details={"object": "key", "uuid": str(uuid)})
    return row


def _wire(row: ApiKey) -> schemas.ApiKey:
    same = {name: getattr(row, name) for name in _SAME}
    return schemas.ApiKey(**same, scopes=row.scopes.split())


_SAME = tuple(name for name in schemas.ApiKey.model_fields if name != "scopes")
