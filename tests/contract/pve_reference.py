"""What was read off a real Proxmox VE 9.2, beside the project at ../shared/pve: its API schema and recorded exchanges.

`answer_faults` holds an answer against the schema's `returns`.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

REFERENCE = Path(__file__).parents[3] / "shared" / "pve"
EXCHANGES = REFERENCE / "exchanges.jsonl"
SCHEMA = REFERENCE / "schema.json"

INDEXED = {
    "ide": 4, "sata": 6, "scsi": 31, "virtio": 16, "net": 32, "serial": 4, "unused": 256, "ipconfig": 32, "usb": 14,
    "hostpci": 16, "numa": 8, "parallel": 3, "virtiofs": 10, "acmedomain": 6, "mp": 256, "dev": 256,
}  # fmt: skip
"""How many of each `name[n]` there are."""


def require(path: Path) -> Path:
    """The path, when it is there; otherwise the test is skipped, and fails where CI=true."""
    if not path.exists():
        reason = f"the reference data is not at '{path}': nothing was compared with a real Proxmox"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@functools.cache
def schema() -> dict[str, dict[str, dict[str, Any]]]:
    """Path, method, then `parameters`, `permissions` and `returns`."""
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(require(SCHEMA).read_text(encoding="utf-8"))
    return found


def exchanges() -> list[dict[str, Any]]:
    return [json.loads(line) for line in require(EXCHANGES).read_text(encoding="utf-8").splitlines()]


def python_pattern(pattern: str) -> str:
    """A Perl pattern of the schema as Python writes it."""
    return re.sub(r"\(\?\^(\w*):", lambda match: f"(?{match[1]}:", pattern)


def answer_faults(spec: Mapping[str, Any] | None, value: Any, where: str = "data") -> Iterator[str]:
    """How a value differs from what `returns` says: types, enumerations, limits, what must be there.

    What the schema does not list is let through, as in Proxmox, whose schemas of answers are incomplete.
    """
    kind = (spec or {}).get("type")
    if spec is None or kind in (None, "any") or (value is None and (kind == "null" or spec.get("optional"))):
        return
    kinds = kind if isinstance(kind, list) else [kind]
    if not any(_is_of_kind(name, value) for name in kinds):
        yield f"{where} is {value!r}, not of type {kind}"
    elif isinstance(value, dict):
        yield from _object_faults(spec, value, where)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from answer_faults(spec.get("items"), item, f"{where}[{position}]")
    else:
        yield from _scalar_faults(spec, value, where)


def _is_of_kind(kind: str, value: Any) -> bool:
    if kind == "boolean":
        return value in (0, 1) and not isinstance(value, str | float)
    if kind in ("integer", "number"):
        return isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
    return isinstance(value, {"string": str, "array": list, "object": dict, "null": type(None)}[kind])


def _object_faults(spec: Mapping[str, Any], value: dict[str, Any], where: str) -> Iterator[str]:
    for name, inner in spec.get("properties", {}).items():
        if name.endswith("[n]"):
            for key in value:
                if re.fullmatch(re.escape(name.removesuffix("[n]")) + r"\d+", key):
                    yield from answer_faults(inner, value[key], f"{where}.{key}")
        elif name in value:
            yield from answer_faults(inner, value[name], f"{where}.{name}")
        elif not inner.get("optional"):
            yield f"{where}.{name} is missing"


def _scalar_faults(spec: Mapping[str, Any], value: Any, where: str) -> Iterator[str]:
    if spec.get("enum") and value not in spec["enum"]:
        yield f"{where} is {value!r}, not one of {spec['enum']}"
    if spec.get("pattern") and not re.fullmatch(python_pattern(spec["pattern"]), str(value)):
        yield f"{where} is {value!r}, which is not of the form {spec['pattern']}"
    if isinstance(value, int | float):
        if "minimum" in spec and value < float(spec["minimum"]):
            yield f"{where} is {value}, below {spec['minimum']}"
        if "maximum" in spec and value > float(spec["maximum"]):
            yield f"{where} is {value}, above {spec['maximum']}"
    elif len(value) > spec.get("maxLength", len(value)) or len(value) < spec.get("minLength", 0):
        yield f"{where} has {len(value)} characters"
