"""The program that holds a guest still, on a made-up tree of cgroups."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import autovibe.guest

PROGRAM = Path(autovibe.guest.__file__).parent / "programs" / "hold.py"


def test_a_release_thaws_an_agent_that_was_frozen_by_the_one_word_alone(tmp_path: Path) -> None:
    freezer = tmp_path / "cgroups" / "autovibe.slice" / "cgroup.freeze"
    freezer.parent.mkdir(parents=True)
    freezer.write_text("1")
    code = PROGRAM.read_text().replace("/var/lib/autovibe/hold", str(tmp_path / "hold"))
    order = json.dumps({"do": "release", "token": "of the block", "cgroups": str(tmp_path / "cgroups")})
    done = subprocess.run([sys.executable, "-c", code], input=order, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["held"] is False
    assert freezer.read_text() == "0"
