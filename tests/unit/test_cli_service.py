"""autovibe service: the units' text, what systemd itself says of it, and that other people's files stay."""

from __future__ import annotations

import configparser
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autovibe.cli import app, systemd
from autovibe.settings import load

PROXMOX = {"proxmox_url": "https://10.0.0.1:8006", "proxmox_fingerprint": "AA"}


def parsed(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


def run(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, list(words))
    return found.exit_code, found.stdout


@pytest.mark.parametrize("is_system", [True, False])
def test_the_units(tmp_path: Path, is_system: bool) -> None:
    home = tmp_path / 'a "home" of 100 % $me'
    texts = systemd.units(load(home=home, api_key="k" * 20), is_system=is_system, run_as="someone")
    assert list(texts) == ["autovibe-node.service", "autovibe-hub.service"]
    assert "k" * 20 not in "".join(texts.values())
    node, hub = (parsed(text) for text in texts.values())
    for unit in (node, hub):
        assert unit["Service"]["Restart"] == "on-failure"
        assert unit["Service"]["NoNewPrivileges"] == "yes"
        assert unit["Service"]["EnvironmentFile"] == "-" + str(home / "environment").replace("%", "%%")
        assert str(home).replace('"', '\\"').replace("%", "%%").replace("$", "$$") in unit["Service"]["ExecStart"]
        assert unit["Service"].get("User") == ("someone" if is_system else None)
        assert unit["Service"].get("ProtectSystem") == ("full" if is_system else None)
        assert unit["Install"]["WantedBy"] == ("multi-user.target" if is_system else "default.target")
    assert hub["Service"]["KillMode"] == "mixed"
    assert node["Service"]["KillMode"] == "process"  # machines outlive their node
    assert "autovibe-node.service" in hub["Unit"]["After"]
    assert ("network-online.target" in hub["Unit"]["After"]) is is_system


def test_a_real_proxmox_needs_no_node(tmp_path: Path) -> None:
    texts = systemd.units(load(home=tmp_path, **PROXMOX), is_system=True, run_as="someone")
    assert list(texts) == ["autovibe-hub.service"]
    assert "autovibe-node" not in texts["autovibe-hub.service"]


@pytest.mark.parametrize("scope", ["--system", "--user"])
def test_systemd_takes_them(tmp_path: Path, scope: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed; the text is tested above")
    status, _ = run("service", "install", scope, "--home", str(tmp_path / "a home"), "--directory", str(tmp_path))
    assert status == 0
    argv = ["systemd-analyze", "verify", *map(str, sorted(tmp_path.glob("*.service")))]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    said = "\n".join(line for line in ended.stderr.splitlines() if "autovibe" in line)
    assert (ended.returncode, said) == (0, "")


def test_install_and_uninstall(tmp_path: Path) -> None:
    home, place = str(tmp_path / "home"), tmp_path / "units"
    status, said = run("service", "install", "--home", home, "--directory", str(place), "--json")
    assert status == 0
    assert json.loads(said)["is_started"] is False
    assert run("service", "install", "--home", home, "--directory", str(place))[0] == 0  # again
    assert sorted(path.name for path in place.iterdir()) == ["autovibe-hub.service", "autovibe-node.service"]
    assert run("service", "install", "--home", home, "--print")[1].count("[Service]") == 2
    status, said = run("service", "uninstall", "--directory", str(place), "--json")
    assert (status, len(json.loads(said)["removed"]), list(place.iterdir())) == (0, 2, [])


def test_what_others_wrote_stays(tmp_path: Path) -> None:
    (tmp_path / "autovibe-hub.service").write_text("[Service]\n")
    status, _ = run("service", "install", "--home", str(tmp_path / "home"), "--directory", str(tmp_path))
    assert status == 4
    assert run("service", "uninstall", "--directory", str(tmp_path))[0] == 0
    assert (tmp_path / "autovibe-hub.service").read_text() == "[Service]\n"
