"""The firewall's configuration of the datacenter, the node and each VM: options, rules, groups.

One verb serves all three: a call about a VM has `vmid`, one about the node only `node`. Texts are Proxmox's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from autovibe.node.firewall import Rule, Rules, all_with_digest, digest_of, with_digest
from autovibe.node.refusal import Refusal, faulty
from autovibe.node.schema import firewall_formats as formats
from autovibe.node.schema.parameters import render
from autovibe.node.state import Call, Page, State

_RULE_KEYS = (
    "action", "comment", "dest", "dport", "enable", "icmp-type", "iface", "log", "macro", "proto", "source", "sport",
    "type",
)  # fmt: skip
_INDEXES = {
    "cluster": ("aliases", "groups", "ipset", "macros", "options", "refs", "rules"),
    "host": ("log", "options", "rules"),
    "vm": ("aliases", "ipset", "log", "options", "refs", "rules"),
}


def kind_of(call: Call) -> str:
    """Whose firewall a call is about: of a `vm`, the `host`, or the `cluster`."""
    return "vm" if call.get("vmid") is not None else "host" if call.get("node") is not None else "cluster"


def file_of(state: State, call: Call) -> str:
    """The file of a call; a VM must exist."""
    if kind_of(call) == "vm":
        state.configs.load(call.vmid)
        return str(call.vmid)
    return kind_of(call)


def load(state: State, call: Call) -> Rules:
    return state.firewall.load(file_of(state, call))


def check_digest(call: Call, digest: str) -> None:
    if call.get("digest") not in (None, digest):
        raise Refusal("detected modified configuration - file changed by other user? Try again.")


def index(state: State, call: Call) -> list[dict[str, str]]:
    file_of(state, call)
    return [{"name": name} for name in _INDEXES[kind_of(call)]]


def macros(_state: State, _call: Call) -> list[dict[str, str]]:
    return [{"macro": name, "descr": text} for name, text in sorted(formats.MACROS.items())]


def log(state: State, call: Call) -> Page:
    """Nothing is filtered packet by packet here, so nothing is logged."""
    file_of(state, call)
    return Page([{"n": 1, "t": "no content"}], 1)


# Options


def options(state: State, call: Call) -> dict[str, Any]:
    return with_digest(load(state, call).options)


def set_options(state: State, call: Call, known: frozenset[str]) -> None:
    with state.firewall.editing(file_of(state, call)) as rules:
        check_digest(call, digest_of([rules.options]))
        for key in _listed(call.get("delete", "")):
            if key not in known:
                raise faulty({"delete": f"no such option '{key}'"})
            rules.options.pop(key, None)
        for key in known & call.parameters.keys():
            value = call[key]
            rules.options[key] = int(value) if isinstance(value, int) else render(value)


def _listed(text: str) -> list[str]:
    return [item for item in re.split(r"[,;\s]+", text) if item]


# Rules, of the three and of the datacenter's groups


def _rules_of(rules: Rules, call: Call) -> list[Rule]:
    group = call.get("group")
    if group is None:
        return rules.rules
    if group not in rules.groups:
        raise Refusal(f"no such security group '{group}'")
    return rules.groups[group]


def list_rules(state: State, call: Call) -> list[dict[str, Any]]:
    listed = all_with_digest(_rules_of(load(state, call), call))
    return [{**rule, "pos": pos} for pos, rule in enumerate(listed)]


def get_rule(state: State, call: Call) -> dict[str, Any]:
    listed = list_rules(state, call)
    _require_position(call, listed)
    found: dict[str, Any] = listed[call["pos"]]
    return found


def _require_position(call: Call, rules: list[Any]) -> None:
    if call["pos"] >= len(rules):
        raise Refusal(f"no rule at position {call['pos']}")


def create_rule(state: State, call: Call) -> None:
    """Put a new rule before all others."""
    with state.firewall.editing(file_of(state, call)) as rules:
        present = _rules_of(rules, call)
        check_digest(call, digest_of(present))
        rule: Rule = {"enable": 0}
        _take(rule, call)
        _verify(state, call, rule, rules)
        present.insert(0, rule)


def _take(rule: Rule, call: Call) -> None:
    """Take the call's values; an empty one, or `-`, takes away."""
    for key in _RULE_KEYS:
        value = call.get(key)
        if value in ("", "-"):
            rule.pop(key, None)
        elif value is not None:
            rule[key] = value


def update_rule(state: State, call: Call) -> None:
    with state.firewall.editing(file_of(state, call)) as rules:
        present = _rules_of(rules, call)
        check_digest(call, digest_of(present))
        _require_position(call, present)
        moveto = call.get("moveto")
        if moveto is not None and moveto != call["pos"]:
            _move(present, call["pos"], moveto)
            return
        rule = present[call["pos"]]
        _take(rule, call)
        for key in _listed(call.get("delete", "")):
            if key not in (*_RULE_KEYS, "pos", "digest"):
                raise faulty({"delete": f"no such property ('{key}')"})
            if key in ("type", "action"):
                raise faulty({"delete": f"unable to delete required property '{key}'"})
            rule.pop(key, None)
        rule.setdefault("enable", 0)
        _verify(state, call, rule, rules)


