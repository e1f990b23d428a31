"""A recipe says what an image holds: packages, files and the steps run in it. Its hash names what is built of it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from autovibe.assets import asset
from autovibe.errors import ConfigurationError, NotFound

BUILDER_VERSION = 1
"""Part of every digest: raise it when the builder itself makes other images of the same recipe."""

_UNITS = {"M": 2**20, "G": 2**30}

AbsolutePath = Annotated[str, StringConstraints(pattern=r"^/[^\x00\n]*$")]
Mode = Annotated[str, StringConstraints(pattern=r"^[0-7]{3,4}$")]
PackageName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9+.-]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RecipeFile(_Part):
    """A file put into the image before its packages are configured; owned by root."""

    path: AbsolutePath
    content: str
    mode: Mode = "0644"

    @field_validator("path")
    @classmethod
    def _is_normal(cls, value: str) -> str:
        if ".." in value.split("/"):
            raise ValueError("the path must not contain '..'")
        return value


class RecipeStep(_Part):
    """A command (`argv`) or a POSIX shell `script`, run as root in the image when its packages are installed."""

    argv: tuple[str, ...] = ()
    script: str = ""

    @model_validator(mode="after")
    def _is_one(self) -> RecipeStep:
        if bool(self.argv) == bool(self.script):
            raise ValueError("a step has either 'argv' or 'script'")
        return self


class Recipe(_Part):
    """What an image is made of. Sizes are in MiB or GiB (`64M`, `10G`); `size` is that of the whole disk."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")]
    description: str = ""
    suite: Annotated[str, StringConstraints(pattern=r"^[a-z]+$")]
    architecture: Literal["amd64"] = "amd64"
    size: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]*[MG]$")] = "10G"
    boot_size: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]*[MG]$")] = "128M"
    user: Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")] = "agent"
    kernel_arguments: tuple[str, ...] = ()
    packages: tuple[PackageName, ...] = Field(min_length=1)
    files: tuple[RecipeFile, ...] = ()
    steps: tuple[RecipeStep, ...] = ()

    @field_validator("kernel_arguments")
    @classmethod
    def _are_words(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(re.search(r"\s", word) for word in value):
            raise ValueError("each kernel argument is one word")
        return value

    @property
    def size_bytes(self) -> int:
        return _bytes(self.size)

    @property
    def boot_size_bytes(self) -> int:
        return _bytes(self.boot_size)


def _bytes(size: str) -> int:
    return int(size[:-1]) * _UNITS[size[-1]]


def read(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises ConfigurationError naming the file and each wrong field."""
    try:
        fields: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Recipe.model_validate(fields)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors())
        raise ConfigurationError(f"The image recipe '{path}' is wrong: {faults}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigurationError(f"The image recipe '{path}' cannot be read: {error}.") from error


def recipes(directory: Path | None = None) -> list[Recipe]:
    """Every recipe that travels with autovibe (or lies in `directory`), sorted by name."""
    found = [read(path) for path in (directory or asset("images")).glob("*.yaml")]
    return sorted(found, key=lambda each: each.name)


def recipe(name: str, directory: Path | None = None) -> Recipe:
    """The recipe of that name. Raises NotFound naming the recipes there are."""
    found = {each.name: each for each in recipes(directory)}
    if name not in found:
        raise NotFound(
            f"There is no image recipe '{name[:63]}'; the recipes are: {', '.join(sorted(found)) or 'none'}."
        )
    return found[name]


def digest(of: Recipe) -> str:
    """Twelve hex digits that change with anything in the recipe and with the builder's version."""
    text = json.dumps({"builder": BUILDER_VERSION, "recipe": of.model_dump(mode="json")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
