"""The parameters of a call: what a table says about each, and the check that reports all faults together.

The words of the faults are Proxmox's (pve-common JSONSchema.pm, seen in recorded exchanges): clients match on them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from autovibe.node.refusal import faulty

Kind = Literal["string", "integer", "number", "boolean", "array"]
Check = Callable[[str], object]

_INTEGER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d+)?|\.\d+)", re.ASCII)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Param:
    """One parameter. `form` is a check that raises ValueError, or the table of a property string (`k=v,k=v`).

    `rule` is a check of the whole text beside a property string's table.
    In such a table `default_key` marks the property that may stand without its key, `alias` sends the value to another
    property, and `key_alias` keeps the key used as the value of one more (`virtio=<MAC>` gives model and macaddr).
    `is_multiline` lets newlines through, `is_binary` every character: for text that never gets into a configuration.
    """

    kind: Kind = "string"
    optional: bool = True
    minimum: float | None = None
    maximum: float | None = None
    min_length: int | None = None
    max_length: int | None = None
    pattern: str | None = None
    enum: tuple[str, ...] = ()
    form: Check | Mapping[str, Param] | None = None
    rule: Check | None = None
    requires: str = ""
    default_key: bool = False
    alias: str = ""
    key_alias: str = ""
    is_multiline: bool = False
    is_binary: bool = False

    def required(self) -> Param:
        return replace(self, optional=False)


Table = Mapping[str, Param]


def check(table: Table, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `given` as ints, floats, bools, strings and lists. Raises the 400 that names every fault."""
    errors: dict[str, str] = {}
    values = _check_all(table, given, "", errors)
    if errors:
        raise faulty(errors)
    return values


def _check_all(table: Table, given: Mapping[str, Any], path: str, errors: dict[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, raw in given.items():
        if raw is None:
            continue
        where = f"{path}.{name}" if path else name
        param = table.get(name)
        if param is None:
            errors[where] = "property is not defined in schema and the schema does not allow additional properties"
            continue
        try:
            values[name] = check_value(param, raw, where)
        except ValueError as error:
            errors[where] = str(error)
            continue
        if param.requires and given.get(param.requires) is None:
            missing = f"{path}.{param.requires}" if path else param.requires
            errors.setdefault(missing, f"missing property - '{where}' requires this property")
    for name, param in table.items():
        if not param.optional and given.get(name) is None:
            errors[f"{path}.{name}" if path else name] = "property is missing and it is not optional"
    return values


def check_value(param: Param, raw: Any, path: str) -> Any:
    """One value in its type. Raises ValueError in Proxmox's words."""
    if param.kind == "array":
        return [_check_string(param, _text(item), path) for item in (raw if isinstance(raw, list) else [raw])]
    if isinstance(raw, list | dict):
        raise _not_of_kind(param.kind, "ARRAY" if isinstance(raw, list) else "HASH")
    if param.kind == "boolean":
        return _check_boolean(raw)
    text = _text(raw)
    if param.kind == "integer":
        if isinstance(raw, bool) or not _INTEGER.fullmatch(text):
            raise _not_of_kind("integer", f"'{text}'")
        return _check_range(param, int(text))
    if param.kind == "number":
        if isinstance(raw, bool) or not _NUMBER.fullmatch(text):
            raise _not_of_kind("number", f"'{text}'")
        return _check_range(param, float(text))
    return _check_string(param, text, path)


def _not_of_kind(kind: str, got: str) -> ValueError:
    return ValueError(f"type check ('{kind}') failed - got {got}")


def _text(raw: Any) -> str:
    if isinstance(raw, list | dict):
        raise _not_of_kind("string", "ARRAY" if isinstance(raw, list) else "HASH")
    if isinstance(raw, bool):
        return "1" if raw else "0"
    return str(raw)


def _check_boolean(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    if str(raw) not in ("0", "1"):
        raise _not_of_kind("boolean", f"'{raw}'")
    return str(raw) == "1"


def _check_range(param: Param, value: Any) -> Any:
    if param.minimum is not None and value < param.minimum:
        raise ValueError(f"value must have a minimum value of {param.minimum:.15g}")
    if param.maximum is not None and value > param.maximum:
        raise ValueError(f"value must have a maximum value of {param.maximum:.15g}")
    return value


def _check_string(param: Param, text: str, path: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("value is not valid UTF-8") from None
    # A newline in a value would become a line of the VM's configuration file.
    is_one_line = param.is_multiline or not ("\n" in text or "\r" in text)
    if not param.is_binary and (_UNPRINTABLE.search(text) or not is_one_line):
        raise ValueError("value may not contain control characters")
    if param.min_length is not None and len(text) < param.min_length:
        raise ValueError(f"value must be at least {param.min_length} characters long")
    if param.max_length is not None and len(text) > param.max_length:
        raise ValueError(f"value may only be {param.max_length} characters long")
    if isinstance(param.form, Mapping):
        parse_properties(param.form, text, path)
    for check_text in (None if isinstance(param.form, Mapping) else param.form, param.rule):
        try:
            if check_text is not None:
                check_text(text)
        except ValueError as error:
            raise ValueError(f"invalid format - {error}\n") from None
    if param.pattern is not None and not re.fullmatch(param.pattern, text, re.ASCII):
        raise ValueError("value does not match the regex pattern")
    if param.enum and text not in param.enum:
        raise ValueError(f"value '{text}' does not have a value in the enumeration '{', '.join(param.enum)}'")
    return text


def split_properties(table: Table, text: str) -> dict[str, str]:
    """The keys and values of a property string, aliases resolved. Raises ValueError without looking at the values."""
    default = next((name for name, param in table.items() if param.default_key), None)
    found: dict[str, str] = {}
    for part in text.split(","):
        if not part.strip():
            continue
        key, equals, value = part.strip().partition("=")
        if not equals or (key not in table and default is not None and not re.fullmatch(r"[\w-]+", key)):
            if default is None:
                raise ValueError("value without key, but schema does not define a default key")
            key, value = default, part.strip()
        param = table.get(key)
        if param is not None and param.alias:
            if param.key_alias:
                _put(found, param.key_alias, key)
            key = param.alias
        _put(found, key, value)
    return found


def _put(found: dict[str, str], key: str, value: str) -> None:
    if key in found:
        raise ValueError(f"duplicate key in comma-separated list property: {key}")
    found[key] = value


def parse_properties(table: Table, text: str, path: str) -> dict[str, Any]:
    """The checked values of a property string. Raises ValueError with Proxmox's many-lined fault."""
    try:
        given = split_properties(table, text)
    except ValueError as error:
        raise ValueError(f"invalid format - {error}\n") from None
    errors: dict[str, str] = {}
    values = _check_all(table, given, path, errors)
    if errors:
        lines = "".join(f"{where}: {fault}\n" for where, fault in errors.items())
        raise ValueError(f"invalid format - format error\n{lines}")
    return values


def indexed(name: str, count: int, param: Param) -> dict[str, Param]:
    """`name0` … as entries of a table."""
    return {f"{name}{number}": param for number in range(count)}


def render(value: Any) -> str:
    """A checked value as it stands in a configuration file."""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, float):
        return f"{value:.15g}"
    return str(value)
