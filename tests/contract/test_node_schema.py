"""The node's table of routes against the API schema of a real Proxmox VE 9.2: parameters, permissions, what is there.

Deliberate differences are `DELIBERATE`, with their reasons; anything else that differs is a defect of the table.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autovibe.node.access.permissions import (
    ALL_USERS,
    ROOT_ONLY,
    WORLD,
    Both,
    Either,
    Need,
    Perm,
    PermModify,
    UserGroup,
    UserParam,
)
from autovibe.node.routes import ROUTES, Route
from autovibe.node.schema.parameters import Param, Table, check_value
from tests.contract.pve_formats import FORMATS
from tests.contract.pve_reference import INDEXED, python_pattern, schema

N, V, S = "/nodes/{node}", "/nodes/{node}/qemu/{vmid}", "/nodes/{node}/storage/{storage}"

DELIBERATE: dict[tuple[str, str], str] = {
    ("*", "description: is not in Proxmox"): "the reference lacks it everywhere: its writer dropped all descriptions",
    (f"{S}/content/{{volume}}", "volume: max_length *"): "no longer than the name of a file",
    (f"{S}/content/{{volume}}", "storage: optional *"): "it always stands in the path",
    (f"{S}/upload", "filename: optional *"): "it is the name of the file's own part of the body",
    (f"{S}/upload", "tmpfilename: is missing"): "for Proxmox's own web server",
    (f"{S}/upload", "content: enum *"): "snippets too, which Proxmox takes over SSH only",
}
"""(path, parameter and difference), both with `*` for anything: why the node differs there from Proxmox."""

_CONSOLES = ("vncproxy", "termproxy", "spiceproxy")
_AGENT_READS = (
    "info", "get-osinfo", "get-host-name", "get-fsinfo", "get-users", "get-time", "get-timezone", "get-vcpus",
    "get-memory-blocks", "get-memory-block-info", "network-get-interfaces",
)  # fmt: skip
_AGENT_ACTS = (
    "ping", "fstrim", "fsfreeze-freeze", "fsfreeze-status", "fsfreeze-thaw", "shutdown", "suspend-disk",
    "suspend-hybrid", "suspend-ram", "set-user-password",
)  # fmt: skip
_FIREWALLS = (f"{V}/firewall", f"{N}/firewall", "/cluster/firewall")

P0 = (
    "GET /version", "POST /access/ticket", "GET /access/ticket", "GET /nodes", f"GET {N}/status",
    f"GET {N}/tasks/{{upid}}/status", f"GET {N}/tasks/{{upid}}/log", f"GET {N}/tasks", f"DELETE {N}/tasks/{{upid}}",
    "GET /cluster/tasks", "GET /cluster/resources", "GET /cluster/nextid", "GET /cluster/status", f"GET {N}/qemu",
    f"POST {N}/qemu", f"GET {V}/config", f"PUT {V}/config", f"POST {V}/config", f"DELETE {V}", f"POST {V}/clone",
    f"POST {V}/template",
    *(f"POST {V}/status/{verb}" for verb in ("start", "stop", "shutdown", "reboot", "reset", "suspend", "resume")),
    f"GET {V}/status/current", f"PUT {V}/resize", f"GET {V}/snapshot", f"POST {V}/snapshot",
    f"GET {V}/snapshot/{{snapname}}", f"DELETE {V}/snapshot/{{snapname}}", f"GET {V}/snapshot/{{snapname}}/config",
    f"PUT {V}/snapshot/{{snapname}}/config", f"POST {V}/snapshot/{{snapname}}/rollback", f"GET {N}/storage",
    f"GET {S}/status", f"GET {S}/content", f"POST {S}/upload", f"DELETE {S}/content/{{volume}}",
    f"GET {V}/agent/network-get-interfaces", f"POST {V}/agent/ping", f"POST {V}/agent/exec",
    f"GET {V}/agent/exec-status", f"GET {V}/agent/file-read", f"POST {V}/agent/file-write",
)  # fmt: skip
P1 = (
    f"GET {S}/content/{{volume}}", f"POST {S}/content", f"POST {S}/download-url", f"GET {N}/query-url-metadata",
    "GET /storage", "POST /storage", "GET /storage/{storage}", "PUT /storage/{storage}", "DELETE /storage/{storage}",
    f"GET {V}", f"GET {V}/status", f"GET {V}/pending", f"GET {V}/cloudinit", f"PUT {V}/cloudinit",
    f"GET {V}/cloudinit/dump", f"POST {V}/move_disk", f"PUT {V}/unlink", f"PUT {V}/sendkey", f"POST {V}/monitor",
    f"GET {V}/migrate", f"POST {V}/migrate", f"GET {V}/feature", f"GET {V}/rrddata", f"GET {N}/rrddata",
    f"GET {S}/rrddata", *(f"POST {V}/{console}" for console in _CONSOLES), f"GET {V}/vncwebsocket",
    f"GET {V}/agent", f"POST {V}/agent", *(f"GET {V}/agent/{name}" for name in _AGENT_READS),
    *(f"POST {V}/agent/{name}" for name in _AGENT_ACTS),
    *(f"{method} /pools" for method in ("GET", "POST", "PUT", "DELETE")),
    *(f"{method} /pools/{{poolid}}" for method in ("GET", "PUT", "DELETE")), "GET /access/permissions",
    "GET /access/users", "POST /access/users", "GET /access/roles", "POST /access/roles", "GET /access/groups",
    "POST /access/groups", "GET /access/users/{userid}/token",
    *(f"{method} /access/users/{{userid}}" for method in ("GET", "PUT", "DELETE")),
    *(f"{method} /access/users/{{userid}}/token/{{tokenid}}" for method in ("GET", "POST", "PUT", "DELETE")),
    *(f"{method} /access/roles/{{roleid}}" for method in ("GET", "PUT", "DELETE")),
    *(f"{method} /access/groups/{{groupid}}" for method in ("GET", "PUT", "DELETE")),
    "GET /access/acl", "PUT /access/acl", "GET /access/domains", "PUT /access/password",
    *(f"{method} {at}/options" for at in _FIREWALLS for method in ("GET", "PUT")),
    *(f"{method} {at}/rules" for at in _FIREWALLS for method in ("GET", "POST")),
    *(f"{method} {at}/rules/{{pos}}" for at in _FIREWALLS for method in ("GET", "PUT", "DELETE")),
    *(f"{method} {at}/ipset" for at in (V + "/firewall", "/cluster/firewall") for method in ("GET", "POST")),
    *(
        f"{method} {at}/ipset/{{name}}"
        for at in (V + "/firewall", "/cluster/firewall")
        for method in ("GET", "POST", "DELETE")
    ),
    *(
        f"{method} {at}/{what}"
        for at in (V + "/firewall", "/cluster/firewall")
        for what in ("ipset/{name}/{cidr}", "aliases/{name}")
        for method in ("GET", "PUT", "DELETE")
    ),
    *(f"{method} {at}/aliases" for at in (V + "/firewall", "/cluster/firewall") for method in ("GET", "POST")),
    f"GET {V}/firewall/refs", "GET /cluster/firewall/refs", f"GET {V}/firewall/log", f"GET {N}/firewall/log",
    "GET /cluster/firewall/groups", "POST /cluster/firewall/groups",
    *(f"{method} /cluster/firewall/groups/{{group}}" for method in ("GET", "POST", "DELETE")),
    *(f"{method} /cluster/firewall/groups/{{group}}/{{pos}}" for method in ("GET", "PUT", "DELETE")),
    f"GET {N}/lxc", f"GET {N}/network", f"GET {N}/network/{{iface}}", f"GET {N}/version", f"GET {N}/time",
    f"GET {N}/dns", f"GET {N}/hosts", f"GET {N}/config", f"GET {N}/services", f"GET {N}/syslog", f"GET {N}/journal",
    f"GET {N}/subscription", f"GET {N}/replication", "GET /cluster/backup-info/not-backed-up",
    "GET /cluster/config/qdevice", "GET /cluster/options", "PUT /cluster/options", "GET /cluster/log",
    "GET /cluster/ha/status/current", "GET /cluster/ha/resources", "GET /cluster/ha/resources/{sid}",
    "GET /cluster/replication", *(f"GET {N}/capabilities/qemu/{what}" for what in ("cpu", "machines", "migration")),
    *(f"GET /cluster/mapping/{what}" for what in ("pci", "usb", "dir")), "GET /cluster/sdn/zones",
    "GET /cluster/sdn/vnets", *(f"POST {N}/{verb}" for verb in ("startall", "stopall", "suspendall")),
    f"POST {N}/status",
)  # fmt: skip


def test_every_path_that_clients_need_has_a_route() -> None:
    present = {f"{route.method} {route.path}" for route in ROUTES}
    missing = [name for name in dict.fromkeys((*P0, *P1)) if name not in present]
    assert not missing, "\n".join(["no route for:", *missing])


def test_no_route_is_there_twice() -> None:
    names = [f"{route.method} {route.path}" for route in ROUTES]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


def test_every_route_takes_the_parameters_of_proxmox() -> None:
    faults = [f"{method} {path} {fault}" for method, path, fault in _differences() if not _reason_for(path, fault)]
    assert not faults, f"{len(faults)} differences\n" + "\n".join(faults)


def test_every_deliberate_difference_is_one() -> None:
    found = [(path, fault) for _, path, fault in _differences()]
    idle = [key for key in DELIBERATE if not any(_matches(key, path, fault) for path, fault in found)]
    assert not idle, f"these do not differ (any more): {idle}"


def test_every_route_needs_the_permissions_of_proxmox() -> None:
    faults = [
        f"{route.method} {route.path}: needs {route.needs}, in Proxmox {wanted}"
        for route in ROUTES
        if (spec := _spec_of(route)) is not None
        and _plain(wanted := _needs(spec["permissions"])) != _plain(route.needs)
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\x00b", "a\x1bb", "a\udc00b"])
def test_no_parameter_of_one_line_takes_control_characters(text: str) -> None:
    faults = [
        f"{route.method} {route.path} {name}"
        for route in ROUTES
        for name, param in route.table.items()
        if not param.is_binary and not (param.is_multiline and text in ("a\nb", "a\rb")) and _takes(param, text)
    ]
    assert not faults, "\n".join(faults)


def _spec_of(route: Route) -> dict[str, Any] | None:
    return schema().get(route.path, {}).get(route.method)


@functools.cache
def _differences() -> list[tuple[str, str, str]]:
    """Method, path and `parameter: difference` of each."""
    return [
        (route.method, route.path, f"{name}: {fault}")
        for route in ROUTES
        if (spec := _spec_of(route)) is not None
        for name, fault in _table_faults(_expand(spec["parameters"] or {}), route.table)
    ]


def _reason_for(path: str, fault: str) -> str:
    return next((reason for key, reason in DELIBERATE.items() if _matches(key, path, fault)), "")


def _matches(key: tuple[str, str], path: str, fault: str) -> bool:
    patterns = (re.escape(text).replace(r"\*", ".*") for text in key)
    return all(re.fullmatch(pattern, text, re.DOTALL) for pattern, text in zip(patterns, (path, fault), strict=True))


def _expand(specs: Mapping[str, Any]) -> dict[str, Any]:
    """With `name[n]` as name0 and so on."""
    found: dict[str, Any] = {}
    for name, spec in specs.items():
        if name.endswith("[n]"):
            found |= {f"{name[:-3]}{number}": spec for number in range(INDEXED[name[:-3]])}
        else:
            found[name] = spec
    return found


def _table_faults(specs: Mapping[str, Any], table: Table) -> list[tuple[str, str]]:
    """Each parameter's name with what differs; those that differ alike because they are numbered, once."""
    found = [(name, "is missing") for name in specs.keys() - table.keys()]
    found += [(name, "is not in Proxmox") for name in table.keys() - specs.keys()]
    compared: dict[tuple[int, int], list[str]] = {}  # scsi0 and scsi1 are one object
    for name in specs.keys() & table.keys():
        pair = (id(specs[name]), id(table[name]))
        if pair not in compared:
            compared[pair] = list(_param_faults(specs[name], table[name]))
        found += [(name, fault) for fault in compared[pair]]
    return sorted({(_unnumbered(name), fault) for name, fault in found})


