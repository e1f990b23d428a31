"""The firewall's configuration, in Proxmox's own files: `cluster.fw`, `host.fw` and one `<vmid>.fw` a VM.

    [OPTIONS]            enable: 1
    [ALIASES]            name 10.0.0.1 # comment
    [IPSET name] # …     !10.0.0.0/8 # comment
    [RULES]              |IN SSH(ACCEPT) -i net0 -source 10.0.0.1 -log nolog # comment      (`|`: not enabled)
    [group name] # …     rules, in cluster.fw only

A digest is the SHA-1 of what is answered, not of the file (as in Proxmox's Firewall.pm). The one effect on this node
is `restricts_outbound`: a VM whose outbound policy is not ACCEPT starts without a way out.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autovibe.node.files import replace_durably, sync_directory

Rule = dict[str, Any]

_SECTION = re.compile(r"\[(OPTIONS|ALIASES|RULES|(?:IPSET|group) +([A-Za-z][\w-]+))\]\s*(?:#\s*(.*))?", re.IGNORECASE)
_FLAGS = (
    *(("iface", "-i"), ("source", "-source"), ("dest", "-dest"), ("proto", "-p"), ("dport", "-dport")),
    *(("sport", "-sport"), ("log", "-log"), ("icmp-type", "-icmp-type")),
)
_KEYS = {flag: key for key, flag in _FLAGS}
_NUMBER = re.compile(r"\d{1,18}")
_TEXTS = ("log_ratelimit", "nf_conntrack_helpers")


@dataclass
class Rules:
    """One file. Aliases are by lower-case name; entries of a set `{cidr, nomatch, comment}`."""

    options: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, dict[str, Any]] = field(default_factory=dict)
    ipsets: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    ipset_comments: dict[str, str] = field(default_factory=dict)
    rules: list[Rule] = field(default_factory=list)
    groups: dict[str, list[Rule]] = field(default_factory=dict)
    group_comments: dict[str, str] = field(default_factory=dict)


class Firewall:
    """The files below `directory`. Changes are made inside `editing`, one at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.RLock()

    def load(self, name: str) -> Rules:
        """A file by its name without ending: `cluster`, `host` or a vmid."""
        try:
            return parse(self._path(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Rules()

    @contextlib.contextmanager
    def editing(self, name: str) -> Iterator[Rules]:
        """The file, written back when the block ends without an error; an empty one is removed."""
        with self._lock:
            found = self.load(name)
            yield found
            if text := render(found):
                self._directory.mkdir(mode=0o700, exist_ok=True)
                replace_durably(self._path(name), text)
            else:
                self.remove(name)

    def remove(self, name: str | int) -> None:
        """Forget a VM's file."""
        with self._lock:
            path = self._path(name)
            if path.exists():
                path.unlink()
                sync_directory(self._directory)

    def copy(self, source: int, target: int) -> None:
        """Give a clone its origin's rules; without any, the former ones of its number go."""
        with self._lock:
            path = self._path(source)
            if path.exists():
                replace_durably(self._path(target), path.read_text(encoding="utf-8"))
            else:
                self.remove(target)

    def restricts_outbound(self, vmid: int) -> bool:
        """Whether the VM's cards with `firewall=1` may not reach out: the firewall is on for the datacenter and for
        the VM, and the VM's outbound policy is DROP or REJECT.
        """
        options = self.load(str(vmid)).options
        is_on = self.load("cluster").options.get("enable", 0) and options.get("enable", 0)
        return bool(is_on) and options.get("policy_out", "ACCEPT") != "ACCEPT"

    def _path(self, name: str | int) -> Path:
        return self._directory / f"{name}.fw"


# Digests


def with_digest(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "digest": digest_of([values])}


def all_with_digest(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries, each with the digest of all."""
    found = [dict(entry) for entry in entries]
    digest = digest_of(found)
    return [{**entry, "digest": digest} for entry in found]


def digest_of(entries: Iterable[Mapping[str, Any]]) -> str:
    lines = (f"{key}:{entry[key]}\n" for entry in entries for key in sorted(entry))
    return hashlib.sha1("".join(lines).encode()).hexdigest()  # noqa: S324 - Proxmox's digest


# The files


def parse(text: str) -> Rules:
    """A file's text; lines that are none of ours are dropped, as Proxmox does with a warning."""
    found, kind, name = Rules(), "", ""
    for line in text.split("\n"):
        if match := _SECTION.fullmatch(line.strip()):
            kind, name = match[1].split()[0].upper(), match[2] or ""
            _open_section(found, kind, name, match[3])
        elif line.strip() and not line.startswith("#"):
            _parse_line(found, kind, name, line.strip())
    return found


def _open_section(found: Rules, kind: str, name: str, comment: str | None) -> None:
    if kind == "IPSET":
        found.ipsets.setdefault(name, [])
    elif kind == "GROUP":
        found.groups.setdefault(name, [])
    if comment and kind in ("IPSET", "GROUP"):
        comments = found.ipset_comments if kind == "IPSET" else found.group_comments
        comments[name] = comment


def _parse_line(found: Rules, kind: str, name: str, line: str) -> None:
    if kind == "OPTIONS":
        key, colon, value = line.partition(": ")
        if colon:
            found.options[key] = int(value) if _NUMBER.fullmatch(value) and key not in _TEXTS else value
        return
    body, _, comment = line.partition("#")
    remark = {"comment": comment.strip()} if comment.strip() else {}
    words = body.split()
    if kind == "ALIASES" and len(words) == 2:
        with contextlib.suppress(ValueError):  # edited by hand
            found.aliases[words[0].lower()] = {**alias(words[0], words[1]), **remark}
    elif kind == "IPSET" and len(words) == 1:
        cidr = words[0].removeprefix("!")
        found.ipsets[name].append({"cidr": cidr, **({"nomatch": 1} if words[0] != cidr else {}), **remark})
    elif kind in ("RULES", "GROUP") and len(words) >= 2:
        rules = found.rules if kind == "RULES" else found.groups[name]
        rules.append({**_parse_rule(words), **remark})


def alias(name: str, cidr: str) -> dict[str, Any]:
    return {"name": name, "cidr": cidr, "ipversion": ipaddress.ip_interface(cidr).version}


def _parse_rule(words: list[str]) -> Rule:
    rule: Rule = {"type": words[0].lstrip("|").lower(), "enable": 0 if words[0].startswith("|") else 1}
    if match := re.fullmatch(r"(.+)\((\w+)\)", words[1]):
        rule |= {"macro": match[1], "action": match[2]}
    else:
        rule["action"] = words[1]
    rule |= {_KEYS[flag]: value for flag, value in zip(words[2::2], words[3::2], strict=False) if flag in _KEYS}
    return rule | ip_version(rule)


def ip_version(rule: Rule) -> Rule:
    """`{ipversion}` of a rule whose source or destination is an address."""
    for key in ("dest", "source"):
        first = re.split(r"[,-]", rule.get(key, ""))[0]
        try:
            return {"ipversion": ipaddress.ip_interface(first).version}
        except ValueError:  # an alias, a set, or nothing
            continue
    return {}


def render(rules: Rules) -> str:
    """The file's text, empty for no rules at all."""
    text = ""
    if rules.options:
        text += "[OPTIONS]\n\n" + "".join(f"{key}: {rules.options[key]}\n" for key in sorted(rules.options)) + "\n"
    if rules.aliases:
        lines = (f"{each['name']} {each['cidr']}{_remark(each)}\n" for _, each in sorted(rules.aliases.items()))
        text += "[ALIASES]\n\n" + "".join(lines) + "\n"
    for name, entries in sorted(rules.ipsets.items()):
        lines = (f"{'!' if entry.get('nomatch') else ''}{entry['cidr']}{_remark(entry)}\n" for entry in entries)
        text += f"[IPSET {name}]{_remark({'comment': rules.ipset_comments.get(name)})}\n\n" + "".join(lines) + "\n"
    if rules.rules:
        text += "[RULES]\n\n" + "".join(map(_render_rule, rules.rules)) + "\n"
    for name, group in sorted(rules.groups.items()):
        comment = _remark({"comment": rules.group_comments.get(name)})
        text += f"[group {name}]{comment}\n\n" + "".join(map(_render_rule, group)) + "\n"
    return text


def _render_rule(rule: Rule) -> str:
    action = f"{rule['macro']}({rule['action']})" if rule.get("macro") else rule["action"]
    flags = "".join(f" {flag} {rule[key]}" for key, flag in _FLAGS if rule.get(key))
    return f"{'' if rule.get('enable') else '|'}{rule['type'].upper()} {action}{flags}{_remark(rule)}\n"


def _remark(entry: Mapping[str, Any]) -> str:
    comment = (entry.get("comment") or "").strip()
    return f" # {comment}" if comment else ""
