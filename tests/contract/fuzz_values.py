"""What a hostile client sends: values for the parameters of a route, some right, some not, all from one seed."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from autovibe.node.routes import Route
from autovibe.node.schema.parameters import Param, check_value
from tests.contract.pve_formats import FORMATS

HOSTILE: tuple[str, ...] = (
    "", " ", "\n", "a\nb", "a\r\nX-Injected: 1", "\t", "\x00", "a\x00b", "\x1b[31m", "\x7f", "é", "\u202e",
    "\U0001d4b3", "\u0661\u0662", "'", '"', "a'b\"c", "\\", "$(touch pwned)", "`touch pwned`", "; touch pwned",
    "| touch pwned", "&& touch pwned", "-rf", "--help", "%s%n%x", "{0}", "${HOME}", "~", "*", "?", "[n]", "#",
    "<script>", "../../canary", "/etc/passwd", "..", ".", "../", "/", "//", "....//....//canary", "%2e%2e%2fcanary",
    "..%2fcanary", "%00", "%", "%zz", "%ff", "local:../../../canary", "local:iso/../../../canary",
    "local:iso//canary.iso", "local:/etc/passwd", "local-lvm:../canary", "local:100/../../../canary.qcow2",
    "local:iso/a\nb.iso", "local:", ":", "local:0", "local:-1", "local:99999999", "local:1e9", "local:cloudinit",
    "local:iso/" + "a" * 300, "none", "cdrom", "0", "1", "-1", "00", "0x10", "1e309", "NaN", "inf", "1.5",
    "99999999999999999999", "9" * 400, "-9" * 40, "true", "null", "None", "[]", "{}", "a=b", "=", "==", ",", ",,,",
    ";", "a,b;c d", "a=b,a=c", "file=local:1,file=local:2", "virtio=zz", "virtio,bridge=a/b", "ip=dhcp,ip=dhcp",
    "enabled=1,x", "order=scsi0;scsi0", "import-from=/etc/passwd", "local:0,import-from=/etc/passwd",
    "local:0,import-from=local:import/../../canary", "100", "101", "99", "s1", "current", "pending", "autovibe",
    "root@pam", "root@pam!x", "a" * 64, "a" * 300, "a" * 9000, "ä" * 5000, "%" * 999, "../" * 60 + "canary",
    "a/" * 300, "[PENDING]", "[s9]", "lock: backup", "#\n[x]\nargs: -S", "$&", "\ufeff", "\ud7ff",
)  # fmt: skip
STRUCTURES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 10**30, -(10**30), 1e308, [], [1], ["a", ["b"]], [[[[[]]]]], {}, {"a": 1}, [None],
    [True], {"a": {"b": []}}, "\ud800", ["../../canary"], [{}], ["a"] * 500,
)  # fmt: skip
_BODIES: tuple[tuple[str, bytes], ...] = (
    ("application/json", b""), ("application/json", b"["), ("application/json", b"[" * 5000),
    ("application/json", b'{"a":1,"a":2}'), ("application/json", b'{"vmid":NaN}'), ("application/json", b"null"),
    ("application/json", b'"x"'), ("application/json", b"\xff\xfe"), ("application/json", b'{"":""}'),
    ("application/x-www-form-urlencoded", b"&&&=&=&;"), ("application/x-www-form-urlencoded", b"%=%&%zz=%ff"),
    ("application/x-www-form-urlencoded", b"\xff\xfe=\x00"), ("application/x-www-form-urlencoded", b"a" * 100_000),
    ("application/x-www-form-urlencoded", b"&".join(b"a%d=1" % number for number in range(3000))),
    ("text/plain", b"vmid=100"), ("", b"vmid=100"), ("multipart/form-data", b"--x\r\n\r\n"),
    ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\n\r\n--x--\r\n"),
)  # fmt: skip


class Fuzz:
    """Requests for routes. `known` are good values of parameters by name."""

    def __init__(self, seed: int, known: Mapping[str, tuple[str, ...]]) -> None:
        self.random = random.Random(seed)
        self.known = known

    def honest(self, route: Route) -> tuple[str, str, dict[str, str], bytes | None]:
        """A call with good values alone, of what must be there and one parameter more."""
        names = {name for name, param in route.table.items() if not param.optional}
        names |= {part[1:-1] for part in route.path.split("/") if part.startswith("{")}
        names |= {self.random.choice(sorted(route.table))} if route.table else set()
        fields = {name: self.good(name, route.table[name]) for name in sorted(names)}
        path = "/".join(
            quote(fields.pop(part[1:-1]), safe="") if part.startswith("{") else part for part in route.path.split("/")
        )
        if route.method not in ("POST", "PUT"):
            return route.method, f"{path}?{_form(fields)}" if fields else path, {}, None
        if route.takes_file:
            return route.method, path, *self._multipart(fields)
        return route.method, path, {"Content-Type": "application/x-www-form-urlencoded"}, _form(fields).encode()

    def request(self, route: Route) -> tuple[str, str, dict[str, str], bytes | None]:
        """Method, path with query, headers and body of one call."""
        fields, in_path = self._fields(route)
        path = "".join(
            f"/{self._segment(part[1:-1], in_path) if part.startswith('{') else part}"
            for part in route.path.strip("/").split("/")
        )
        if route.method not in ("POST", "PUT"):
            return route.method, f"{path}?{_form(fields)}" if fields else path, {}, None
        if self.random.random() < 0.06:
            kind, body = self.random.choice(_BODIES)
            return route.method, path, {"Content-Type": kind} if kind else {}, body
        if route.takes_file:
            return route.method, path, *self._multipart(fields)
        if self.random.random() < 0.4:
            return route.method, path, {"Content-Type": "application/json"}, json.dumps(self._twisted(fields)).encode()
        kind = "application/x-www-form-urlencoded"
        return route.method, path, {"Content-Type": kind}, _form(fields).encode()

    def _fields(self, route: Route) -> tuple[dict[str, str], dict[str, str]]:
        """Good values of what must be there and of some of the rest, then up to three made bad."""
        in_path = {part[1:-1] for part in route.path.split("/") if part.startswith("{")}
        some = self.random.random() * 0.3
        chosen = {
            name: self.good(name, param)
            for name, param in sorted(route.table.items())
            if not param.optional or self.random.random() < min(some, 6 / len(route.table))
        }
        names = [name for name in sorted(route.table) if name != "node" or self.random.random() < 0.1]
        for _ in range(self.random.choice((0, 0, 1, 1, 1, 2, 3))):
            if names:
                chosen[self.random.choice(names)] = self.random.choice(HOSTILE)
        if self.random.random() < 0.1:
            chosen[self.random.choice(HOSTILE) or "x"] = self.random.choice(HOSTILE)
        if chosen and self.random.random() < 0.1:
            chosen.pop(self.random.choice(sorted(chosen)))
        return (
            {name: value for name, value in chosen.items() if name not in in_path},
            {name: value for name, value in chosen.items() if name in in_path},
        )

    def good(self, name: str, param: Param) -> str:
        """A value the parameter takes, as far as one is known."""
        if param.enum:
            return self.random.choice(param.enum)
        if name in self.known:
            return self.random.choice(self.known[name])
        if param.kind == "boolean":
            return self.random.choice("01")
        if param.kind in ("integer", "number"):
            lowest = int(param.minimum or 0)
            highest = lowest + 100 if param.maximum is None else int(min(param.maximum, lowest + 100))
            return str(self.random.randint(lowest, highest))
        if isinstance(param.form, Mapping):
            return self._properties(param.form)
        accepted = [text for texts, _ in FORMATS.values() for text in texts if _takes(param, text)]
        return self.random.choice(accepted) if accepted else "abc"

    def _properties(self, table: Mapping[str, Param]) -> str:
        parts = []
        for name, param in sorted(table.items()):
            if not param.alias and (not param.optional or self.random.random() < 0.15):
                value = self.good(name, param)
                parts.append(value if param.default_key and self.random.random() < 0.5 else f"{name}={value}")
        self.random.shuffle(parts)
        return ",".join(parts)

    def _segment(self, name: str, given: Mapping[str, str]) -> str:
        """A path's parameter, percent-encoded once, twice or hardly at all."""
        text = given.get(name, "") or self.random.choice(self.known.get(name, ("x",)))
        way = self.random.random()
        if way < 0.85:
            return quote(text, safe="", errors="replace")
        return quote(quote(text, safe=""), safe="") if way < 0.92 else quote(text, safe="/:;,=@!$&'()*+.~%")

    def _twisted(self, fields: dict[str, str]) -> dict[str, Any]:
        """The fields as JSON, some in another type."""
        found: dict[str, Any] = dict(fields)
        for name in fields:
            if self.random.random() < 0.15:
                found[name] = self.random.choice(STRUCTURES)
        return found

    def _multipart(self, fields: dict[str, str]) -> tuple[dict[str, str], bytes]:
        name = self.random.choice((*HOSTILE, "a.iso", "b.qcow2", "../c.iso", "d/e.iso"))
        parts = [
            f'--xx\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n' for key, value in fields.items()
        ]
        head = f'--xx\r\nContent-Disposition: form-data; name="filename"; filename="{name}"\r\n'
        text = "".join([*parts, head, "Content-Type: application/octet-stream\r\n\r\nbytes\r\n--xx--\r\n"])
        return {"Content-Type": "multipart/form-data; boundary=xx"}, text.encode("utf-8", "replace")


def _form(fields: Mapping[str, str]) -> str:
    return urlencode(fields, errors="replace")


def _takes(param: Param, text: str) -> bool:
    try:
        check_value(param, text, "it")
    except ValueError:
        return False
    return True
