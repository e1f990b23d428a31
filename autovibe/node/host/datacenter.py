"""The options of the cluster and of the node: their tables, and how the cluster's are read.

All of them are kept; those that have an effect here are `next-id` (which vmids are offered), `max_workers` (how many
VMs are stopped at a time), and the tags of `user-tag-access` and `registered-tags` (which tags are offered). The
others are for web pages and other programs, which read them back.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autovibe.node import option_file
from autovibe.node.host import networks
from autovibe.node.refusal import Refusal
from autovibe.node.schema import formats
from autovibe.node.schema.options import DIGEST, FLAG, TEXT
from autovibe.node.schema.parameters import Param, Table, indexed, split_properties

FIRST_VMID, LAST_VMID = 100, 1_000_000
_NO_VMID = 1_000_000_000
MAC_PREFIX = "BC:24:11"

_TAG = r"[a-zA-Z0-9_][a-zA-Z0-9_\-+.]*"
_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?"
_COLOR = r"[0-9a-fA-F]{6}"
_ALWAYS = Param(enum=("always", "never"))
_NOTES = Param(max_length=65536, is_multiline=True)


def _email(text: str) -> None:
    if text and not re.fullmatch(r"[\w+~-]+(\.[\w+~-]+)*@[a-zA-Z0-9-]+(\.[a-zA-Z0-9-]+)*", text, re.ASCII):
        raise ValueError("value does not look like a valid email address")


def _mac_prefix(text: str) -> None:
    if not re.fullmatch(r"[a-fA-F0-9][02468aceACE](:[a-fA-F0-9]{2}){0,2}:?", text):
        raise ValueError("value is not a valid unicast MAC address prefix")


def _acme_domain(text: str) -> None:
    if not re.fullmatch(rf"(\*\.)?{_LABEL}(\.{_LABEL})*", text):
        raise ValueError("value does not look like a valid domain name")


def _acme_alias(text: str) -> None:
    if not re.fullmatch(rf"(\*\.)?_?{_LABEL}(\._?{_LABEL})*", text):
        raise ValueError("value does not look like a valid alias domain name")


def _acme_domains(text: str) -> None:
    for domain in filter(None, re.split(r"[,;\s]+", text)):
        _acme_domain(domain)


LOCATION: Table = {
    "latitude": Param("number", minimum=-90, maximum=90, optional=False),
    "longitude": Param("number", minimum=-180, maximum=180, optional=False),
    "name": Param(max_length=128),
}
_LIMITS: Table = dict.fromkeys(("clone", "default", "migration", "move", "restore"), Param("number", minimum=0))
_CRS: Table = {
    "ha": Param(enum=("basic", "static", "dynamic")),
    "ha-auto-rebalance": FLAG,
    "ha-auto-rebalance-hold-duration": Param("number", minimum=0, requires="ha-auto-rebalance"),
    "ha-auto-rebalance-margin": Param("number", minimum=0, maximum=100, requires="ha-auto-rebalance"),
    "ha-auto-rebalance-method": Param(enum=("bruteforce", "topsis"), requires="ha-auto-rebalance"),
    "ha-auto-rebalance-threshold": Param("number", minimum=0, maximum=100, requires="ha-auto-rebalance"),
    "ha-rebalance-on-start": FLAG,
}
_TRANSFER: Table = {
    "type": Param(enum=("secure", "insecure"), default_key=True, optional=False),
    "network": Param(form=formats.network),
}
_NOTIFY: Table = {
    "fencing": _ALWAYS,
    "package-updates": Param(enum=("auto", "always", "never")),
    "replication": _ALWAYS,
    **dict.fromkeys(("target-fencing", "target-package-updates", "target-replication"), TEXT),
}
_TAG_STYLE: Table = {
    "case-sensitive": FLAG,
    "color-map": Param(pattern=rf"{_TAG}:{_COLOR}(:{_COLOR})?(;{_TAG}:{_COLOR}(:{_COLOR})?)*"),
    "ordering": Param(enum=("config", "alphabetical")),
    "shape": Param(enum=("full", "circle", "dense", "none")),
}
_TAG_ACCESS: Table = {
    "user-allow": Param(enum=("none", "list", "existing", "free")),
    "user-allow-list": Param(pattern=rf"{_TAG}(;{_TAG})*"),
}
_WEBAUTHN: Table = {"allow-subdomains": FLAG, **dict.fromkeys(("id", "origin", "rp"), TEXT)}
_KEYBOARDS = (
    "de", "de-ch", "da", "en-gb", "en-us", "es", "fi", "fr", "fr-be", "fr-ca", "fr-ch", "hu", "is", "it", "ja", "lt",
    "mk", "nl", "no", "pl", "pt", "pt-br", "sv", "sl", "tr",
)  # fmt: skip
_LANGUAGES = (
    "ar", "ca", "da", "de", "en", "es", "eu", "fa", "fr", "hr", "he", "it", "ja", "ka", "kr", "nb", "nl", "nn", "pl",
    "pt_BR", "ru", "sl", "sv", "tr", "ukr", "zh_CN", "zh_TW",
)  # fmt: skip

CLUSTER: Table = {
    "bwlimit": Param(form=_LIMITS),
    "consent-text": Param(max_length=65536, is_multiline=True),
    "console": Param(enum=("applet", "vv", "html5", "xtermjs")),
    "crs": Param(form=_CRS),
    "description": _NOTES,
    "email_from": Param(form=_email),
    "fencing": Param(enum=("watchdog", "hardware", "both")),
    "ha": Param(form={"shutdown_policy": Param(enum=("freeze", "failover", "conditional", "migrate"), optional=False)}),
    "http_proxy": Param(pattern=r"http://.*"),
    "keyboard": Param(enum=_KEYBOARDS),
    "language": Param(enum=_LANGUAGES),
    "location": Param(form=LOCATION),
    "mac_prefix": Param(form=_mac_prefix),
    "max_workers": Param("integer", minimum=1),
    "migration": Param(form=_TRANSFER),
    "migration_unsecure": FLAG,
    "next-id": Param(form={"lower": Param("integer"), "upper": Param("integer")}),
    "notify": Param(form=_NOTIFY),
    "registered-tags": Param(pattern=rf"({_TAG};)*{_TAG}"),
    "replication": Param(form=_TRANSFER),
    "tag-style": Param(form=_TAG_STYLE),
    "u2f": Param(form={"appid": TEXT, "origin": TEXT}),
    "user-tag-access": Param(form=_TAG_ACCESS),
    "webauthn": Param(form=_WEBAUTHN),
}
_AS_OBJECTS = (
    "crs", "ha", "migration", "next-id", "notify", "tag-style", "u2f", "user-tag-access", "webauthn",
)  # fmt: skip
"""Options that are written as property strings and read as objects (DataCenterConfig.pm)."""

NODE_OPTIONS: Table = {
    "acme": Param(form={"account": Param(form=formats.config_id), "domains": Param(form=_acme_domains)}),
    **indexed(
        "acmedomain",
        6,
        Param(
            form={
                "domain": Param(form=_acme_domain, default_key=True, optional=False),
                "alias": Param(form=_acme_alias),
                "plugin": Param(form=formats.config_id),
            }
        ),
    ),
    "ballooning-target": Param("integer", minimum=0, maximum=100),
    "description": _NOTES,
    "location": Param(form=LOCATION),
    "startall-onboot-delay": Param("integer", minimum=0, maximum=300),
    "wakeonlan": Param(
        form={
            "mac": Param(form=formats.mac_address, default_key=True, optional=False),
            "bind-interface": Param(form=networks.interface_name),
            "broadcast-address": Param(form=formats.address_v4),
        }
    ),
}
CHANGING: Table = {"delete": Param(form=formats.config_ids)}
CHANGING_WITH_DIGEST: Table = {**CHANGING, "digest": DIGEST}


def cluster_options(home: Path) -> dict[str, Any]:
    """datacenter.cfg as the API gives it."""
    found: dict[str, Any] = {"description": "", "mac_prefix": MAC_PREFIX, **option_file.read(cluster_file(home)).values}
    if found["description"]:
        found["description"] += "\n"
    for key in _AS_OBJECTS:
        if key in found:
            found[key] = _object(CLUSTER[key], found[key])
    for holder, key in ((found, "registered-tags"), (found.get("user-tag-access", {}), "user-allow-list")):
        if key in holder:
            holder[key] = holder[key].split(";")
    if "migration_unsecure" in found:
        found.setdefault("migration", {"type": "insecure" if found["migration_unsecure"] == "1" else "secure"})
    return {key: _typed(CLUSTER[key], value) for key, value in found.items() if key in CLUSTER}


def cluster_file(home: Path) -> Path:
    return home / "datacenter.cfg"


def node_file(home: Path) -> Path:
    return home / "config"


def node_options(home: Path) -> dict[str, Any]:
    config = option_file.read(node_file(home))
    known = {key: _typed(NODE_OPTIONS[key], value) for key, value in config.values.items() if key in NODE_OPTIONS}
    return {**known, "digest": config.digest}


def vmid_range(home: Path) -> tuple[int, int]:
    """The vmids that are offered: from the first up to, but without, the last."""
    return _range(option_file.read(cluster_file(home)).values)


def check_vmid_range(values: Mapping[str, str]) -> None:
    lower, upper = _range(values)
    if lower > upper:
        raise Refusal(f"lower ({lower}) <= upper ({upper}) boundary rule broken")


def _range(values: Mapping[str, str]) -> tuple[int, int]:
    given = _object(CLUSTER["next-id"], values.get("next-id", ""))
    numbers = {key: value for key, value in given.items() if isinstance(value, int)}
    return max(numbers.get("lower", FIRST_VMID), FIRST_VMID), min(numbers.get("upper", LAST_VMID), _NO_VMID)


def _object(param: Param, text: str) -> dict[str, Any]:
    table: Table = param.form  # type: ignore[assignment]
    try:
        found = split_properties(table, text)
    except ValueError:  # a file edited by hand
        return {}
    return {key: _typed(table[key], value) for key, value in found.items() if key in table}


def _typed(param: Param, value: Any) -> Any:
    """A stored text in its type; what is no number in a file edited by hand stays text."""
    with contextlib.suppress(ValueError):
        if param.kind in ("integer", "boolean") and isinstance(value, str):
            return int(value)
        if param.kind == "number" and isinstance(value, str):
            return float(value)
    return value
