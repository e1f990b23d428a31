"""Faults on demand (`autovibe serve node --faults FILE`): what real clusters do to their clients, for tests.

The file is JSON or TOML (by its suffix) and is read again whenever it changes:

    {"seed": 7, "rules": [{"match": {...}, "then": {...}}, ...]}

Of the rules that match a call, the first acts. `match` says which calls (all of it must hold; without it, every call):

    method          "GET", "POST", "PUT" or "DELETE"
    path            the path below /api2/json, where `*` is any text without a slash and `**` any text
    skip            how many matching calls pass before the rule acts (0)
    times           on how many calls it acts at most (no limit)
    probability     how likely it acts on each, 0 to 1 (1); drawn from `seed`, so a run can be repeated

`then` says what happens to them, one of these, any of them with `delay_seconds` (a slow answer, also alone):

    status          the call is not carried out; it is answered with this status, `reason` and perhaps `errors`
    drop            "before": the connection ends and nothing was done; "after": it was done, but no answer comes
    lock_timeout    true: `can't lock file ... - got timeout`, after `delay_seconds`
    vmid_taken      true: the call that makes a VM is told that somebody else has the id
    task_fails      the task that the call starts ends with this text, and undoes what it had begun
    task_delay_seconds   the task works for so much longer
    lag_seconds     /cluster/resources is as old as that: new VMs are `unknown` and have no name
    nextid_taken    true: /cluster/nextid gives an id that a VM has
    truncate        the connection ends after so many bytes of the answer's body

Nothing of this is there without the option, and the node must listen on loopback.
"""

from __future__ import annotations

import json
import logging
import random
import re
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autovibe.errors import ConfigurationError
from autovibe.node.refusal import Refusal
from autovibe.node.state import Call, State
from autovibe.node.tasks import Task, Work

logger = logging.getLogger(__name__)

_MATCH: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "path": str,
    "skip": int,
    "times": int,
    "probability": (int, float),
}
_THEN: dict[str, type | tuple[type, ...]] = {
    "delay_seconds": (int, float),
    "status": int,
    "reason": str,
    "errors": dict,
    "drop": str,
    "lock_timeout": bool,
    "vmid_taken": bool,
    "task_fails": str,
    "task_delay_seconds": (int, float),
    "lag_seconds": (int, float),
    "nextid_taken": bool,
    "truncate": int,
}
_COMPANIONS = ("delay_seconds", "reason", "errors")  # what may stand beside the one thing that happens


@dataclass(frozen=True)
class Cut:
    """An answer of which only so many bytes of the body are to be sent."""

    data: Any
    bytes: int


@dataclass
class Rule:
    """One rule; `seen` and `acted` count calls."""

    match: Mapping[str, Any]
    then: Mapping[str, Any]
    seen: int = 0
    acted: int = 0
    pattern: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        parts = re.split(r"(\*\*?)", self.match.get("path", "**"))
        texts = {"*": "[^/]*", "**": ".*"}
        self.pattern = re.compile("".join(texts.get(part) or re.escape(part) for part in parts))

    def acts(self, method: str, path: str, chance: random.Random) -> bool:
        if self.match.get("method", method) != method or not self.pattern.fullmatch(path):
            return False
        self.seen += 1
        if self.seen <= self.match.get("skip", 0) or self.acted >= self.match.get("times", self.acted + 1):
            return False
        if chance.random() >= self.match.get("probability", 1):
            return False
        self.acted += 1
        return True


class Faults:
    """The rules of one file. Raises ConfigurationError for a file that is wrong, unless a good one was there before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mutex = threading.Lock()
        self._signature: tuple[int, int, int] | None = None
        self._rules: list[Rule] = []
        self._chance = random.Random()  # noqa: S311 - no secret
        self._of_call = threading.local()
        self._first_seen: dict[int, float] = {}
        self._broadcast: tuple[float, dict[str, Any]] | None = None
        self._read()

    # The file

    def _read(self) -> None:
        try:
            stat = self._path.stat()
            signature = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if signature == self._signature:
                return
            given = parse(self._path.read_text(encoding="utf-8"), self._path)
        except OSError as error:
            raise ConfigurationError(f"The faults file '{self._path}' cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"The faults file '{self._path}' is not UTF-8 text.") from error
        self._signature = signature
        self._rules = [Rule(rule.get("match", {}), rule["then"]) for rule in given.get("rules", [])]
        self._chance.seed(given.get("seed", 0))
        logger.warning("FAULTS ON DEMAND: %d rules of '%s' spoil calls of this node.", len(self._rules), self._path)

    def _rule_for(self, method: str, path: str) -> Rule | None:
        with self._mutex:
            try:
                self._read()
            except ConfigurationError as error:
                logger.error("%s The rules from before stay.", error)  # noqa: TRY400 - no defect of ours
            return next((rule for rule in self._rules if rule.acts(method, path, self._chance)), None)

    # What happens

    def carry_out(self, state: State, method: str, path: str, call: Call, verb: Callable[[State, Call], Any]) -> Any:
        """Call a verb, or do to the call what the file says."""
        self._look(state)
        place = re.sub(r"\{(\w+)\}", lambda name: str(call.get(name[1])), path)
        rule = self._rule_for(method, place)
        if rule is None:
            return verb(state, call)
        then = rule.then
        logger.warning("Fault on demand: %s %s gets %s.", method, place, dict(then))
        time.sleep(then.get("delay_seconds", 0))
        _refuse(state, call, then)
        if then.get("drop") == "before":
            raise ConnectionResetError("dropped on demand, before the call")
        with self._spoiling_tasks(then):
            data = verb(state, call)
        if then.get("drop") == "after":
            raise ConnectionResetError("dropped on demand, after the call")
        if then.get("nextid_taken"):
            return str(min(state.configs.vmids(), default=data))
        if "lag_seconds" in then:
            return self._lag(then["lag_seconds"], data)
        return Cut(data, then["truncate"]) if "truncate" in then else data

    @contextmanager
    def _spoiling_tasks(self, then: Mapping[str, Any]) -> Iterator[None]:
        self._of_call.then = then
        try:
            yield
        finally:
            self._of_call.then = {}

    def wrap(self, work: Work) -> Work:
        """The work of a task that the call in hand starts, spoilt as its rule says."""
        then: Mapping[str, Any] = getattr(self._of_call, "then", {})
        delay, text = then.get("task_delay_seconds", 0), then.get("task_fails")
        if not delay and text is None:
            return work

        def spoilt(task: Task) -> None:
            time.sleep(delay)
            task.fault = text or ""
            work(task)
            task.check()

        return spoilt

    # Lag

    def _look(self, state: State) -> None:
        """Note when each VM was first there."""
        present, now = state.configs.vmids(), time.monotonic()
        with self._mutex:
            for vmid in present:
                self._first_seen.setdefault(vmid, now)
            for vmid in self._first_seen.keys() - set(present):
                del self._first_seen[vmid]

    def _lag(self, seconds: float, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The list as a broadcast of every so many seconds leaves it: usage and status old, new VMs without either."""
        now = time.monotonic()
        with self._mutex:
            if self._broadcast is None or now - self._broadcast[0] >= seconds:
                self._broadcast = (now, {entry["id"]: entry for entry in data})
            told, ages = self._broadcast[1], {vmid: now - seen for vmid, seen in self._first_seen.items()}
        return [_aged(entry, told, ages, seconds) for entry in data]


