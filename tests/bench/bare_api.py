"""The peer of the Hub's API: the same questions by FastAPI and SQLModel as their manuals show them, and nothing more.

No key, no limits, no audit, no envelope, no request id. `python -m tests.bench.bare_api DATABASE_URL PORT`.
"""

import sys
from collections.abc import Iterator
from typing import Annotated, Any
from uuid import UUID, uuid4

import uvicorn
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import event
from sqlmodel import Session, col, create_engine, func, select

from autovibe import schemas
from autovibe.domain import Account, Checkpoint, Machine
from autovibe.domain.budget import LIFE, Scope
from autovibe.store import Store
from autovibe.types import MICROS, Money, Resource


def make(url: str) -> FastAPI:
    app = FastAPI()
    store = Store(url)
    engine = create_engine(store.url, pool_size=16, max_overflow=64)
    if store.is_sqlite:

        @event.listens_for(engine, "connect")
        def prepare(connection: Any, _record: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL").close()
            connection.execute("PRAGMA synchronous=FULL").close()

    def open_session() -> Iterator[Session]:
        with Session(engine) as session:
            yield session

    SessionHere = Annotated[Session, Depends(open_session)]

    @app.get("/machines/{uuid}", response_model=schemas.Machine)
    def show(session: SessionHere, uuid: UUID) -> Any:
        machine = session.get(Machine, uuid)
        if machine is None:
            raise HTTPException(status_code=404, detail="Machine not found")
        return _shown(session, [machine])[0]

    @app.get("/machines", response_model=schemas.MachinePage)
    def index(session: SessionHere, limit: int = 50, offset: int = 0) -> Any:
        total = session.exec(select(func.count()).select_from(Machine)).one()
        order = (col(Machine.spawned_at).desc(), col(Machine.uuid))
        machines = session.exec(select(Machine).order_by(*order).offset(offset).limit(limit)).all()
        end = offset + len(machines)
        return schemas.MachinePage(
            machines=_shown(session, list(machines)),
            total_count=total,
            has_more=end < total,
            next_offset=end if end < total else None,
        )

    @app.post("/machines", status_code=201, response_model=schemas.Machine)
    def create(order: schemas.MachineOrder) -> Any:
        with store.transaction() as session:
            machine = Machine(
                name=f"shell-{uuid4().hex}",
                type=order.type,
                project_uuid=order.project_uuid,
                checkpoint_uuid=order.checkpoint_uuid,
                prompt=order.prompt,
            )
            session.add(machine)
        return _wire(machine, 0, {})

    return app


def _shown(session: Session, machines: list[Machine]) -> list[schemas.Machine]:
    uuids = [machine.uuid for machine in machines]
    counts: dict[UUID | None, int] = dict(
        session.exec(
            select(Checkpoint.machine_uuid, func.count())
            .where(col(Checkpoint.machine_uuid).in_(uuids), Checkpoint.status == "ready")
            .group_by(col(Checkpoint.machine_uuid))
        ).all()
    )
    used: dict[UUID, dict[str, int]] = {}
    accounts = select(Account.owner_uuid, Account.resource, Account.used_micros).where(
        Account.scope == Scope.machine, col(Account.owner_uuid).in_(uuids), Account.period == LIFE
    )
    for owner, resource, micros in session.exec(accounts).all():
        used.setdefault(owner, {})[resource] = micros
    return [_wire(machine, counts.get(machine.uuid, 0), used.get(machine.uuid, {})) for machine in machines]


def _wire(machine: Machine, checkpoints: int, used: dict[str, int]) -> schemas.Machine:
    money = used.get(Resource.money, 0)
    limit = machine.max_money_micros
    return schemas.Machine(
        **machine.model_dump(include=set(schemas.Machine.model_fields)),
        resource_constraints=schemas.ConstraintsReply(
            max_money=None if limit is None else schemas.MoneyAmount.of(Money(limit, machine.currency)),
            max_time_minutes=machine.max_time_minutes,
            max_api_calls=machine.max_api_calls,
        ),
        resource_usage=schemas.ResourceUsage(
            money=schemas.MoneyUsage(actual=schemas.MoneyAmount.of(Money(money, machine.currency))),
            time_minutes=schemas.Usage(actual=used.get(Resource.time_hours, 0) * 60 / MICROS),
            api_calls=schemas.Usage(actual=used.get(Resource.api_calls, 0) / MICROS),
            cpu_hours=schemas.Usage(actual=used.get(Resource.cpu_hours, 0) / MICROS),
        ),
        checkpoint_count=checkpoints,
    )


def main(url: str, port: int) -> None:
    """The options of the Hub's own server."""
    uvicorn.run(
        make(url),
        host="127.0.0.1",
        port=port,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=30,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
