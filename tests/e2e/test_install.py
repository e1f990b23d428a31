"""What a newcomer does: install the wheel into an empty environment and bring it up there; run the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.e2e.conftest import Autovibe, free_ports

pytestmark = pytest.mark.guest
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(target.glob("*.whl"))


def test_the_wheel_holds_what_the_programs_need(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for directory in ("playbooks", "images", "inventories"):
        here = [path for path in (ROOT / directory).rglob("*") if path.is_file()]
        assert here
        for path in here:
            assert f"autovibe/assets/{path.relative_to(ROOT)}" in names
    assert not [name for name in names if name.startswith("tests/")]


def _lock_without_hashes(target: Path) -> Path:
    """Versions alone: pip's hash mode would want a hash for the wheel that was just built."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    target.write_text("\n".join(line.rstrip(" \\") for line in lines if line and not line.startswith((" ", "#"))))
    return target


def _install(wheel: Path, extras: str, environment: Path, tmp_path: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [str(environment / "bin/pip"), "install", "-q", "--disable-pip-version-check"]
    constraint = _lock_without_hashes(tmp_path / "constraints.txt")
    subprocess.run([*pip, "-c", str(constraint), f"{wheel}{extras}"], check=True, capture_output=True)
    return environment / "bin"


def test_a_bare_install_is_the_sdk_and_the_cli(wheel: Path, tmp_path: Path) -> None:
    binaries = _install(wheel, "", tmp_path / "bare", tmp_path)
    result = subprocess.run(
        [binaries / "autovibe", "--help"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 0
    assert "checkpoint" in result.stdout
    script = "import autovibe, sys; autovibe.Client; assert not {'fastapi', 'sqlmodel', 'paramiko'} & set(sys.modules)"
    subprocess.run([binaries / "python", "-c", script], check=True, cwd=tmp_path)
    refused = subprocess.run(
        [binaries / "autovibe", "serve", "hub"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "AUTOVIBE_HOME": str(tmp_path / "home")},
    )
    assert refused.returncode not in (0, 1)
    assert "autovibe[hub" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_wheel_runs_up(wheel: Path, tmp_path: Path, guest_image: Path) -> None:
    binaries = _install(wheel, "[hub,node]", tmp_path / "full", tmp_path)
    home = tmp_path / "home"
    (home / "images").mkdir(parents=True)
    for file in guest_image.glob("*.qcow2"):
        (home / "images" / file.name).symlink_to(file)
    hub_port, node_port = free_ports()
    environment = Autovibe(home, hub_port, node_port).environment | {"PYTHONPATH": ""}
    command = [str(binaries / "autovibe")]

    def run(*words: str) -> str:
        result = subprocess.run(
            [*command, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    try:
        run("up", "--detach", "--port", str(hub_port), "--node-port", str(node_port))
        status = json.loads(run("status", "--json"))
        assert status["hub"]["health"] == "healthy"
        assert status["node"]["health"] == "healthy"
        assert json.loads(run("project", "create", "first", "--json"))["initial_checkpoint_uuid"]
    finally:
        run("down", "--machines")


def test_the_demo_ends_with_status_0_and_leaves_nothing_running(tmp_path: Path, guest_image: Path) -> None:
    home = tmp_path / "home"
    (home / "images").mkdir(parents=True)
    for file in guest_image.glob("*.qcow2"):
        (home / "images" / file.name).symlink_to(file)
    hub_port, node_port = free_ports()
    demo = Autovibe(home, hub_port, node_port)
    result = demo.run("demo", timeout=580)
    assert "checkpoint diff" in result.stdout
    left = subprocess.run(["pgrep", "-af", str(home)], capture_output=True, text=True, check=False).stdout
    assert not left, left