def _aged(
    entry: dict[str, Any], told: Mapping[str, dict[str, Any]], ages: Mapping[int, float], seconds: float
) -> dict[str, Any]:
    if entry.get("type") != "qemu":
        return entry
    if ages.get(entry["vmid"], 0.0) < seconds or entry["id"] not in told:
        return {key: entry[key] for key in ("id", "node", "type", "vmid")} | {"status": "unknown"}
    return told[entry["id"]]


def _refuse(state: State, call: Call, then: Mapping[str, Any]) -> None:
    vmid = call.get("newid") or call.get("vmid")
    if then.get("lock_timeout"):
        raise Refusal(f"can't lock file '/var/lock/qemu-server/lock-{call.get('vmid', vmid)}.conf' - got timeout")
    if then.get("vmid_taken"):
        is_clone = call.get("newid") is not None
        text = "config file already exists" if is_clone else f"VM {vmid} already exists on node '{state.name}'"
        raise Refusal(f"unable to create VM {vmid}{':' if is_clone else ' -'} {text}")
    if "status" in then:
        raise Refusal(then.get("reason", "fault on demand"), status=then["status"], errors=then.get("errors"))


# Reading


def parse(text: str, path: Path) -> dict[str, Any]:
    """The checked content of a faults file. Raises ConfigurationError, which says what is wrong where."""
    try:
        given = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise ConfigurationError(f"The faults file '{path}' is not valid {kind}: {error}.") from error
    where = f"The faults file '{path}'"
    _check(where, given, {"seed": int, "rules": list})
    for number, rule in enumerate(given.get("rules", []), 1):
        place = f"{where}, rule {number}"
        _check(place, rule, {"match": dict, "then": dict})
        _check(f"{place}, match", rule.get("match", {}), _MATCH)
        _check(f"{place}, then", rule.get("then", {}), _THEN)
        _check_sense(place, rule.get("match", {}), rule.get("then", {}))
    return dict(given)


def _check(where: str, given: Any, known: Mapping[str, type | tuple[type, ...]]) -> None:
    if not isinstance(given, dict):
        raise ConfigurationError(f"{where} is not a table of {', '.join(known)}.")
    for key, value in given.items():
        if key not in known:
            raise ConfigurationError(f"{where} has '{key}', which is none of {', '.join(known)}.")
        wanted = known[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            names = [kind.__name__ for kind in (wanted if isinstance(wanted, tuple) else (wanted,))]
            raise ConfigurationError(f"{where}: '{key}' is {value!r}, not of type {' or '.join(names)}.")
        if isinstance(value, int | float) and key != "seed" and value < 0:
            raise ConfigurationError(f"{where}: '{key}' is negative.")


def _check_sense(where: str, match: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    acts = [key for key in then if key not in _COMPANIONS]
    if not then or len(acts) > 1:
        raise ConfigurationError(f"{where}: 'then' says {' and '.join(acts) or 'nothing'}; it says one thing.")
    if match.get("method", "GET") not in ("GET", "POST", "PUT", "DELETE"):
        raise ConfigurationError(f"{where}: '{match['method']}' is no method; it is GET, POST, PUT or DELETE.")
    if not 0 <= match.get("probability", 1) <= 1:
        raise ConfigurationError(f"{where}: 'probability' is from 0 to 1.")
    if then.get("drop", "before") not in ("before", "after"):
        raise ConfigurationError(f"{where}: 'drop' is 'before' or 'after'.")
    if "status" in then and not 400 <= then["status"] <= 599:
        raise ConfigurationError(f"{where}: 'status' is from 400 to 599.")
    if ("reason" in then or "errors" in then) and "status" not in then:
        raise ConfigurationError(f"{where}: 'reason' and 'errors' go with a 'status'.")
    if any(not isinstance(text, str) for text in then.get("errors", {}).values()):
        raise ConfigurationError(f"{where}: 'errors' are texts by the name of a parameter.")
