"""The API's reference, a test a sentence: the ids begin as the sentences do.

Asked of a Hub on each database, over HTTP; its node is the stub's. Where the reference is silent, tests beside this one
speak.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from autovibe import app
from autovibe.domain.machine_type import SHELL, TYPES
from tests.api.conftest import KEY, Served, error_of, serve, settings_of, until
from tests.api.reference import Json, Story, checked, find_reference, is_uuid, sentences
from tests.conftest import BACKENDS
from tests.stub.node import StubNode

CHECKS: dict[str, Callable[[Story], None]] = {}
Check = Callable[[Story], None]


def says(words: str) -> Callable[[Check], Check]:
    """Names the sentence a check is of by its first words."""

    def register(check: Check) -> Check:
        assert words not in CHECKS
        CHECKS[words] = check
        return check

    return register


@pytest.fixture(scope="module", params=BACKENDS)
def story(request: pytest.FixtureRequest, stub_node: StubNode) -> Iterator[Story]:
    path = Path(tempfile.mkdtemp(prefix="av-G-", dir="/tmp"))
    more: dict[str, Any] = {"api_key": KEY, "rate_limit_per_minute": 0, "rate_limit_heavy_per_minute": 0}
    more |= {"pool_daily_money": 100, "pool_daily_time_hours": 100, "pool_daily_api_calls": 10_000}
    if request.param == "postgres":
        server = request.getfixturevalue("postgres")
        more["database_url"] = server.create(is_migrated=True, backups=path / "backups")
    patch = pytest.MonkeyPatch()
    patch.setitem(TYPES, "claude_code", dataclasses.replace(SHELL, name="claude_code"))  # its agent is not here yet
    parts = app.build(stub_node.settings(path, **more))
    parts.start()
    url, stop = serve(parts)
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=f"{url}/api/v1", headers=headers, timeout=320, trust_env=False) as http:
        told = Story(Served(parts, url, http), patch.setattr)
        yield told
        told.close()
        until(lambda: all(e["ended_at"] for e in told.hub.get("/hub/experiments").json()["experiments"]), 90)
    stop()
    parts.close()
    patch.undo()
    if "database_url" in more:
        server.drop(more["database_url"])
    shutil.rmtree(path, ignore_errors=True)


def moment(value: Any) -> datetime:
    found = datetime.fromisoformat(value)
    assert found.tzinfo is not None
    return found


def is_money(value: Json) -> bool:
    return set(value) == {"amount", "currency", "micros"} and round(float(value["amount"]) * 1e6) == value["micros"]


# What it is


@says("the-hub-exposes-a-comprehensive-rest-api-for-managing-intelligent-machines-projects")
def _(story: Story) -> None:
    paths = checked(story.hub.get("/openapi.json"))["paths"]
    nouns = {path.removeprefix("/api/v1/").split("/")[0] for path in paths}
    assert {"machines", "projects", "checkpoints", "resources"} <= nouns


@says("all-endpoints-use-uuid-based-identification-and-support-real-time-resource-tracking")
def _(story: Story) -> None:
    for path, operations in checked(story.hub.get("/openapi.json"))["paths"].items():
        for operation in operations.values():
            named = [p for p in operation.get("parameters", []) if p["in"] == "path"]
            assert all(p["schema"].get("format") == "uuid" for p in named), path
    first = checked(story.hub.get(f"/machines/{story.machine}"))["resource_usage"]["time_minutes"]["actual"]

    def used() -> float:
        return float(story.hub.get(f"/machines/{story.machine}").json()["resource_usage"]["time_minutes"]["actual"])

    assert until(lambda: used() > first, 30), "the use of a machine that runs does not grow"


@says("the-api-base-url-is-https-hub-autovibe-local-api-v1-for")
def _(story: Story) -> None:
    paths = checked(story.hub.get("/openapi.json"))["paths"]
    assert all(path.startswith("/api/v1/") for path in paths)
    bare = httpx2.get(f"{story.hub.url}/machines", headers=dict(story.hub.http.headers), trust_env=False)
    error_of(bare, 404, "NOT_FOUND")


@says("all-api-requests-require-authentication-using-bearer-token-authorization-headers-with-the")
def _(story: Story) -> None:
    api = f"{story.hub.url}/api/v1"
    for path, operations in checked(story.hub.get("/openapi.json"))["paths"].items():
        for method in operations:
            if path == "/api/v1/health":
                continue
            url = story.hub.url + path.replace("{", "").replace("}", "")
            answer = httpx2.request(method, url, json={} if method != "get" else None, trust_env=False)
            error_of(answer, 401, "UNAUTHORIZED")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    assert httpx2.get(f"{api}/projects", headers=headers, trust_env=False).status_code == 200
    headers["Content-Type"] = "text/plain"
    error_of(httpx2.post(f"{api}/projects", content="{}", headers=headers, trust_env=False), 400, "INVALID_REQUEST")


# Machines


@says("the-post-machines-endpoint-creates-new-intelligent-machines-with-a-request-body")
def _(story: Story) -> None:
    made = story.spawned
    order = story.machine_order
    assert {name: made[name] for name in ("type", "project_uuid", "checkpoint_uuid", "prompt")} == {
        name: order[name] for name in ("type", "project_uuid", "checkpoint_uuid", "prompt")
    }
    constraints = made["resource_constraints"]
    assert constraints["max_money"] == {"amount": "2.000000", "currency": "USD", "micros": 2_000_000}
    assert (constraints["max_time_minutes"], constraints["max_api_calls"]) == (90, 40)
    output = checked(story.hub.get(f"/machines/{story.machine}/logs"))["text"]
    assert output == "placed\ndone\n"


@says("the-response-includes-the-assigned-machine-uuid-vm-id-spawning-status-estimated")
def _(story: Story) -> None:
    made = story.spawned
    assert is_uuid(made["uuid"])
    assert isinstance(made["vmid"], int)
    assert made["status"] == "spawning"
    moment(made["spawned_at"])
    estimated = {name: value["estimated"] for name, value in made["resource_usage"].items()}
    assert is_money(estimated.pop("money"))
    assert set(estimated) == {"time_minutes", "api_calls", "cpu_hours"}
    assert all(value > 0 for value in estimated.values())


@says("the-get-machines-machine_uuid-endpoint-retrieves-current-machine-status-including-uuid-type")
def _(story: Story) -> None:
    shown = checked(story.hub.get(f"/machines/{story.machine}"))
    assert (shown["uuid"], shown["type"], shown["status"]) == (story.machine, "claude_code", "active")
    assert shown["project_uuid"] == story.project
    assert shown["vmid"] in range(9000, 10000)
    assert shown["prompt"] == story.machine_order["prompt"]


@says("the-response-provides-detailed-resource-usage-with-estimated-and-actual-values-for")
def _(story: Story) -> None:
    machine = story.machine
    until(lambda: story.hub.get(f"/machines/{machine}").json()["resource_usage"]["time_minutes"]["actual"], 30)
    usage = checked(story.hub.get(f"/machines/{machine}"))["resource_usage"]
    assert set(usage) == {"money", "time_minutes", "api_calls", "cpu_hours"}
    assert all(set(value) == {"estimated", "actual"} for value in usage.values())
    assert is_money(usage["money"]["estimated"])
    assert usage["money"]["actual"]["micros"] >= 250_000
    assert usage["api_calls"]["actual"] == 7
    assert usage["time_minutes"]["actual"] > 0
    assert usage["cpu_hours"]["actual"] is not None


@says(
    "additional-information-includes-current-progress-description-last-checkpoint-reference-total-checkpoints-created"
)
def _(story: Story) -> None:
    made = story.checkpoint
    shown = checked(story.hub.get(f"/machines/{story.machine}"))
    assert shown["progress"] == "done"
    assert is_uuid(shown["last_checkpoint_uuid"])
    assert made["machine_uuid"] == story.machine
    assert shown["checkpoint_count"] >= 1
    assert moment(shown["spawned_at"]) <= moment(shown["updated_at"])


@says("the-get-machines-endpoint-supports-filtering-by-status-and-project_uuid-with-pagination")
def _(story: Story) -> None:
    _ = story.machine, story.terminated
    active = checked(story.hub.get("/machines", status="active", project_uuid=story.project))["machines"]
    assert [item["uuid"] for item in active] == [story.machine]
    ended = checked(story.hub.get("/machines", status="terminated", project_uuid=story.project))["machines"]
    assert story.branch["uuid"] in [item["uuid"] for item in ended]
    assert checked(story.hub.get("/machines", project_uuid=str(uuid4())))["machines"] == []
    assert len(checked(story.hub.get("/machines", limit=1))["machines"]) == 1
    for limit in (0, 201):
        error_of(story.hub.get("/machines", limit=limit), 400, "INVALID_REQUEST")


@says("the-response-contains-an-array-of-machine-objects-total-count-of-all")
def _(story: Story) -> None:
    _ = story.machine, story.branch
    total, seen, offset = None, [], 0
    while True:
        page = checked(story.hub.get("/machines", project_uuid=story.project, limit=1, offset=offset))
        assert total in (None, page["total_count"])
        total = page["total_count"]
        seen += [item["uuid"] for item in page["machines"]]
        if not page["has_more"]:
            assert page["next_offset"] is None
            break
        offset = page["next_offset"]
    assert len(seen) == len(set(seen)) == total
    assert {story.machine, story.branch["uuid"]} <= set(seen)


@says("the-post-machines-machine_uuid-terminate-endpoint-accepts-a-request-body-with-termination")
def _(story: Story) -> None:
    assert story.terminated["status"] == "terminated"
    plain = checked(story.hub.post("/machines", {"project_uuid": story.project}, wait=120), 201)
    ended = checked(story.hub.post(f"/machines/{plain['uuid']}/terminate", {"reason": "No more."}, wait=120))
    assert ended["final_checkpoint_uuid"] is None


@says("the-response-confirms-termination-status-provides-the-final-checkpoint-uuid-if-created")
def _(story: Story) -> None:
    ended = story.terminated
    assert ended["status"] == "terminated"
    final = checked(story.hub.get(f"/checkpoints/{ended['final_checkpoint_uuid']}"))
    assert (final["type"], final["machine_uuid"]) == ("final", story.branch["uuid"])
    usage = ended["resource_usage"]
    assert is_money(usage["money"]["actual"])
    assert all(usage[name]["actual"] is not None for name in ("time_minutes", "api_calls", "cpu_hours"))
    assert moment(ended["terminated_at"]) > moment(ended["spawned_at"])


@says("the-post-machines-machine_uuid-checkpoint-endpoint-creates-manual-checkpoints-with-a-request")
def _(story: Story) -> None:
    made = story.checkpoint
    assert (made["type"], made["context"], made["description"]) == ("manual", "TICKET-1", "Before the change.")


@says("the-response-provides-the-new-checkpoint-uuid-creation-timestamp-and-checkpoint-size")
def _(story: Story) -> None:
    made = story.checkpoint
    assert is_uuid(made["uuid"])
    moment(made["created_at"])
    assert made["size_bytes"] > 0
    assert made["size_mb"] == pytest.approx(made["size_bytes"] / 1e6, abs=0.0006)


# Projects


@says("the-post-projects-endpoint-creates-new-projects-with-a-request-body-containing")
def _(story: Story) -> None:
    made, order = story.project_made, story.order
    assert {name: made[name] for name in ("name", "greediness", "description")} == {
        name: order[name] for name in ("name", "greediness", "description")
    }
    budgets = made["resource_budgets"]
    assert budgets.pop("daily_money") == {"amount": "20.000000", "currency": "USD", "micros": 20_000_000}
    assert budgets == {name: value for name, value in order["resource_budgets"].items() if name != "daily_money"}
    for greediness in (-0.1, 1.1):
        error_of(story.hub.post("/projects", {"name": "x", "greediness": greediness}), 400, "INVALID_REQUEST")


@says("the-response-includes-the-assigned-project-uuid-confirmed-name-and-greediness-initial")
def _(story: Story) -> None:
    made = story.project_made
    assert is_uuid(made["uuid"])
    assert (made["name"], made["greediness"]) == (story.order["name"], 0.4)
    assert checked(story.hub.get(f"/checkpoints/{made['initial_checkpoint_uuid']}"))["type"] == "genesis"
    moment(made["created_at"])


@says("the-get-projects-project_uuid-endpoint-retrieves-comprehensive-project-information-including-uuid-name")
def _(story: Story) -> None:
    _ = story.machine
    shown = checked(story.hub.get(f"/projects/{story.project}"))
    assert (shown["uuid"], shown["name"]) == (story.project, story.order["name"])
    assert isinstance(shown["greediness"], float)
    assert is_uuid(shown["current_checkpoint_uuid"])
    today = shown["resource_usage_today"]
    for resource in ("money", "time_hours", "api_calls"):
        assert {"allocated", "used", "reserved", "remaining"} <= set(today[resource])
    money = {name: value["micros"] for name, value in today["money"].items()}
    assert money["allocated"] == money["used"] + money["reserved"] + money["remaining"] == 20_000_000
    assert today["api_calls"]["used"] == 7


@says("additional-details-include-active-machine-count-total-checkpoint-count-creation-timestamp-and")
def _(story: Story) -> None:
    _ = story.machine, story.checkpoint
    shown = checked(story.hub.get(f"/projects/{story.project}"))
    assert shown["active_machine_count"] >= 1
    assert shown["checkpoint_count"] == story.hub.get(f"/projects/{story.project}/checkpoints").json()["total_count"]
    assert moment(shown["created_at"]) <= moment(shown["updated_at"])


@says("the-put-projects-project_uuid-endpoint-updates-existing-projects-with-a-request-body")
def _(story: Story) -> None:
    changed = story.hub.http.put(f"/projects/{story.project}", json={"greediness": 0.3, "description": "Other."})
    assert (checked(changed)["greediness"], changed.json()["description"]) == (0.3, "Other.")
    assert changed.json()["name"] == story.order["name"]
    assert checked(story.hub.get(f"/projects/{story.project}"))["description"] == "Other."
    unknown = story.hub.http.put(f"/projects/{story.project}", json={"colour": "red"})
    error_of(unknown, 400, "INVALID_REQUEST")


@says("the-get-projects-endpoint-supports-filtering-by-active-status-and-sorting-by")
def _(story: Story) -> None:
    archived = checked(story.hub.post("/projects", {"name": f"p-{uuid4().hex[:8]}", "greediness": 0.9}), 201)["uuid"]
    checked(story.hub.http.put(f"/projects/{archived}", json={"status": "archived"}))

    def uuids(**query: Any) -> list[str]:
        return [item["uuid"] for item in checked(story.hub.get("/projects", limit=200, **query))["projects"]]

    assert archived not in uuids(active=True)
    assert story.project in uuids(active=True)
    assert archived in uuids(active=False)
    greedy = checked(story.hub.get("/projects", sort="greediness", limit=200))["projects"]
    shares = [item["greediness"] for item in greedy]
    assert shares == sorted(shares, reverse=True)


@says("the-response-contains-an-array-of-project-objects-with-basic-information-including")
def _(story: Story) -> None:
    _ = story.project_made
    page = checked(story.hub.get("/projects", limit=200))
    assert page["total_count"] == len(page["projects"])
    item = next(item for item in page["projects"] if item["uuid"] == story.project)
    assert {"uuid", "name", "greediness", "status", "resource_usage_today"} <= set(item)
    assert item["status"] == "active"


# Checkpoints


@says("the-get-projects-project_uuid-checkpoints-endpoint-supports-pagination-via-limit-parameter-and")
def _(story: Story) -> None:
    _ = story.checkpoint
    place = f"/projects/{story.project}/checkpoints"
    assert len(checked(story.hub.get(place, limit=1))["checkpoints"]) == 1
    assert {item["type"] for item in checked(story.hub.get(place, type="manual"))["checkpoints"]} == {"manual"}
    assert [item["type"] for item in checked(story.hub.get(place, type="genesis"))["checkpoints"]] == ["genesis"]


@says("the-response-contains-an-array-of-checkpoint-objects-with-uuid-creation-timestamp")
def _(story: Story) -> None:
    _ = story.second_checkpoint
    page = checked(story.hub.get(f"/projects/{story.project}/checkpoints", limit=1))
    assert page["total_count"] > 1
    assert page["has_more"]
    listed = checked(story.hub.get(f"/projects/{story.project}/checkpoints", limit=200))["checkpoints"]
    item = next(item for item in listed if item["uuid"] == story.checkpoint["uuid"])
    moment(item["created_at"])
    assert (item["machine_uuid"], item["type"]) == (story.machine, "manual")
    assert item["description"] == "Before the change."
    assert item["size_mb"] > 0
    assert item["file_count"] > 0


@says("the-get-checkpoints-checkpoint_uuid-endpoint-returns-detailed-checkpoint-information-including-uuid-project")
def _(story: Story) -> None:
    shown = checked(story.hub.get(f"/checkpoints/{story.second_checkpoint['uuid']}"))
    assert (shown["uuid"], shown["project_uuid"]) == (story.second_checkpoint["uuid"], story.project)
    assert shown["parent_uuid"] == story.checkpoint["uuid"]
    assert shown["machine_uuid"] == story.machine
    assert shown["proxmox_snapshot_id"] == f"av-{shown['uuid']}"


@says("the-response-includes-a-file-manifest-with-size-and-sha256-hash-for")
def _(story: Story) -> None:
    place = f"/checkpoints/{story.checkpoint['uuid']}"
    shown = checked(story.hub.get(place, include="manifest", path="/workspace"))
    file = shown["manifest"]["/workspace/a"]
    assert file["size"] == 4
    assert file["sha256"] == "2c8b08da5ce60398e1f19af0e5dccc744df274b826abe585eaba68c525434806"
    moment(shown["created_at"])
    assert shown["size_bytes"] > 0
    assert shown["metadata"]["trigger"] == "request"
    assert shown["context"] == "TICKET-1"


@says("the-post-checkpoints-checkpoint_uuid-spawn-endpoint-creates-new-machines-from-existing-checkpoints")
def _(story: Story) -> None:
    branch = story.branch
    assert (branch["type"], branch["prompt"], branch["exit_status"]) == ("shell", "cat a", 0)
    assert checked(story.hub.get(f"/machines/{branch['uuid']}/logs"))["text"] == "one\n"


@says("the-response-provides-the-new-machine-uuid-spawning-timestamp-and-parent-checkpoint")
def _(story: Story) -> None:
    assert is_uuid(story.branch["uuid"])
    moment(story.branch["spawned_at"])
    assert story.branch["checkpoint_uuid"] == story.checkpoint["uuid"]


@says("the-get-checkpoints-checkpoint1_uuid-diff-checkpoint2_uuid-endpoint-compares-two-checkpoints-and-returns")
def _(story: Story) -> None:
    diff = _diff(story)
    assert [item["path"] for item in diff["added"]] == ["/workspace/src/new"]
    assert [item["path"] for item in diff["modified"]] == ["/workspace/a"]
    assert [item["path"] for item in diff["deleted"]] == ["/workspace/src/gone"]


@says("the-response-includes-total-change-count-and-a-human-readable-summary-of")
def _(story: Story) -> None:
    diff = _diff(story)
    assert diff["total_changes"] == 3
    assert diff["summary"].startswith("3 changes: 1 added, 1 modified, 1 deleted")


def _diff(story: Story) -> Json:
    return checked(story.hub.get(f"/checkpoints/{story.checkpoint['uuid']}/diff/{story.second_checkpoint['uuid']}"))


# Resources


@says("the-get-resources-overview-endpoint-provides-system-wide-resource-statistics-including-daily")
def _(story: Story) -> None:
    _ = story.machine
    overview = checked(story.hub.get("/resources/overview"))
    money = overview["resource_usage_today"]["money"]
    assert money["allocated"]["micros"] == 100_000_000
    assert money["used"]["micros"] >= 250_000
    assert overview["active_machine_count"] >= 1
    assert overview["project_count"] == checked(story.hub.get("/projects"))["total_count"]


@says("resource-utilization-percentages-are-provided-for-money-time-api-calls-and-compute")
def _(story: Story) -> None:
    _ = story.machine
    percent = checked(story.hub.get("/resources/overview"))["utilization_percent"]
    assert set(percent) == {"money", "time", "api_calls", "compute"}
    assert all(0 <= value <= 100 for value in percent.values())
    assert percent["api_calls"] == pytest.approx(0.07, abs=0.01)


@says("the-response-includes-top-resource-consumers-with-project-details-and-usage-amounts")
def _(story: Story) -> None:
    _ = story.machine
    first = checked(story.hub.get("/resources/overview"))["top_consumers"][0]
    assert (first["project_uuid"], first["name"]) == (story.project, story.order["name"])
    assert first["money"]["micros"] >= 250_000
    assert first["api_calls"] == 7


@says("the-get-resources-projects-project_uuid-endpoint-supports-period-filtering-last_7_days-and-returns")
def _(story: Story) -> None:
    _ = story.machine
    place = f"/resources/projects/{story.project}"
    usage = checked(story.hub.get(place, period="last_7_days"))
    assert usage["period"] == checked(story.hub.get(place))["period"] == "last_7_days"
    total = usage["total_usage"]
    assert total["money"]["micros"] >= 250_000
    assert total["api_calls"] == 7
    assert total["time_hours"] > 0
    assert total["cpu_hours"] >= 0
    error_of(story.hub.get(place, period="last_fortnight"), 400, "INVALID_REQUEST")


@says("the-response-includes-daily-breakdown-with-date-specific-usage-and-active-machine")
def _(story: Story) -> None:
    _ = story.second_checkpoint, story.terminated
    usage = checked(story.hub.get(f"/resources/projects/{story.project}", period="last_7_days"))
    days = usage["daily_breakdown"]
    assert len(days) == 7
    assert sum(day["money"]["micros"] for day in days) == usage["total_usage"]["money"]["micros"]
    assert days[-1]["active_machine_count"] >= 2
    efficiency = usage["efficiency"]
    assert is_money(efficiency["cost_per_checkpoint"])
    assert efficiency["api_calls_per_operation"] is not None
    assert efficiency["average_machine_runtime_minutes"] > 0


@says("the-put-resources-projects-project_uuid-budget-endpoint-updates-project-resource-limits-with")
def _(story: Story) -> None:
    project = checked(story.hub.post("/projects", {"name": f"p-{uuid4().hex[:8]}"}), 201)["uuid"]
    limits = {"daily_money": 3.5, "daily_api_calls": 70, "max_concurrent_machines": 2}
    answer = checked(story.hub.http.put(f"/resources/projects/{project}/budget", json=limits))
    shown = checked(story.hub.get(f"/projects/{project}"))["resource_budgets"]
    assert shown == answer["resource_budgets"]
    assert shown["daily_money"]["micros"] == 3_500_000
    assert (shown["daily_api_calls"], shown["max_concurrent_machines"]) == (70, 2)


# The Hub


@says("the-get-hub-status-endpoint-returns-comprehensive-hub-health-information-including-hub")
def _(story: Story) -> None:
    made = checked(story.hub.get(f"/hub/checkpoints/{story.hub_checkpoint['uuid']}", wait=120))
    status = checked(story.hub.get("/hub/status"))
    assert is_uuid(status["uuid"])
    assert status["status"] in ("healthy", "degraded")
    assert status["uptime_hours"] > 0
    assert status["version"]
    assert is_uuid(status["last_checkpoint_uuid"])
    assert moment(status["last_checkpoint_at"]) >= moment(made["created_at"])


@says("the-response-provides-active-machine-and-project-counts-resource-utilization-percentages-for")
def _(story: Story) -> None:
    _ = story.machine
    status = checked(story.hub.get("/hub/status"))
    assert status["active_machine_count"] >= 1
    assert status["active_project_count"] >= 1
    use = status["resource_utilization"]
    assert all(0 <= use[name] <= 100 for name in ("cpu_percent", "memory_percent", "disk_percent"))
    statistics = status["api_statistics"]
    assert statistics["requests_per_hour"] > 0
    assert statistics["average_response_ms"] > 0
    assert 0 <= statistics["error_rate_percent"] <= 100


@says("the-post-hub-checkpoint-endpoint-creates-hub-checkpoints-with-a-request-body")
def _(story: Story) -> None:
    made = story.hub_checkpoint
    assert (made["type"], made["reason"]) == ("pre_experiment", "An experiment")
    assert made["description"] == "The state of today."


@says("the-response-provides-the-new-checkpoint-uuid-creation-timestamp-and-estimated-completion")
def _(story: Story) -> None:
    made = story.hub_checkpoint
    assert is_uuid(made["uuid"])
    assert moment(made["estimated_completion_at"]) >= moment(made["created_at"])


@says("the-post-hub-spawn-experimental-endpoint-creates-experimental-hub-instances-with-a")
def _(story: Story) -> None:
    made, order = story.experiment, story.experiment_order
    assert (made["checkpoint_uuid"], made["name"]) == (order["checkpoint_uuid"], "greedy")
    assert made["configuration"] == order["configuration"]
    days = (moment(made["ends_at"]) - moment(made["created_at"])).total_seconds() / 86400
    assert days == pytest.approx(3, abs=0.1)


@says("the-response-provides-experimental-hub-uuid-experiment-id-and-estimated-spawn-time")
def _(story: Story) -> None:
    made = story.experiment
    assert is_uuid(made["hub_uuid"])
    assert is_uuid(made["uuid"])
    assert moment(made["estimated_ready_at"]) > moment(made["created_at"])


# Health and analytics


@says("the-get-health-endpoint-returns-overall-system-health-status-and-individual-service")
def _(story: Story) -> None:
    health = checked(httpx2.get(f"{story.hub.url}/api/v1/health", trust_env=False))
    assert health["status"] in ("healthy", "degraded")
    assert {"hub", "database", "proxmox", "api"} <= set(health["services"])
    assert all(service["status"] in ("healthy", "degraded") for service in health["services"].values())


@says("the-response-includes-active-machine-count-overall-resource-utilization-percentage-and-timestamp")
def _(story: Story) -> None:
    _ = story.checkpoint
    health = checked(story.hub.get("/health"))
    assert health["active_machine_count"] >= 1
    assert 0 <= health["utilization_percent"] <= 100
    assert moment(health["last_checkpoint_at"]) >= moment(story.checkpoint["created_at"])


@says("the-get-analytics-efficiency-endpoint-supports-period-filtering-last_30_days-and-returns-overall")
def _(story: Story) -> None:
    _ = story.terminated
    report = checked(story.hub.get("/analytics/efficiency", period="last_30_days"))
    assert report["period"] == checked(story.hub.get("/analytics/efficiency"))["period"] == "last_30_days"
    overall = report["overall"]
    assert overall["total_operations"] >= overall["successful_operations"] >= 1
    assert overall["success_rate"] == pytest.approx(overall["successful_operations"] / overall["total_operations"])
    assert is_money(overall["average_cost_per_success"])


@says("machine-performance-is-broken-down-by-type-with-success-rates-average-costs")
def _(story: Story) -> None:
    _ = story.terminated
    kinds = {item["type"]: item for item in checked(story.hub.get("/analytics/efficiency"))["by_type"]}
    assert kinds["shell"]["success_rate"] is not None
    assert is_money(kinds["shell"]["average_cost"])
    assert kinds["shell"]["average_minutes"] > 0


@says("resource-trends-provide-daily-efficiency-scores-and-cost-per-operation-over-time")
def _(story: Story) -> None:
    _ = story.terminated
    trends = checked(story.hub.get("/analytics/efficiency", period="last_30_days"))["trends"]
    assert [day["date"] for day in trends] == sorted(day["date"] for day in trends)
    assert 0 <= trends[-1]["efficiency_score"] <= 1
    assert is_money(trends[-1]["cost_per_operation"])


# Errors


@says("all-api-errors-use-a-consistent-json-format-with-success-boolean-set")
def _(story: Story) -> None:
    missing = uuid4()
    first = error_of(story.hub.get(f"/machines/{missing}"), 404, "NOT_FOUND")
    assert first.details == {"object": "machine", "uuid": str(missing)}
    assert first.timestamp.tzinfo is not None
    second = error_of(story.hub.get(f"/machines/{missing}"), 404, "NOT_FOUND")
    assert first.request_id != second.request_id


@says("200-success")
def _(story: Story) -> None:
    for path in ("/machines", "/projects", "/health", "/hub/status", "/resources/overview", "/analytics/efficiency"):
        assert story.hub.get(path).status_code == 200


@says("201-created-machines-projects-checkpoints")
def _(story: Story) -> None:
    """The three are made by answers that were checked to be 201."""
    assert story.project_made["uuid"]
    assert story.spawned["uuid"]
    assert story.checkpoint["uuid"]


@says("400-bad-request-invalid-parameters")
def _(story: Story) -> None:
    error = error_of(story.hub.get("/machines", limit="many"), 400, "INVALID_REQUEST")
    assert error.details["fields"][0]["field"] == "query.limit"
    error_of(story.hub.get("/machines/no-uuid"), 400, "INVALID_REQUEST")
    error_of(story.hub.post("/projects", {}), 400, "INVALID_REQUEST")
    broken = story.hub.http.post("/projects", content="{", headers={"Content-Type": "application/json"})
    error_of(broken, 400, "INVALID_REQUEST")


@says("401-unauthorized-invalid-api-key")
def _(story: Story) -> None:
    headers = {"Authorization": "Bearer av_00000000_" + "x" * 43}
    error_of(story.hub.http.get("/machines", headers=headers), 401, "UNAUTHORIZED")


@says("403-forbidden-insufficient-permissions")
def _(story: Story) -> None:
    key = checked(story.hub.post("/keys", {"name": "reader", "role": "viewer"}), 201)["key"]
    headers = {"Authorization": f"Bearer {key}"}
    assert story.hub.http.get("/projects", headers=headers).status_code == 200
    error_of(story.hub.http.post("/projects", json={"name": "x"}, headers=headers), 403, "FORBIDDEN")


@says("404-not-found-resource-doesn-t-exist")
def _(story: Story) -> None:
    for noun in ("machines", "projects", "checkpoints", "operations", "resources/projects", "hub/checkpoints"):
        error_of(story.hub.get(f"/{noun}/{uuid4()}"), 404, "NOT_FOUND")
    error_of(story.hub.get("/no-such-route"), 404, "NOT_FOUND")
    error_of(story.hub.http.patch("/projects", json={}), 404, "NOT_FOUND")


@says("409-conflict-resource-limits-exceeded")
def _(story: Story) -> None:
    budgets = {"resource_budgets": {"daily_money": 0}}
    poor = checked(story.hub.post("/projects", {"name": f"p-{uuid4().hex[:8]}", **budgets}), 201)["uuid"]
    error = error_of(story.hub.post("/machines", {"project_uuid": poor}), 409, "RESOURCE_LIMIT_EXCEEDED")
    assert error.details["resource"] == "money"
    assert checked(story.hub.get("/machines", project_uuid=poor))["total_count"] == 0


@says("429-too-many-requests-rate-limited")
def _(story: Story) -> None:
    key = checked(story.hub.post("/keys", {"name": "hasty", "role": "viewer"}), 201)["key"]
    headers = {"Authorization": f"Bearer {key}"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story.hub.hub.limits, "per_minute", 3)
        answers = [story.hub.http.get("/projects", headers=headers) for _ in range(8)]
    refused = next(answer for answer in answers if answer.status_code == 429)
    error_of(refused, 429, "RATE_LIMITED")
    assert int(refused.headers["Retry-After"]) > 0
    assert {"x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"} <= set(refused.headers)


@says("500-internal-server-error-system-failure")
def _(story: Story) -> None:
    home = Path(tempfile.mkdtemp(prefix="av-G-", dir="/tmp"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(story.hub.hub, "proxmox", app._proxmox(settings_of(home)))  # nothing listens there
            answer = story.hub.post("/projects", {"name": f"p-{uuid4().hex[:8]}"})
        error_of(answer, 500, "HYPERVISOR_UNAVAILABLE")
        assert int(answer.headers["Retry-After"]) > 0
    finally:
        shutil.rmtree(home, ignore_errors=True)


@says("this-comprehensive-api-enables-full-management-of-the-autovibe-system-while-maintaining")
def _(story: Story) -> None:
    """Security, resource controls, monitoring: the audit log has what was done, the ledger what it cost."""
    _ = story.machine
    entries = checked(story.hub.get("/audit", limit=200))["entries"]
    assert any(entry["object_uuid"] == story.spawned["uuid"] for entry in entries)
    assert KEY not in str(entries)
    ledger = checked(story.hub.get(f"/resources/projects/{story.project}/ledger", machine_uuid=story.machine))
    assert {entry["kind"] for entry in ledger["entries"]} >= {"reserve", "charge"}


@pytest.mark.parametrize("check", [pytest.param(check, id=words) for words, check in CHECKS.items()])
def test_the_reference_says(story: Story, check: Check) -> None:
    check(story)


def test_every_sentence_has_its_test() -> None:
    place = find_reference()
    if place is None:
        if os.environ.get("CI") == "true":
            pytest.fail("The reference is not beside the checkout: shared/specs/autovibe-api.md", pytrace=False)
        pytest.skip("The reference is not beside the checkout.")
    assert sorted(sentences(place.read_text(encoding="utf-8"))) == sorted(CHECKS)
