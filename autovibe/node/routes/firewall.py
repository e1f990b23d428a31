"""Routes about the firewall: of the datacenter, the node and each VM."""

from __future__ import annotations

from collections.abc import Iterator

from autovibe.node.access.permissions import ALL_USERS, Need, perm
from autovibe.node.routes.route import START, N, Route, V, on_node, on_vm, route
from autovibe.node.schema import firewall_formats as fw
from autovibe.node.schema import formats
from autovibe.node.schema.options import FLAG, TEXT
from autovibe.node.schema.parameters import Param, Table
from autovibe.node.state import Call, State
from autovibe.node.verbs import firewall, firewall_names

_LEVEL = Param(enum=("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug", "nolog"))
_POLICY = Param(enum=("ACCEPT", "REJECT", "DROP"))
_COUNT = Param("integer", minimum=0)
_DIGEST = Param(max_length=64)
_NAME = Param(pattern=fw.NAME, min_length=2, max_length=64, optional=False)
_GROUP = Param(pattern=fw.NAME, min_length=2, max_length=18, optional=False)
_RENAME = Param(pattern=fw.NAME, min_length=2, max_length=64)
_POS: Table = {"pos": _COUNT}
_LOG: Table = {"start": START, "limit": START, "since": START, "until": START}
_REFS: Table = {"type": Param(enum=("alias", "ipset"))}

_RULE: Table = {
    "action": Param(pattern=fw.NAME, min_length=2, max_length=20),
    "comment": TEXT,
    "dest": Param(form=fw.address_spec, max_length=512),
    "digest": _DIGEST,
    "dport": Param(form=fw.destination_port_spec),
    "enable": _COUNT,
    "icmp-type": Param(form=fw.icmp_type),
    "iface": Param(form=fw.interface, min_length=2, max_length=20),
    "log": _LEVEL,
    "macro": Param(max_length=128),
    "pos": _COUNT,
    "proto": Param(form=fw.protocol),
    "source": Param(form=fw.address_spec, max_length=512),
    "sport": Param(form=fw.port_spec),
    "type": Param(enum=("in", "out", "forward", "group")),
}
_NEW_RULE: Table = {**_RULE, "action": _RULE["action"].required(), "type": _RULE["type"].required()}
_CHANGED_RULE: Table = {**_RULE, "moveto": _COUNT, "delete": Param(form=formats.config_ids)}

_CLUSTER_OPTIONS: Table = {
    "ebtables": FLAG,
    "enable": _COUNT,
    "log_ratelimit": Param(
        form={
            "enable": Param("boolean", optional=False, default_key=True),
            "burst": _COUNT,
            "rate": Param(pattern=r"[1-9][0-9]*/(second|minute|hour|day)"),
        }
    ),
    "policy_forward": Param(enum=("ACCEPT", "DROP")),
    "policy_in": _POLICY,
    "policy_out": _POLICY,
}
_HOST_OPTIONS: Table = {
    **dict.fromkeys(
        (
            "enable", "log_nf_conntrack", "ndp", "nf_conntrack_allow_invalid", "nftables", "nosmurfs",
            "protection_synflood", "tcpflags",
        ),
        FLAG,
    ),
    **dict.fromkeys(
        ("log_level_forward", "log_level_in", "log_level_out", "smurf_log_level", "tcp_flags_log_level"), _LEVEL
    ),
    "nf_conntrack_helpers": Param(form=fw.conntrack_helpers),
    "nf_conntrack_max": Param("integer", minimum=32768),
    "nf_conntrack_tcp_timeout_established": Param("integer", minimum=7875),
    "nf_conntrack_tcp_timeout_syn_recv": Param("integer", minimum=30, maximum=60),
    "protection_synflood_burst": Param("integer"),
    "protection_synflood_rate": Param("integer"),
}  # fmt: skip
_VM_OPTIONS: Table = {
    **dict.fromkeys(("dhcp", "enable", "ipfilter", "macfilter", "ndp", "radv"), FLAG),
    **dict.fromkeys(("log_level_in", "log_level_out"), _LEVEL),
    **dict.fromkeys(("policy_in", "policy_out"), _POLICY),
}


def _options(at: str, reading: Need, changing: Need, table: Table) -> Iterator[Route]:
    known = frozenset(table)

    def set_options(state: State, call: Call) -> None:
        firewall.set_options(state, call, known)

    changes = {**table, "delete": Param(form=formats.config_ids), "digest": _DIGEST}
    yield route("GET", f"{at}/options", firewall.options, reading)
    yield route("PUT", f"{at}/options", set_options, changing, changes)


