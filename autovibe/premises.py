"""What the settings come to for the Hub as a whole: what a checkpoint of it copies, how a second one is started, and
putting a checkpoint back, for which no Hub runs.
"""

from __future__ import annotations

import os
import site
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import SecretStr, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python
from sqlalchemy import make_url

from autovibe.durable import place_of
from autovibe.errors import InvalidRequest
from autovibe.hub import recovery
from autovibe.hub.launch import Launch
from autovibe.settings import Settings
from autovibe.store import Store
from autovibe.workflows.world import Premises


def premises_of(settings: Settings) -> Premises:
    shown = {name: getattr(settings, name) for name in type(settings).model_fields}
    masked = {name: "**********" for name, value in shown.items() if isinstance(value, SecretStr)}
    url = make_url(settings.hub_database_url).render_as_string(hide_password=True)
    return Premises(
        home=settings.home,
        journal=None if settings.database_url else settings.hub_home / "durable.db",
        settings=to_jsonable_python({**shown, **masked, "database_url": url}),
        vmid=settings.hub_vmid,
        min_free_bytes=int(settings.min_free_gb * 1e9),
    )


def launch_of(settings: Settings) -> Launch:
    """How an experimental Hub is started: as this one, without what the environment told this one."""
    values = settings.model_dump(mode="json", include=settings.model_fields_set - _NOT_SHARED)
    pool = {name: getattr(settings, name) for name in type(settings).model_fields if name.startswith("pool_daily_")}
    values |= {"node_host": settings.node_host, "node_port": settings.node_port, "proxmox_node": settings.proxmox_node}
    token = settings.read_proxmox_token()
    top = str(Path(__file__).resolve().parents[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUTOVIBE_")}
    if top not in site.getsitepackages():  # a checkout
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (top, os.environ.get("PYTHONPATH"))))
    return Launch(
        argv=(sys.executable, "-P", "-m", "autovibe.cli", "serve", "hub"),
        environment=environment,
        settings=values,
        pool=pool,
        secrets={"proxmox-token": token} if token is not None and not settings.uses_embedded_node else {},
        check=_check_values,
    )


def _check_values(changes: Mapping[str, Any]) -> None:
    """Raises InvalidRequest naming the setting that cannot have its value."""
    for name, value in changes.items():
        field = Settings.model_fields[name]
        kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            fault = error.errors()[0]["msg"]
            message = f"The setting '{name}' cannot be '{str(value)[:100]}': {fault}."
            raise InvalidRequest(message, details={"field": f"configuration.settings.{name}"}) from error


_NOT_SHARED = frozenset(
    {
        "home",
        "url",
        "api_key",
        "hub_host",
        "hub_port",
        "behind_proxy",
        "tls_certificate",
        "tls_key",
        "database_url",
        "proxmox_token",
        "proxmox_token_file",
        "vmid_first",
        "vmid_last",
        "ssh_key_file",
        "pool_daily_money",
        "pool_daily_time_hours",
        "pool_daily_api_calls",
        "hub_checkpoint_daily",
        "hub_vmid",
        "hub_url_for_guests",
    }
)
"""Settings that say where a Hub is and what is its own."""


def find_checkpoint(settings: Settings, word: str) -> Path:
    """The directory of the checkpoint of the Hub that `word` names. Raises NotFound, InvalidRequest."""
    return recovery.find(premises_of(settings), word)


def restore(
    settings: Settings, bundle: Path, tell: Callable[[str, float | None], None], *, is_saved: bool
) -> Path | None:
    """Put a checkpoint of the Hub into the home and database of these settings, whose Hub must be stopped.

    Returns the recovery checkpoint of what was there before, if `is_saved` and if anything was. Raises Conflict while
    the Hub runs, OperationFailed for a checkpoint that was changed, ConfigurationError for one that does not fit.
    """
    premises, store = premises_of(settings), Store(settings.hub_database_url)
    try:
        recovery.require_stopped(premises, store)
        tell("verifying", None)
        manifest = recovery.verify(bundle, store)
        tell("saving what is there", None)
        saved = recovery.save_present(premises, store, f"Before '{bundle.name}' was restored.") if is_saved else None
        tell("putting it back", None)
        recovery.put_back(bundle, manifest, premises, store, place_of(settings.hub_home, socket.gethostname()))
    finally:
        store.close()
    return saved
