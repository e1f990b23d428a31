"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from autovibe import errors, schemas
from autovibe.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "autovibe"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_import_contracts_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_every_error_code_has_an_http_status_and_an_exit_status() -> None:
    from autovibe.api.errors import HTTP_STATUS
    from autovibe.cli.output import EXIT_STATUS

    codes = set(errors.CLASSES)
    assert codes == set(HTTP_STATUS)
    assert codes == set(EXIT_STATUS)


def test_error_messages_are_sentences() -> None:
    for kind in errors.CLASSES.values():
        message = kind().message
        assert message[0].isupper(), kind
        assert message.endswith((".", ").", "'.")) or message[-1] in ".)", kind


def test_http_exceptions_stay_in_one_module() -> None:
    found = [path for path in SOURCES if "HTTPException" in path.read_text(encoding="utf-8")]
    assert [str(path.relative_to(PACKAGE)) for path in found] in ([], ["api/errors.py"])


def test_nobody_commits_but_the_store() -> None:
    for path in SOURCES:
        if path.is_relative_to(PACKAGE / "store"):
            continue
        for call in (node for node in ast.walk(_tree(path)) if isinstance(node, ast.Call)):
            assert not (isinstance(call.func, ast.Attribute) and call.func.attr == "commit" and not call.args), (
                f"{path}:{call.lineno}"
            )


def test_broad_excepts_only_where_they_belong() -> None:
    """Allowed: durable, upkeep, app, and the node's task runner and request loop, whose work is not to die; and what
    carries an error over to the thread that asked for the work.
    """
    allowed = {
        "durable/__init__.py",
        "workflows/engine.py",
        "hub/upkeep.py",
        "app.py",
        "store/groups.py",
        "node/tasks/__init__.py",
        "node/http/server.py",
        "node/http/api.py",
        "node/recovery.py",
        "api/requests.py",
    }
    for path in SOURCES:
        if str(path.relative_to(PACKAGE)) in allowed:
            continue
        for handler in (node for node in ast.walk(_tree(path)) if isinstance(node, ast.ExceptHandler)):
            if isinstance(handler.body[-1], ast.Raise):
                continue  # it cleans up and lets the error go on
            names = (
                {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else {"all"}
            )
            assert not names & {"Exception", "BaseException", "all"}, f"{path}:{handler.lineno}"


def test_no_excuse_names() -> None:
    banned = {"utils", "util", "helpers", "helper", "common", "core", "base", "manager", "service", "services", "misc"}
    assert not [path for path in SOURCES if path.stem in banned]
    for path in SOURCES:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.ClassDef):
                assert not re.search(r"(Manager|Service|Handler|Helper|Util|Impl)$", node.name) or node.bases, (
                    f"{path}:{node.lineno} {node.name}"
                )


def test_no_shell_and_no_blind_trust() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for banned in ("shell=True", "AutoAddPolicy", "verify=False", "verify_ssl=False"):
            assert banned not in text, f"{path}: {banned}"


def test_modules_open_with_a_docstring() -> None:
    missing = [path for path in SOURCES if path.stat().st_size and not ast.get_docstring(_tree(path))]
    assert not missing


def test_modules_stay_readable() -> None:
    """Above 500 lines a module wants a reason; there is none so far (schemas may reach 600: DESIGN)."""
    long = {
        str(path.relative_to(PACKAGE)): count
        for path in SOURCES
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > (600 if path.name == "schemas.py" else 500)
    }
    assert not long


def test_every_setting_is_documented() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in Settings.model_fields if f"`{name}`" not in readme]
    assert not missing
    assert all(field.description for field in Settings.model_fields.values())


def _v1_routes() -> set[tuple[str, str]]:
    from autovibe.api.v1 import router

    found = set()
    for route in router.routes:
        for method in getattr(route, "methods", ()) or ():
            if method not in ("HEAD", "OPTIONS"):
                found.add((method, re.sub(r"\{(\w+)(:\w+)?\}", "{}", getattr(route, "path", ""))))
    return found


def test_every_v1_route_has_an_sdk_verb_and_a_cli_word() -> None:
    from autovibe.sdk import ROUTES

    routes = {(method, path.removeprefix("/api/v1")) for method, path in _v1_routes()}
    assert routes == set(ROUTES)
    from typer.main import get_command

    from autovibe import Client
    from autovibe.cli import app

    root = get_command(app)
    for (method, path), (verb, words) in ROUTES.items():
        target: object = Client
        for name in verb.split("."):
            hints = inspect.get_annotations(target, eval_str=True) if inspect.isclass(target) else {}
            target = getattr(target, name, None) or hints.get(name)
            assert target is not None, f"{method} {path}: the SDK has no '{verb}'"
        command = root
        for word in words.split():
            command = command.commands[word]  # type: ignore[attr-defined]


def test_nothing_foreign_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.fail("git lists no files: this test runs on a checkout")
    binary = [name for name in listed if name.endswith((".qcow2", ".img", ".iso", ".png", ".whl", ".so", "uv.lock"))]
    assert not binary
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in lock


@pytest.mark.parametrize("shape", [shape for shape in vars(schemas).values() if inspect.isclass(shape)])
def test_requests_refuse_unknown_fields(shape: type) -> None:
    if issubclass(shape, schemas.Request):
        assert shape.model_config.get("extra") == "forbid"