def _unnumbered(name: str) -> str:
    base = name.rstrip("0123456789")
    return f"{base}[n]" if base in INDEXED and base != name else name


def _param_faults(spec: Mapping[str, Any], param: Param) -> Iterator[str]:
    if "alias" in spec or param.alias:
        if (param.alias, param.key_alias) != (spec.get("alias", ""), spec.get("keyAlias", "")):
            yield f"alias '{param.alias}' '{param.key_alias}', not '{spec.get('alias')}' '{spec.get('keyAlias')}'"
        return
    wanted = {
        "kind": spec.get("type", "string"),
        "optional": bool(spec.get("optional")),
        "minimum": _number(spec.get("minimum")),
        "maximum": _number(spec.get("maximum")),
        "min_length": spec.get("minLength"),
        "max_length": spec.get("maxLength"),
        "enum": tuple(spec.get("enum") or ()),
        "requires": spec.get("requires", ""),
        "default_key": bool(spec.get("default_key")),
    }
    for name, value in wanted.items():
        if getattr(param, name) != value and not (name == "enum" and "enum" in spec and spec["enum"] is None):
            yield f"{name} is {getattr(param, name)!r}, in Proxmox {value!r}"
    form = spec.get("format")
    if isinstance(form, Mapping):
        yield from _property_faults(form, param)
    elif isinstance(param.form, Mapping) and form not in FORMATS:
        yield f"is a property string, in Proxmox the format '{form}'"
    else:
        yield from _sample_faults(spec, param)


