"""Recipes, their hashes, the cache and the errors of a build. The whole build and a boot are in tests/e2e."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import socket
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest

from autovibe import images
from autovibe.errors import ConfigurationError, InsufficientSpace, NotFound, OperationFailed
from autovibe.images import host, tree
from autovibe.images.commands import Log
from autovibe.images.recipe import RecipeFile, read

building = import_module("autovibe.images.build")  # as attributes of the package, `build` and `recipe` are functions
recipe_module = import_module("autovibe.images.recipe")

RECIPE = images.Recipe(name="small", suite="bookworm", packages=("systemd-sysv",))
CERTIFICATE = "-----BEGIN CERTIFICATE-----\nQUJD\n-----END CERTIFICATE-----"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# Recipes


def test_the_recipes_that_travel_with_autovibe_are_valid() -> None:
    found = images.recipe("debian-12")
    assert found in images.recipes()
    assert found.suite == "bookworm"
    assert found.user == "agent"
    assert {"openssh-server", "cloud-init", "qemu-guest-agent", "python3", "git", "sudo"} <= set(found.packages)
    assert found.size_bytes == 10 * 2**30


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(NotFound, match=r"no image recipe 'debian-99'; the recipes are: .*debian-12"):
        images.recipe("debian-99")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: a\nsuite: bookworm\n", "packages: Field required"),
        ("name: a\nsuite: bookworm\npackages: [x y]\n", "packages.0"),
        ("name: a\nsuite: bookworm\npackages: [xy]\nsteps: [{}]\n", "either 'argv' or 'script'"),
        ("name: a\nsuite: bookworm\npackages: [xy]\nsteps: [{argv: [a], script: b}]\n", "either 'argv' or 'script'"),
        ("name: a\nsuite: bookworm\npackages: [xy]\nfiles: [{path: relative, content: a}]\n", "files.0.path"),
        ("name: a\nsuite: bookworm\npackages: [xy]\nfiles: [{path: /a/../b, content: a}]\n", "must not contain '..'"),
        ("name: a\nsuite: bookworm\npackages: [xy]\nsize: 10 potatoes\n", "size"),
        ("name: a\nsuite: bookworm\npackages: [xy]\nkernel_arguments: [a b]\n", "one word"),
        ("name: ../a\nsuite: bookworm\npackages: [xy]\n", "name"),
        ("name: a\nsuite: bookworm\npackages: [xy]\ncolour: blue\n", "colour"),
        ("- a\n", "recipe"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name_and_field(tmp_path: Path, text: str, reason: str) -> None:
    path = write(tmp_path / "wrong.yaml", text)
    with pytest.raises(ConfigurationError) as caught:
        read(path)
    assert "wrong.yaml" in caught.value.message
    assert reason in caught.value.message


def test_the_digest_changes_with_everything_in_the_recipe_and_with_the_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = [
        RECIPE.model_copy(update={"packages": ("systemd-sysv", "git")}),
        RECIPE.model_copy(update={"size": "20G"}),
        RECIPE.model_copy(update={"files": (RecipeFile(path="/etc/a", content="1"),)}),
        RECIPE.model_copy(update={"files": (RecipeFile(path="/etc/a", content="2"),)}),
    ]
    digests = {images.digest(each) for each in [RECIPE, *changed]}
    assert len(digests) == 5
    assert all(len(each) == 12 and int(each, 16) >= 0 for each in digests)
    assert images.digest(RECIPE) == images.digest(RECIPE.model_copy())
    monkeypatch.setattr(recipe_module, "BUILDER_VERSION", -1)
    assert images.digest(RECIPE) not in digests


# The cache


def test_a_built_image_is_found_and_not_built_again(tmp_path: Path) -> None:
    assert images.built(RECIPE, tmp_path) is None
    path = write(images.image_path(RECIPE, tmp_path), "an image")
    assert images.built(RECIPE, tmp_path) == path
    told: list[images.Progress] = []
    assert images.build(RECIPE, tmp_path, progress=told.append) == path
    assert path.read_text() == "an image"
    assert told[-1].fraction == 1.0


def test_a_second_builder_waits_and_takes_the_firsts_image(tmp_path: Path) -> None:
    told: list[images.Progress] = []
    made: list[Path] = []
    with (tmp_path / ".small.lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: made.append(images.build(RECIPE, tmp_path, progress=told.append)))
        second.start()
        deadline = time.monotonic() + 10
        while not told and time.monotonic() < deadline:
            time.sleep(0.02)
        path = write(images.image_path(RECIPE, tmp_path), "the first's")
    second.join(10)
    assert "waiting for another build" in told[0].phase
    assert made == [path]


# Errors


def left_in(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir() if path.suffix not in (".log", ".lock"))


def test_missing_programs_are_named_with_the_line_that_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(building.TOOLS, "no-such-program", "its-package")
    with pytest.raises(ConfigurationError, match=r"apt-get install .*its-package"):
        images.build(RECIPE, tmp_path)


def test_a_missing_keyring_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "KEYRINGS", tmp_path)
    with pytest.raises(ConfigurationError, match="debian-archive-keyring"):
        images.build(RECIPE, tmp_path)


def test_a_full_disk_is_noticed_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "NEEDED_BYTES", 2**60)
    with pytest.raises(InsufficientSpace, match="nothing was started"):
        images.build(RECIPE, tmp_path)
    assert left_in(tmp_path) == []


def test_a_failed_build_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with socket.socket() as unused:  # bound and not listening: refuses connections
        unused.bind(("127.0.0.1", 0))
        mirror = f"http://127.0.0.1:{unused.getsockname()[1]}/debian"
        sources = write(tmp_path / "in/debian.sources", host._stanza(mirror, "bookworm", "main"))
        home = tmp_path / "images"
        home.mkdir()
        prefix = f".autovibe-build-{hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:8]}-small-"
        stale = home / f"{prefix}killed"
        write(stale / "tree/etc/left", "by a killed build")
        with pytest.raises(OperationFailed) as caught:
            images.build(RECIPE, home, apt_sources=sources)
    assert "'mmdebstrap' ended with status" in caught.value.message
    assert str(home / "small.log") in caught.value.message
    assert "127.0.0.1" in caught.value.message
    assert left_in(home) == []


def test_an_interruption_ends_the_program_that_runs(tmp_path: Path) -> None:
    pids: list[int] = []

    def interrupt(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Log(tmp_path / "log").run(["sh", "-c", "sleep 60 & echo $!; wait"], on_line=interrupt)
    assert time.monotonic() - begin < 10
    while _lives(pids[0]):  # the signal is sent; the kernel ends the process a moment later
        assert time.monotonic() - begin < 30
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_progress_follows_what_apt_and_dpkg_say() -> None:
    told: list[images.Progress] = []
    meter = tree._Meter(told.append)
    meter("0 upgraded, 300 newly installed, 0 to remove and 0 not upgraded.\n")
    for number in range(300):
        meter(f"Get:{number} http://mirror.example/debian bookworm/main amd64 p{number} amd64 1 [1 kB]\n")
    for number in range(300):
        meter(f"Unpacking p{number} (1) ...\n")
    meter("a line that says nothing\n")
    for number in range(300):
        meter(f"Setting up p{number} (1) ...\n")
    assert [each.fraction for each in told] == sorted(each.fraction for each in told)
    assert told[0].phase == "installing packages"
    assert told[-1].phase == "installing packages"
    assert told[-1].fraction == pytest.approx(0.8)


# What the host hands over


def test_the_hosts_debian_sources_are_taken_and_nothing_else_of_it(tmp_path: Path) -> None:
    write(
        tmp_path / "etc/apt/sources.list.d/debian.sources",
        "Types: deb deb-src\n# a comment\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n"
        "Components: main contrib\nSigned-By: /somewhere/key.gpg\n\n"
        "Types: deb\nEnabled: no\nURIs: http://off.example/debian\nSuites: bookworm\nComponents: main\n\n"
        "Types: deb\nURIs: file:/media/cdrom\nSuites: bookworm\nComponents: main\n",
    )
    write(tmp_path / "etc/apt/sources.list.d/other.list", "deb https://other.example/apt cloud-bookworm main\n")
    write(
        tmp_path / "etc/apt/sources.list",
        "deb [arch=amd64] http://mirror.example/security bookworm-security main\n"
        "# deb http://no.example bookworm main\n",
    )
    text = images.host_sources("bookworm", tmp_path)
    assert "URIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\nComponents: main\n" in text
    assert "URIs: http://mirror.example/security\nSuites: bookworm-security\n" in text
    assert text.count("URIs:") == 2
    assert "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg" in text


def test_a_host_of_another_suite_leaves_the_mirror_to_mmdebstrap(tmp_path: Path) -> None:
    write(tmp_path / "etc/apt/sources.list", "deb http://mirror.example/ubuntu noble main\n")
    assert images.host_sources("bookworm", tmp_path) == ""


def test_sources_that_are_no_deb822_file_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "sources", "deb http://mirror.example/debian bookworm main\n")
    with pytest.raises(ConfigurationError, match="no deb822 file"):
        host.read_sources(path)


def test_the_bundle_is_the_one_the_environment_names() -> None:
    assert images.host_ca_bundle({}) is None
    assert images.host_ca_bundle({"REQUESTS_CA_BUNDLE": "/a"}) == Path("/a")
    assert images.host_ca_bundle({"SSL_CERT_FILE": "/b", "REQUESTS_CA_BUNDLE": "/a"}) == Path("/b")


def test_only_certificates_of_a_bundle_are_taken(tmp_path: Path) -> None:
    key = "-----BEGIN PRIVATE KEY-----\n" + base64.b64encode(b"secret").decode() + "\n-----END PRIVATE KEY-----"
    path = write(tmp_path / "bundle.pem", f"# a comment\n{CERTIFICATE}\r\n{key}\n{CERTIFICATE}\n")
    assert host.read_ca_bundle(path) == f"{CERTIFICATE}\n{CERTIFICATE}\n"
    with pytest.raises(ConfigurationError, match="holds no PEM certificate"):
        host.read_ca_bundle(write(tmp_path / "empty.pem", key))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        host.read_ca_bundle(tmp_path / "none.pem")