def _move(rules: list[Rule], pos: int, target: int) -> None:
    """The rule comes before the one that is at the target now, or last."""
    moved = [rule for number, rule in enumerate(rules) if number < target and number != pos]
    moved += [rules[pos], *(rule for number, rule in enumerate(rules) if number >= target and number != pos)]
    rules[:] = moved


def delete_rule(state: State, call: Call) -> None:
    with state.firewall.editing(file_of(state, call)) as rules:
        present = _rules_of(rules, call)
        check_digest(call, digest_of(present))
        _require_position(call, present)
        del present[call["pos"]]


def _verify(state: State, call: Call, rule: Rule, own: Rules) -> None:
    """Raises the 400 of a rule that contradicts itself or names what is not there (Firewall.pm verify_rule)."""
    kind = "group" if call.get("group") is not None else kind_of(call)
    _verify_type(rule, kind)
    if "macro" in rule:
        rule["macro"] = _checked("macro", formats.macro_name, rule["macro"])
    if (iface := rule.get("iface")) is not None:
        if kind == "group":
            raise faulty({"type": "parameter -i not allowed for this rule type"})
        if kind == "vm" and not re.fullmatch(r"net\d+", iface):
            raise faulty({"iface": "value does not match the regex pattern 'net\\d+'"})
    _verify_protocol(rule)
    known = [own] if kind in ("cluster", "group") else [own, state.firewall.load("cluster")]
    for key in ("source", "dest"):
        if key in rule:
            _verify_reference(key, rule[key], known)


def _verify_type(rule: Rule, kind: str) -> None:
    if rule["type"] == "group":
        if kind == "group":
            raise faulty({"type": "security groups not allowed"})
        return
    if rule["type"] == "forward" and kind == "vm":
        raise faulty({"type": "forward rules are not allowed for VMs"})
    allowed = ("ACCEPT", "DROP") if rule["type"] == "forward" else ("ACCEPT", "DROP", "REJECT")
    if rule["action"] not in allowed:
        raise faulty({"action": f"unknown action '{rule['action']}'"})


def _verify_protocol(rule: Rule) -> None:
    proto = rule.get("proto")
    for key in ("dport", "sport", "icmp-type"):
        if key in rule and proto is None and "macro" not in rule:
            raise faulty({"proto": f"missing property - '{key}' requires this property"})
    for key in ("dport", "sport"):
        is_type = key == "dport" and proto in formats.WITH_TYPES
        if key in rule and proto is not None and proto not in formats.WITH_PORTS and not is_type:
            raise faulty({key: f"protocol '{proto}' does not support ports"})
    if "icmp-type" in rule and proto is not None and proto not in formats.WITH_TYPES:
        raise faulty({"icmp-type": f"protocol '{proto}' does not support 'icmp-type'"})


def _checked(key: str, check: Callable[[str], str], text: str) -> str:
    try:
        return check(text)
    except ValueError as error:
        raise faulty({key: str(error)}) from None


def _verify_reference(key: str, text: str, known: list[Rules]) -> None:
    """A set or an alias that a rule names must be there."""
    if text.startswith("+"):
        name = text[1:].rpartition("/")[2]
        if not text.startswith("+sdn/") and not any(name in rules.ipsets for rules in known):
            raise faulty({key: f"no such ipset '{name}'"})
    elif formats.is_reference(text) and not has_alias(text, known):
        raise faulty({key: f"no such alias '{text}'"})


def has_alias(text: str, known: list[Rules]) -> bool:
    return any(text.rpartition("/")[2].lower() in rules.aliases for rules in known)


# Groups of the datacenter


def list_groups(state: State, _call: Call) -> list[dict[str, Any]]:
    rules = state.firewall.load("cluster")
    return all_with_digest(commented("group", rules.groups, rules.group_comments))


def commented(key: str, names: dict[str, Any], comments: dict[str, str]) -> list[dict[str, Any]]:
    return [{key: name, **({"comment": comments[name]} if comments.get(name) else {})} for name in sorted(names)]


def create_group(state: State, call: Call) -> None:
    with state.firewall.editing("cluster") as rules:
        check_digest(call, digest_of(commented("group", rules.groups, rules.group_comments)))
        create_named("group", "Security group", call, rules.groups, rules.group_comments)


def create_named(key: str, what: str, call: Call, named: dict[str, list[Any]], comments: dict[str, str]) -> None:
    """Make an empty group or set, or `rename` one, which may also only change its comment."""
    name, former = call[key], call.get("rename")
    if former is not None and former not in named:
        raise faulty({key: f"{what} '{former}' does not exist"})
    if name in named and name != former:
        raise faulty({key: f"{what} '{name}' already exists"})
    named[name] = named.pop(former) if former is not None else []
    comment = comments.pop(former, None) if former is not None else None
    comment = call.get("comment", comment)
    comments.pop(name, None)
    if comment:
        comments[name] = comment


def delete_group(state: State, call: Call) -> None:
    with state.firewall.editing("cluster") as rules:
        if _rules_of(rules, call):
            raise Refusal(f"Security group '{call['group']}' is not empty")
        del rules.groups[call["group"]]
        rules.group_comments.pop(call["group"], None)