def _property_faults(specs: Mapping[str, Any], param: Param) -> Iterator[str]:
    if not isinstance(param.form, Mapping):
        yield "is no property string"
        return
    for name, fault in _table_faults(specs, param.form):
        yield f"property {name}: {fault}"


def _sample_faults(spec: Mapping[str, Any], param: Param) -> Iterator[str]:
    """What the format or pattern accepts and refuses, against what the node's parameter does."""
    form, pattern = spec.get("format"), spec.get("pattern")
    accepted: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    if pattern is not None:
        accepted, refused = _samples_of(python_pattern(pattern))
    elif form in FORMATS:
        accepted, refused = FORMATS[form]
    elif form is not None:
        yield f"the test has no samples of the format '{form}'"
    elif param.pattern is not None or (param.form is not None and not isinstance(param.form, Mapping)):
        yield "has a format or pattern, in Proxmox none"
    if spec.get("enum"):  # compared already
        return
    longest = spec.get("maxLength", 1 << 20)
    fitting = (text for text in accepted if spec.get("minLength", 0) <= len(text) <= longest)
    if missed := [text for text in fitting if not _takes(param, text)]:
        yield f"refuses {', '.join(map(repr, missed[:4]))}"
    if taken := [text for text in refused if _takes(param, text)]:
        yield f"accepts {', '.join(map(repr, taken[:4]))}"