def _rules(at: str, reading: Need, changing: Need, path: Table) -> Iterator[Route]:
    """The rules of a place, or of a group."""
    yield route("GET", at, firewall.list_rules, reading, path)
    yield route("POST", at, firewall.create_rule, changing, {**_NEW_RULE, **path})
    yield route("GET", f"{at}/{{pos}}", firewall.get_rule, reading, {**_POS, **path})
    yield route("PUT", f"{at}/{{pos}}", firewall.update_rule, changing, {**_CHANGED_RULE, **path})
    yield route("DELETE", f"{at}/{{pos}}", firewall.delete_rule, changing, {**_POS, "digest": _DIGEST, **path})


def _aliases(at: str, reading: Need, changing: Need) -> Iterator[Route]:
    name, cidr = {"name": _NAME}, Param(form=fw.cidr, optional=False)
    one = f"{at}/{{name}}"
    yield route("GET", at, firewall_names.list_aliases, reading)
    yield route("POST", at, firewall_names.create_alias, changing, {**name, "cidr": cidr, "comment": TEXT})
    yield route("GET", one, firewall_names.get_alias, reading, name)
    changes = {**name, "cidr": cidr, "comment": TEXT, "rename": _RENAME, "digest": _DIGEST}
    yield route("PUT", one, firewall_names.update_alias, changing, changes)
    yield route("DELETE", one, firewall_names.delete_alias, changing, {**name, "digest": _DIGEST})


def _sets(at: str, reading: Need, changing: Need) -> Iterator[Route]:
    name: Table = {"name": _NAME}
    entry: Table = {**name, "cidr": Param(form=fw.cidr_or_alias, optional=False)}
    marks: Table = {"comment": TEXT, "nomatch": FLAG}
    one, member = f"{at}/{{name}}", f"{at}/{{name}}/{{cidr}}"
    yield route("GET", at, firewall_names.list_sets, reading)
    new = {**name, "comment": TEXT, "rename": _RENAME, "digest": _DIGEST}
    yield route("POST", at, firewall_names.create_set, changing, new)
    yield route("GET", one, firewall_names.list_entries, reading, name)
    yield route("POST", one, firewall_names.add_entry, changing, {**entry, **marks})
    yield route("DELETE", one, firewall_names.delete_set, changing, {**name, "force": FLAG})
    yield route("GET", member, firewall_names.get_entry, reading, entry)
    yield route("PUT", member, firewall_names.update_entry, changing, {**entry, **marks, "digest": _DIGEST})
    yield route("DELETE", member, firewall_names.delete_entry, changing, {**entry, "digest": _DIGEST})


def _groups(at: str, reading: Need, changing: Need) -> Iterator[Route]:
    group: Table = {"group": _GROUP}
    new = {**group, "comment": TEXT, "rename": Param(pattern=fw.NAME, min_length=2, max_length=18), "digest": _DIGEST}
    yield route("GET", at, firewall.list_groups, ALL_USERS)
    yield route("POST", at, firewall.create_group, changing, new)
    yield route("DELETE", f"{at}/{{group}}", firewall.delete_group, changing, group)
    yield from _rules(f"{at}/{{group}}", reading, changing, group)


def _cluster() -> Iterator[Route]:
    at, reading, changing = "/cluster/firewall", perm("/", "Sys.Audit"), perm("/", "Sys.Modify")
    yield route("GET", at, firewall.index, ALL_USERS)
    yield route("GET", f"{at}/macros", firewall.macros, ALL_USERS)
    yield route("GET", f"{at}/refs", firewall_names.refs, reading, _REFS)
    yield from _options(at, reading, changing, _CLUSTER_OPTIONS)
    yield from _rules(f"{at}/rules", reading, changing, {})
    yield from _groups(f"{at}/groups", reading, changing)
    yield from _sets(f"{at}/ipset", reading, changing)
    yield from _aliases(f"{at}/aliases", reading, changing)


def _host() -> Iterator[Route]:
    at, reading, changing = f"{N}/firewall", on_node("Sys.Audit"), on_node("Sys.Modify")
    yield route("GET", at, firewall.index, ALL_USERS)
    yield route("GET", f"{at}/log", firewall.log, on_node("Sys.Syslog"), _LOG)
    yield from _options(at, reading, changing, _HOST_OPTIONS)
    yield from _rules(f"{at}/rules", reading, changing, {})


def _vm() -> Iterator[Route]:
    at, reading, changing = f"{V}/firewall", on_vm("VM.Audit"), on_vm("VM.Config.Network")
    yield route("GET", at, firewall.index, ALL_USERS)
    yield route("GET", f"{at}/log", firewall.log, on_vm("VM.Console"), _LOG)
    yield route("GET", f"{at}/refs", firewall_names.refs, reading, _REFS)
    yield from _options(at, reading, changing, _VM_OPTIONS)
    yield from _rules(f"{at}/rules", reading, changing, {})
    yield from _sets(f"{at}/ipset", reading, changing)
    yield from _aliases(f"{at}/aliases", reading, changing)


ROUTES: tuple[Route, ...] = (*_cluster(), *_host(), *_vm())
