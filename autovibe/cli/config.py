"""autovibe config …, and the few settings that `up` keeps in the home's config.toml."""

from __future__ import annotations

import json as json_text
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from autovibe.cli import connection, output
from autovibe.cli.output import Json

if TYPE_CHECKING:
    from autovibe.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Settings: config.toml in the home < environment < flags.")

MASK = "**********"


@app.command()
def show(json: Json = False) -> None:
    """Show each setting, its value and where it comes from. Secrets are masked."""
    settings = connection.settings()
    rows = described(settings)
    if json:
        return output.print_json({"config_file": settings.home / "config.toml", "settings": rows})
    output.table(
        ("setting", "value", "from", "what it is"),
        (
            (
                row["name"],
                str(row["value"]).lower() if isinstance(row["value"], bool) else row["value"],
                row["source"],
                row["description"],
            )
            for row in rows
        ),
        empty="",
    )
    return None


def described(settings: Settings) -> list[dict[str, Any]]:
    """name, value (JSON, secrets masked), source and description of every setting."""
    from pydantic import SecretStr

    in_file = _read_toml(settings.home / "config.toml")
    rows = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        variable = f"AUTOVIBE_{name.upper()}"
        source = "default"
        if name in connection.flag_names():
            source = "flag"
        elif variable in os.environ or variable in {key.upper() for key in os.environ}:
            source = variable
        elif name in in_file:
            source = "config.toml"
        if isinstance(value, SecretStr):
            value = MASK
        elif isinstance(value, str) and "://" in value:
            value = re.sub(r"(://[^/@:]*:)[^/@]*@", rf"\1{MASK}@", value)  # a password in database_url
        rows.append(
            {
                "name": name,
                "value": str(value) if isinstance(value, Path) else value,
                "source": source,
                "description": field.description or "",
            }
        )
    return rows


def remember(home: Path, **values: str | int | bool) -> None:
    """Set values in the home's config.toml and leave every other line of it as it is."""
    path = home / "config.toml"
    present = _read_toml(path)
    changed = {name: value for name, value in values.items() if present.get(name) != value}
    if not changed:
        return
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for name, value in changed.items():
        line = f"{name} = {json_text.dumps(value)}"
        places = [index for index, old in enumerate(lines) if re.match(rf"\s*{name}\s*=", old)]
        if places:
            lines[places[0]] = line
        else:
            lines.insert(0, line)  # before any [table]
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name("config.toml.new")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o600)  # it may hold a token
    temporary.replace(path)


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, tomllib.TOMLDecodeError):
        return {}
