"""A process with nothing but the durable engine, driven by lines on standard input; killed by test_durable.py.

The workflow "work" has three steps. Each appends `<workflow> <step> <label>` to the journal; the second one waits as
long as the file `hold` exists. Commands: `start NAME ID`, `close [SECONDS]`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

from autovibe.durable import Durable


def main() -> None:
    given = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    journal, hold = Path(given["journal"]), Path(given["hold"])
    durable = Durable(
        given["url"], home=Path(given["home"]), workers=given.get("workers", 4), host=given["host"], **given["beats"]
    )

    def note(workflow_id: str, step: str) -> None:
        descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{workflow_id} {step} {given['label']}\n".encode())
        os.close(descriptor)

    def work(workflow_id: str) -> None:
        def waits() -> None:
            note(workflow_id, "two")
            while hold.exists():
                if given.get("stubborn"):
                    time.sleep(0.1)
                else:
                    durable.wait(0.1)

        durable.step("one", lambda: note(workflow_id, "one"))
        durable.step("two", waits)
        durable.step("three", lambda: note(workflow_id, "three"))

    def waits_for_other(workflow_id: str) -> None:
        def step() -> None:
            while not Path(given["home"], "other-is-done").exists():
                durable.wait(0.1)
                durable.yield_turn()

        durable.step("wait", step)
        note(workflow_id, "waited")

    def other(workflow_id: str) -> None:
        durable.step("do", lambda: Path(given["home"], "other-is-done").touch())

    durable.register("work", work)
    durable.register("waits", waits_for_other)
    durable.register("other", other)
    durable.launch()
    print(f"ready {durable.executor_id}", flush=True)
    for line in sys.stdin:
        command, *words = line.split()
        if command == "start":
            durable.start(words[0], words[1])
            print("started", flush=True)
        elif command == "close":
            begun_at = time.monotonic()
            is_closed = durable.close(float(words[0]) if words else 8.0)
            print(f"closed {is_closed} {time.monotonic() - begun_at:.2f}", flush=True)
            os._exit(0)


if __name__ == "__main__":
    main()
