"""Which home and which Hub the words of this call are about: flags over environment over config.toml."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autovibe.sdk import Client
    from autovibe.settings import Settings

_flags: dict[str, Any] = {}


def given(**flags: Any) -> None:
    """Remember the flags that stood before the noun."""
    _flags.clear()
    _flags.update({name: value for name, value in flags.items() if value is not None})


def flag_names() -> set[str]:
    return set(_flags)


def settings(**flags: Any) -> Settings:
    """The settings of this call; flags of the word itself win over those before the noun."""
    from autovibe.settings import load

    merged = {**_flags, **{name: value for name, value in flags.items() if value is not None}}
    if "home" in merged:
        merged["home"] = Path(merged["home"]).expanduser().absolute()
    return load(**merged)


def own_settings(**flags: Any) -> Settings:
    """The settings of this computer's own Hub, whatever Hub the environment's `AUTOVIBE_URL` names."""
    return settings(**flags).model_copy(update={"url": ""})


def is_own(chosen: Settings) -> bool:
    """Whether these settings speak of this computer's own Hub."""
    return chosen.hub_url == chosen.model_copy(update={"url": ""}).hub_url


def client(chosen: Settings | None = None, *, timeout_seconds: float = 30) -> Client:
    """The Hub of `chosen`, or of this call's settings."""
    from autovibe.sdk import Client

    chosen = chosen or settings()
    key = chosen.read_api_key()
    return Client(
        chosen.hub_url,
        key or "",  # "" and not None: the key of another home is not looked for
        timeout_seconds=timeout_seconds,
        ca_file=chosen.tls_certificate,
    )
