"""The firewall's configuration over HTTP: what is held, in which files, and the one effect it has."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from autovibe.node.firewall import Firewall, Rules, parse, render
from autovibe.node.vm import command_line
from autovibe.node.vm.command_line import Places
from tests.contract.node_parts import Answer, Client, FlagQemu, make_node

N, C = "/nodes/pvetest", "/cluster/firewall"
EMPTY = "da39a3ee5e6b4b0d3255bfef95601890afd80709"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    node = make_node(tmp_path / "node", FlagQemu())
    found = Client(node)
    found.do("POST", f"{N}/qemu", vmid=400, net0="virtio,bridge=vmbr0,firewall=1", net1="virtio,bridge=vmbr0")
    yield found
    node.stop()


def put(client: Client, path: str, **fields: Any) -> Answer:
    answer = client.ask("PUT", path, fields)
    assert answer.data is None
    return answer


def post(client: Client, path: str, **fields: Any) -> None:
    assert client.ask("POST", path, fields).data is None


def faults(answer: Answer) -> Any:
    assert answer.status == 400, (answer.status, answer.reason)
    return answer.json["errors"]


def file_of(client: Client, name: str) -> str:
    return (client.node.home / "firewall" / f"{name}.fw").read_text(encoding="utf-8")


AT = [C, f"{N}/firewall", f"{N}/qemu/400/firewall"]


@pytest.mark.parametrize("at", AT)
def test_options_are_held_with_a_digest(client: Client, at: str) -> None:
    assert client.get(f"{at}/options") == {"digest": EMPTY}
    put(client, f"{at}/options", enable=1)
    held = client.get(f"{at}/options")
    assert held["enable"] == 1
    stale = client.ask("PUT", f"{at}/options", {"enable": 0, "digest": EMPTY})
    assert stale.reason == "detected modified configuration - file changed by other user? Try again."
    assert faults(client.ask("PUT", f"{at}/options", {"delete": "nope"})) == {"delete": "no such option 'nope'"}
    put(client, f"{at}/options", delete="enable", digest=held["digest"])
    assert client.get(f"{at}/options") == {"digest": EMPTY}
    assert not list((client.node.home / "firewall").iterdir())


@pytest.mark.parametrize("at", AT)
def test_the_index_names_what_is_there(client: Client, at: str) -> None:
    for entry in client.get(at):
        assert client.ask("GET", f"{at}/{entry['name']}").status == 200


def test_rules_as_recorded(client: Client) -> None:
    """The digest is the one a real Proxmox gave."""
    at = f"{N}/qemu/400/firewall/rules"
    post(client, at, type="in", action="ACCEPT", enable=1, proto="tcp", dport="22")
    rule = {"type": "in", "dport": "22", "action": "ACCEPT", "proto": "tcp", "enable": 1}
    digest = "82ff54375d64432ed03ad8e1833e6691f1a3af58"
    assert client.get(at) == [{**rule, "pos": 0, "digest": digest}]
    assert client.get(f"{at}/0") == {**rule, "pos": 0, "digest": digest}
    assert file_of(client, "400") == "[RULES]\n\nIN ACCEPT -p tcp -dport 22\n\n"


@pytest.mark.parametrize("at", AT)
def test_rules_are_put_first_moved_changed_and_deleted(client: Client, at: str) -> None:
    rules = f"{at}/rules"
    for comment in ("c", "b", "a"):
        post(client, rules, type="out", action="DROP", comment=comment)
    order = lambda: [rule["comment"] for rule in client.get(rules)]  # noqa: E731
    assert order() == ["a", "b", "c"]
    assert [rule["enable"] for rule in client.get(rules)] == [0, 0, 0]
    put(client, f"{rules}/0", moveto=2)
    assert order() == ["b", "a", "c"]
    put(client, f"{rules}/0", moveto=3)
    assert order() == ["a", "c", "b"]
    put(client, f"{rules}/2", moveto=0)
    assert order() == ["b", "a", "c"]
    put(client, f"{rules}/1", source="10.0.0.0/8", macro="ssh", log="info", enable=1)
    changed = client.get(f"{rules}/1")
    assert (changed["macro"], changed["source"], changed["ipversion"]) == ("SSH", "10.0.0.0/8", 4)
    put(client, f"{rules}/1", delete="macro,log")
    assert "macro" not in client.get(f"{rules}/1")
    refused = client.ask("PUT", f"{rules}/1", {"delete": "action"})
    assert faults(refused) == {"delete": "unable to delete required property 'action'"}
    assert client.ask("GET", f"{rules}/3").reason == "no rule at position 3"
    assert client.ask("DELETE", f"{rules}/3").reason == "no rule at position 3"
    stale = client.ask("DELETE", f"{rules}/0?digest={EMPTY}")
    assert stale.reason.startswith("detected modified configuration")
    assert client.ask("DELETE", f"{rules}/1").data is None
    assert order() == ["b", "c"]


@pytest.mark.parametrize(
    ("fields", "errors"),
    [
        ({"action": "ALLOW"}, {"action": "unknown action 'ALLOW'"}),
        ({"dport": "22"}, {"proto": "missing property - 'dport' requires this property"}),
        ({"proto": "gre", "dport": "22"}, {"dport": "protocol 'gre' does not support ports"}),
        ({"proto": "tcp", "icmp-type": "8"}, {"icmp-type": "protocol 'tcp' does not support 'icmp-type'"}),
        ({"source": "+nope"}, {"source": "no such ipset 'nope'"}),
        ({"dest": "nope"}, {"dest": "no such alias 'nope'"}),
        ({"macro": "Nope"}, {"macro": "unknown macro 'Nope'"}),
        ({"iface": "vmbr0"}, {"iface": "value does not match the regex pattern 'net\\d+'"}),
        ({"source": "10.0.0.1\nIN ACCEPT"}, {"source": "value may not contain control characters"}),
    ],
)
def test_rules_that_cannot_be(client: Client, fields: dict[str, str], errors: dict[str, str]) -> None:
    at = f"{N}/qemu/400/firewall/rules"
    assert faults(client.ask("POST", at, {"type": "in", "action": "DROP", **fields})) == errors
    assert client.get(at) == []


@pytest.mark.parametrize("key", ["source", "dport", "proto", "icmp-type", "iface", "comment"])
@pytest.mark.parametrize("text", ["10.0.0.1; DROP", "a b", "22\n|IN", "[RULES]", "é ", "-p", "$(id)"])
def test_no_value_leaves_its_line(client: Client, key: str, text: str) -> None:
    """A value is refused, or comes back as it was given, and no second rule appears."""
    at = f"{C}/rules"
    answer = client.ask("POST", at, {"type": "in", "action": "DROP", "proto": "tcp", key: text})
    if answer.status == 200:
        assert [rule.get(key, "").strip() for rule in client.get(at)] == [text.strip()]
    else:
        assert answer.status == 400
        assert client.get(at) == []


def test_groups(client: Client) -> None:
    post(client, f"{C}/groups", group="web", comment="what the web needs")
    assert faults(client.ask("POST", f"{C}/groups", {"group": "web"})) == {
        "group": "Security group 'web' already exists"
    }
    post(client, f"{C}/groups/web", type="in", action="ACCEPT", macro="HTTP", enable=1)
    refused = client.ask("POST", f"{C}/groups/web", {"type": "group", "action": "other"})
    assert faults(refused) == {"type": "security groups not allowed"}
    post(client, f"{N}/qemu/400/firewall/rules", type="group", action="web", enable=1)
    post(client, f"{C}/groups", group="www", rename="web")
    listed = client.get(f"{C}/groups")
    assert [(entry["group"], entry["comment"]) for entry in listed] == [("www", "what the web needs")]
    assert client.get(f"{C}/groups/www/0")["macro"] == "HTTP"
    assert "[group www] # what the web needs\n\nIN HTTP(ACCEPT)\n" in file_of(client, "cluster")
    assert client.ask("DELETE", f"{C}/groups/www").reason == "Security group 'www' is not empty"
    assert client.ask("DELETE", f"{C}/groups/www/0").data is None
    assert client.ask("DELETE", f"{C}/groups/www").data is None
    assert client.ask("GET", f"{C}/groups/www").reason == "no such security group 'www'"


@pytest.mark.parametrize("at", [C, f"{N}/qemu/400/firewall"])
def test_sets_and_aliases(client: Client, at: str) -> None:
    post(client, f"{at}/aliases", name="Office", cidr="192.0.2.0/24", comment="second floor")
    assert client.get(f"{at}/aliases/office")["cidr"] == "192.0.2.0/24"
    post(client, f"{at}/ipset", name="good")
    post(client, f"{at}/ipset/good", cidr="10.0.0.0/8")
    post(client, f"{at}/ipset/good", cidr="10.1.0.1/32", nomatch=1, comment="not that one")
    post(client, f"{at}/ipset/good", cidr="office")
    assert faults(client.ask("POST", f"{at}/ipset/good", {"cidr": "10.1.0.1"})) == {
        "cidr": "address '10.1.0.1' already exists"
    }
    assert client.ask("POST", f"{at}/ipset/good", {"cidr": "nobody"}).reason == "no such alias 'nobody'"
    network = f"{at}/ipset/good/{quote('10.0.0.0/8', safe='')}"
    put(client, network, comment="all of ours")
    assert client.get(network)["comment"] == "all of ours"
    assert [entry["cidr"] for entry in client.get(f"{at}/ipset/good")] == ["10.0.0.0/8", "10.1.0.1", "office"]
    post(client, f"{at}/rules", type="in", action="ACCEPT", source="+good", dest="office")
    assert client.ask("DELETE", f"{at}/ipset/good").reason == "IPSet 'good' is not empty"
    assert client.ask("DELETE", network).data is None
    assert faults(client.ask("GET", network)) == {"cidr": "no such IP/Network"}
    put(client, f"{at}/aliases/Office", cidr="192.0.2.1", rename="desk")
    assert [(entry["name"], entry["cidr"]) for entry in client.get(f"{at}/aliases")] == [("desk", "192.0.2.1")]
    scope = "dc" if at == C else "guest"
    refs = {(ref["type"], ref["ref"]) for ref in client.get(f"{at}/refs")}
    assert refs == {("alias", f"{scope}/desk"), ("ipset", f"+{scope}/good")}
    assert [ref["type"] for ref in client.get(f"{at}/refs", type="alias")] == ["alias"]
    assert client.ask("DELETE", f"{at}/ipset/good?force=1").data is None
    assert client.ask("DELETE", f"{at}/aliases/desk").data is None


def test_a_guests_rules_may_name_what_the_datacenter_has(client: Client) -> None:
    post(client, f"{C}/ipset", name="all")
    post(client, f"{N}/qemu/400/firewall/rules", type="in", action="DROP", source="+dc/all")
    assert [ref["scope"] for ref in client.get(f"{N}/qemu/400/firewall/refs")] == ["dc"]


def test_macros_and_logs(client: Client) -> None:
    names = [macro["macro"] for macro in client.get(f"{C}/macros")]
    assert {"SSH", "HTTPS", "Ping"} <= set(names)
    assert len(names) == len(set(names))
    assert client.get(f"{N}/qemu/400/firewall/log", start=0, limit=50) == [{"n": 1, "t": "no content"}]
    assert client.get(f"{N}/firewall/log") == [{"n": 1, "t": "no content"}]


def test_a_vms_rules_go_with_it_and_come_with_clones(client: Client) -> None:
    post(client, f"{N}/qemu/400/firewall/rules", type="in", action="DROP", comment="mine")
    client.do("POST", f"{N}/qemu/400/clone", newid=401)
    assert client.get(f"{N}/qemu/401/firewall/rules")[0]["comment"] == "mine"
    client.do("DELETE", f"{N}/qemu/400")
    gone = client.ask("GET", f"{N}/qemu/400/firewall/rules")
    assert gone.reason == "Configuration file 'nodes/pvetest/qemu-server/400.conf' does not exist"
    assert [path.name for path in (client.node.home / "firewall").iterdir()] == ["401.fw"]


def test_rules_survive_a_restart(client: Client) -> None:
    post(client, f"{C}/rules", type="in", action="DROP", comment="Grüße # und mehr")
    before = client.get(f"{C}/rules")
    again = Firewall(client.node.home / "firewall").load("cluster")
    assert [{**rule, "pos": 0, "digest": before[0]["digest"]} for rule in again.rules] == before


def test_a_policy_takes_away_the_way_out(client: Client) -> None:
    """Only with the datacenter's firewall on too, and only on cards with firewall=1; the SSH forward stays."""
    firewall = client.node.state.firewall
    put(client, f"{N}/qemu/400/firewall/options", enable=1, policy_out="DROP")
    assert not firewall.restricts_outbound(400)
    put(client, f"{C}/options", enable=1)
    assert firewall.restricts_outbound(400)
    config = client.node.state.configs.load(400).values
    places = Places(*(client.node.home / "x" for _ in Places._fields))
    argv = command_line.build(
        400,
        config,
        {},
        places,
        accel="tcg",
        forward=("127.0.0.2", 2222),
        is_restricted=firewall.restricts_outbound(400),
    )
    cards = [json.loads(text) for flag, text in itertools.pairwise(argv) if flag == "-netdev"]
    assert [card.get("restrict") for card in cards] == [True, None]
    assert cards[0]["hostfwd"]
    put(client, f"{N}/qemu/400/firewall/options", policy_out="ACCEPT")
    assert not firewall.restricts_outbound(400)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=20)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(comment=TEXT, name=st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{1,15}", fullmatch=True), enable=st.booleans())
@example(comment="# [RULES]", name="a-b", enable=False)
def test_what_is_written_is_read_again(comment: str, name: str, enable: bool) -> None:
    remark = {"comment": comment.strip()} if comment.strip() else {}
    rule = {"type": "in", "action": "DROP", "enable": int(enable), **remark}
    rules = Rules(rules=[rule], groups={name: [rule]}, ipsets={name: [{"cidr": "10.0.0.1", **remark}]})
    rules.group_comments = {name: comment.strip()} if comment.strip() else {}
    assert parse(render(rules)) == rules