@functools.cache
def _samples_of(pattern: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Strings that match a pattern whole, and near ones that do not."""
    compiled = re.compile(pattern, re.ASCII)
    found: set[str] = set()

    @settings(max_examples=30, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.from_regex(compiled, fullmatch=True, alphabet=st.characters(min_codepoint=0x21, max_codepoint=0x7E)))
    def collect(text: str) -> None:
        found.add(text)

    collect()
    near = {f"{text}{odd}" for text in found for odd in (" ", "/", "é", ";", "\u0661")}
    near |= {f"{odd}{text}" for text in found for odd in (" ", "é", "-", ";")} | {"", " ", "é", "../x"}
    return tuple(sorted(found)), tuple(sorted(text for text in near if not compiled.fullmatch(text)))


def _takes(param: Param, text: str) -> bool:
    try:
        check_value(param, text, "it")
    except ValueError:
        return False
    return True


def _number(text: Any) -> float | None:
    return None if text is None else float(text)


def _needs(permissions: Mapping[str, Any] | None) -> Need:
    """A `permissions` of the schema as the node writes it."""
    if not permissions:
        return ROOT_ONLY
    if "user" in permissions:
        return WORLD if permissions["user"] == "world" else ALL_USERS
    return _rule(permissions["check"])


def _rule(check: list[Any]) -> Need:
    kind, *rest = check
    if kind in ("and", "or"):
        rules = tuple(map(_rule, rest))
        return Both(rules) if kind == "and" else Either(rules)
    if kind == "userid-param":
        return UserParam(rest[0])
    if kind == "perm-modify":
        return PermModify(rest[0])
    if kind == "userid-group":
        return UserGroup(tuple(rest[0]), dict(zip(rest[1::2], rest[2::2], strict=True)).get("groups_param", ""))
    path, privileges, *options = rest
    marks = dict(zip(options[::2], options[1::2], strict=True))
    return Perm(path, tuple(privileges), bool(marks.get("any")), marks.get("require_param", ""))


def _plain(need: Need) -> Any:
    """Without what makes no difference: the order of privileges, and `any` of only one."""
    if isinstance(need, Both | Either):
        return type(need), tuple(map(_plain, need.rules))
    if isinstance(need, Perm):
        privileges = frozenset(need.privileges)
        return need.path, privileges, need.any and len(privileges) > 1, need.param
    if isinstance(need, UserGroup):
        return frozenset(need.privileges), need.groups_param
    return need
