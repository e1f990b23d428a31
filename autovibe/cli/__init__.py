"""The command line: the SDK as words, and the two programs. `main` is the entry point, `app` all of its words."""

from __future__ import annotations

from typing import Any


def main() -> None:
    from autovibe.cli.words import app

    app(prog_name="autovibe")


def __getattr__(name: str) -> Any:
    if name == "app":
        from autovibe.cli.words import app

        return app
    raise AttributeError(f"module 'autovibe.cli' has no attribute '{name}'")
