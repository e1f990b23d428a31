"""What rules of the firewall may name: aliases and sets of addresses, of the datacenter and of each VM."""

from __future__ import annotations

import re
from typing import Any

from autovibe.node.firewall import Rules, alias, all_with_digest, digest_of
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.schema import firewall_formats as formats
from autovibe.node.state import Call, State
from autovibe.node.verbs.firewall import check_digest, commented, create_named, file_of, has_alias, kind_of, load


def refs(state: State, call: Call) -> list[dict[str, str]]:
    """What rules may name: aliases and sets of the datacenter and, for a VM, its own."""
    scopes = [("dc", state.firewall.load("cluster"))]
    if kind_of(call) == "vm":
        scopes.append(("guest", load(state, call)))
    found: list[dict[str, str]] = []
    for scope, rules in scopes:
        if call.get("type") != "alias":
            found += [_ref("ipset", scope, name, rules.ipset_comments.get(name)) for name in sorted(rules.ipsets)]
        if call.get("type") != "ipset":
            found += [_ref("alias", scope, e["name"], e.get("comment")) for _, e in sorted(rules.aliases.items())]
    return found


def _ref(kind: str, scope: str, name: str, comment: str | None) -> dict[str, str]:
    ref = f"{'+' if kind == 'ipset' else ''}{scope}/{name}"
    return {"type": kind, "name": name, "ref": ref, "scope": scope, **({"comment": comment} if comment else {})}


# Aliases


def list_aliases(state: State, call: Call) -> list[dict[str, Any]]:
    return all_with_digest(_sorted_aliases(load(state, call)))


def _sorted_aliases(rules: Rules) -> list[dict[str, Any]]:
    return [entry for _, entry in sorted(rules.aliases.items())]


def get_alias(state: State, call: Call) -> dict[str, Any]:
    return _alias(load(state, call), call)


def _alias(rules: Rules, call: Call) -> dict[str, Any]:
    if call["name"].lower() not in rules.aliases:
        raise faulty({"name": "no such alias"})
    return rules.aliases[call["name"].lower()]


def create_alias(state: State, call: Call) -> None:
    with state.firewall.editing(file_of(state, call)) as rules:
        if call["name"].lower() in rules.aliases:
            raise faulty({"name": f"alias '{call['name']}' already exists"})
        rules.aliases[call["name"].lower()] = _new_alias(call["name"], call)


def _new_alias(name: str, call: Call) -> dict[str, Any]:
    return {**alias(name, call["cidr"]), **({"comment": call["comment"]} if call.get("comment") else {})}


def update_alias(state: State, call: Call) -> None:
    with state.firewall.editing(file_of(state, call)) as rules:
        check_digest(call, digest_of(_sorted_aliases(rules)))
        _alias(rules, call)
        name, new = call["name"].lower(), call.get("rename", call["name"])
        if new.lower() != name and new.lower() in rules.aliases:
            raise faulty({"name": f"alias '{new}' already exists"})
        del rules.aliases[name]
        rules.aliases[new.lower()] = _new_alias(new, call)


def delete_alias(state: State, call: Call) -> None:
    with state.firewall.editing(file_of(state, call)) as rules:
        check_digest(call, digest_of(_sorted_aliases(rules)))
        rules.aliases.pop(call["name"].lower(), None)


# Sets of addresses


def list_sets(state: State, call: Call) -> list[dict[str, Any]]:
    rules = load(state, call)
    return all_with_digest(commented("name", rules.ipsets, rules.ipset_comments))


def create_set(state: State, call: Call) -> None:
    with state.firewall.editing(file_of(state, call)) as rules:
        check_digest(call, digest_of(commented("name", rules.ipsets, rules.ipset_comments)))
        create_named("name", "IPSet", call, rules.ipsets, rules.ipset_comments)


def _set(rules: Rules, call: Call) -> list[dict[str, Any]]:
    if call["name"] not in rules.ipsets:
        raise Refusal(f"no such IPSet '{call['name']}'")
    return rules.ipsets[call["name"]]


def delete_set(state: State, call: Call) -> None:
    with state.firewall.editing(file_of(state, call)) as rules:
        if _set(rules, call) and not call.get("force"):
            raise Refusal(f"IPSet '{call['name']}' is not empty")
        del rules.ipsets[call["name"]]
        rules.ipset_comments.pop(call["name"], None)


def list_entries(state: State, call: Call) -> list[dict[str, Any]]:
    return all_with_digest(_set(load(state, call), call))


def _clean(cidr: str) -> str:
    """An address without the prefix that says nothing."""
    return cidr.removesuffix("/128" if ":" in cidr else "/32")


def _entry(entries: list[dict[str, Any]], call: Call) -> dict[str, Any]:
    for entry in entries:
        if entry["cidr"] == _clean(call["cidr"]):
            return entry
    raise faulty({"cidr": "no such IP/Network"})


def get_entry(state: State, call: Call) -> dict[str, Any]:
    return _entry(list_entries(state, call), call)


def add_entry(state: State, call: Call) -> None:
    cidr = _clean(call["cidr"])
    with state.firewall.editing(file_of(state, call)) as rules:
        entries = _set(rules, call)
        if formats.is_reference(cidr) and not has_alias(cidr, [rules, state.firewall.load("cluster")]):
            raise Refusal(f"no such alias '{cidr}'")
        if any(entry["cidr"] == cidr for entry in entries):
            raise faulty({"cidr": f"address '{cidr}' already exists"})
        if re.search(r"/0+$", cidr):
            raise faulty({"cidr": "a zero prefix is not allowed in ipset entries"})
        entries.append({"cidr": cidr})
        _mark(entries[-1], call)
        entries.sort(key=lambda entry: str(entry["cidr"]))


def _mark(entry: dict[str, Any], call: Call) -> None:
    entry.pop("nomatch", None)
    entry.pop("comment", None)
    if call.get("nomatch"):
        entry["nomatch"] = 1
    if call.get("comment"):
        entry["comment"] = call["comment"]


def update_entry(state: State, call: Call) -> None:
    with state.firewall.editing(file_of(state, call)) as rules:
        entries = _set(rules, call)
        check_digest(call, digest_of(entries))
        _mark(_entry(entries, call), call)


def delete_entry(state: State, call: Call) -> None:
    with state.firewall.editing(file_of(state, call)) as rules:
        entries = _set(rules, call)
        check_digest(call, digest_of(entries))
        entries[:] = [entry for entry in entries if entry["cidr"] != _clean(call["cidr"])]
