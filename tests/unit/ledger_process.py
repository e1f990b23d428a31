"""A process that works with the ledger, told by JSON on its command line; it may kill itself at its n-th statement.

{"url", "race": how many, "project"}    waits for a line on standard input, reserves one unit so often, prints
                                        {"granted", "refused", "longest": seconds}
{"url", "verb", "orders", "kill": n}    calls the ledger once in a transaction; dies before its n-th statement, and
                                        prints how many there were when it lived
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import event
from sqlmodel import Session

from autovibe.domain import Machine
from autovibe.errors import LimitExceeded
from autovibe.store import Store, rows
from autovibe.store.ledger import Holder, Ledger
from autovibe.types import MICROS, Resource


def race(store: Store, ledger: Ledger, project: UUID, count: int) -> dict[str, Any]:
    store.check()
    print("ready", flush=True)
    sys.stdin.readline()
    granted, longest = 0, 0.0
    for _ in range(count):
        begun_at = time.monotonic()
        try:
            with store.transaction() as session:
                ledger.reserve(session, uuid4(), Holder(project), {Resource.money: MICROS})
            granted += 1
        except LimitExceeded:
            pass
        longest = max(longest, time.monotonic() - begun_at)
    return {"granted": granted, "refused": count - granted, "longest": longest}


def amounts(given: dict[str, int]) -> dict[Resource, int]:
    return {Resource(name): amount for name, amount in given.items()}


def carry_out(session: Session, ledger: Ledger, verb: str, orders: dict[str, Any]) -> None:
    uuid = UUID(orders["uuid"])
    if verb == "reserve":
        holder = Holder(UUID(orders["project"]), UUID(orders["machine"]))
        ledger.reserve(session, uuid, holder, amounts(orders["amounts"]))
    elif verb == "charge":
        ledger.charge(session, uuid, amounts(orders["amounts"]), key=orders["key"])
    elif verb == "extend":
        ledger.extend(session, uuid, amounts(orders["amounts"]))
    elif verb == "settle":
        ledger.settle(session, uuid, amounts(orders["amounts"]))
    elif verb == "settle_machine":
        machine = rows.get(session, Machine, UUID(orders["machine"]))
        ledger.settle_machine(session, machine, datetime.fromisoformat(orders["moment"]))
    else:
        moment = datetime.fromisoformat(orders["moment"])
        ledger.carry(session, uuid, UUID(orders["new_uuid"]), moment=moment)


class Death:
    """Counts the statements of a transaction, with BEGIN, COMMIT and the moment after; dies before the n-th."""

    def __init__(self, store: Store, at: int) -> None:
        self.at, self.count = at, 0
        event.listen(store.engine, "before_cursor_execute", self.meet)
        event.listen(store.engine, "commit", self.meet)

    def meet(self, *_: Any) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    given = json.loads(sys.argv[1])
    store, ledger = Store(given["url"]), Ledger({Resource.money: 10**9})
    if "race" in given:
        print(json.dumps(race(store, ledger, UUID(given["project"]), given["race"])), flush=True)
        return
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if pid := os.fork():
            _, status = os.waitpid(pid, 0)
            print(json.dumps({"was_killed": os.WIFSIGNALED(status), "status": status}), flush=True)
            continue
        death = Death(store, asked["kill"])
        with store.transaction() as session:
            carry_out(session, ledger, asked["verb"], asked["orders"])
        death.meet()
        os._exit(0)


if __name__ == "__main__":
    main()
