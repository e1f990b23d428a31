"""The sentences of the API's reference, which lies beside the checkout, and a Hub with a story to ask them of."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2

from tests.api.conftest import Served

REFERENCE = Path("specs/autovibe-api.md")
_WORDS = 12
Json = dict[str, Any]


def find_reference() -> Path | None:
    """`../shared/specs/autovibe-api.md`, looked for beside every directory above this one."""
    places = (parent / "shared" / REFERENCE for parent in Path(__file__).resolve().parents)
    return next((place for place in places if place.exists()), None)


def sentences(text: str) -> list[str]:
    """The slug of each sentence and each line of a list, headings left out."""
    found = []
    for line in text.splitlines():
        stripped = line.strip().removeprefix("- ").replace("**", "")
        if stripped and not stripped.startswith("#"):
            found += [slug(sentence) for sentence in re.split(r"(?<=\.)\s+(?=[A-Z])", stripped)]
    return found


def slug(sentence: str) -> str:
    """The first words of a sentence."""
    return "-".join(re.findall(r"[A-Za-z0-9_]+", sentence)[:_WORDS]).lower()


def checked(answer: httpx2.Response, status: int = 200) -> Json:
    assert answer.status_code == status, f"{answer.request.method} {answer.request.url}: {answer.text}"
    found = answer.json()
    assert isinstance(found, dict)
    return found


class Story:
    """What happened on a Hub whose node answers; each part happens when it is first asked for."""

    def __init__(self, hub: Served, patch: Callable[[object, str, object], None]) -> None:
        self.hub, self.patch = hub, patch

    @cached_property
    def order(self) -> Json:
        return {
            "name": f"p-{uuid4().hex[:8]}",
            "greediness": 0.4,
            "description": "What the reference tells of.",
            "resource_budgets": {
                "daily_money": 20,
                "daily_time_hours": 12,
                "daily_api_calls": 500,
                "storage_gb": 50,
                "max_concurrent_machines": 9,
            },
        }

    @cached_property
    def project_made(self) -> Json:
        return checked(self.hub.post("/projects", self.order), 201)

    @property
    def project(self) -> str:
        return str(self.project_made["uuid"])

    @cached_property
    def machine_order(self) -> Json:
        return {
            "type": "claude_code",
            "project_uuid": self.project,
            "checkpoint_uuid": self.project_made["initial_checkpoint_uuid"],
            "prompt": "cat given.txt; echo done",
            "file_modifications": {"/workspace/given.txt": "placed\n"},
            "resource_constraints": {"max_money": 2, "max_time_minutes": 90, "max_api_calls": 40},
        }

    @cached_property
    def spawned(self) -> Json:
        """The answer of the POST, at once."""
        return checked(self.hub.post("/machines", self.machine_order), 201)

    @cached_property
    def machine(self) -> str:
        """It has run its prompt and reported what it used."""
        uuid = str(self.spawned["uuid"])
        ended = checked(self.hub.get(f"/machines/{uuid}", wait_for="finished", wait=120))
        assert (ended["status"], ended["exit_status"]) == ("active", 0), ended
        checked(self.hub.post(f"/machines/{uuid}/usage", {"api_calls": 7, "money": 0.25}))
        return uuid

    @cached_property
    def checkpoint(self) -> Json:
        """A manual one of the machine."""
        order = {"context": "TICKET-1", "description": "Before the change."}
        self.run(self.machine, "echo one > a; mkdir -p src; echo x > src/gone")
        return checked(self.hub.post(f"/machines/{self.machine}/checkpoint", order, wait=120), 201)

    @cached_property
    def second_checkpoint(self) -> Json:
        assert self.checkpoint["status"] == "ready", self.checkpoint
        self.run(self.machine, "echo two > a; rm src/gone; echo y > src/new")
        return checked(self.hub.post(f"/machines/{self.machine}/checkpoint", {}, wait=120), 201)

    @cached_property
    def branch_order(self) -> Json:
        return {"type": "shell", "prompt": "cat a", "file_modifications": {"/workspace/b": "b\n"}}

    @cached_property
    def branch(self) -> Json:
        """Spawned from the first checkpoint; it has run its prompt."""
        made = self.hub.post(
            f"/checkpoints/{self.checkpoint['uuid']}/spawn", self.branch_order, wait=120, wait_for="finished"
        )
        return checked(made, 201)

    @cached_property
    def terminated(self) -> Json:
        """The branch's end, with a final checkpoint."""
        order = {"reason": "It has done its work.", "create_checkpoint": True}
        return checked(self.hub.post(f"/machines/{self.branch['uuid']}/terminate", order, wait=120))

    @cached_property
    def hub_checkpoint(self) -> Json:
        order = {"type": "pre_experiment", "reason": "An experiment", "description": "The state of today."}
        return checked(self.hub.post("/hub/checkpoint", order), 201)

    @cached_property
    def experiment_order(self) -> Json:
        ready = checked(self.hub.get(f"/hub/checkpoints/{self.hub_checkpoint['uuid']}", wait=120))
        assert ready["status"] == "ready", ready
        return {
            "checkpoint_uuid": ready["uuid"],
            "name": "greedy",
            "configuration": {"algorithm": "greedy", "optimization": {"rate": 0.5}, "settings": {"workers": 2}},
            "duration_days": 3,
        }

    @cached_property
    def experiment(self) -> Json:
        return checked(self.hub.post("/hub/spawn-experimental", self.experiment_order), 201)

    def run(self, machine: str, script: str) -> None:
        ran = checked(self.hub.post(f"/machines/{machine}/exec", {"script": script}))
        assert ran["exit_status"] == 0, ran

    def close(self) -> None:
        """End what is still there: machines, the experiment's Hub."""
        for item in checked(self.hub.get("/hub/experiments"))["experiments"]:
            self.hub.post(f"/hub/experiments/{item['uuid']}/stop")
        for item in checked(self.hub.get("/machines", limit=200))["machines"]:
            if item["status"] not in ("terminated", "failed"):
                self.hub.post(f"/machines/{item['uuid']}/terminate", wait=60)


def is_uuid(value: object) -> bool:
    return isinstance(value, str) and str(UUID(value)) == value
