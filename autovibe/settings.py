"""One frozen Settings, read once: `config.toml` in the home < environment (`AUTOVIBE_…`) < flags.

Nothing below `app`, `node`, `sdk` and `cli` reads settings; those levels are given plain values.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from autovibe.errors import ConfigurationError


def default_home() -> Path:
    """`$AUTOVIBE_HOME`, else `$XDG_DATA_HOME/autovibe`, else `~/.local/share/autovibe`."""
    if home := os.environ.get("AUTOVIBE_HOME"):
        return Path(home).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser().absolute() / "autovibe"


class Settings(BaseSettings):
    """Every setting, with its default. `autovibe config show` prints them with where each comes from."""

    model_config = SettingsConfigDict(env_prefix="AUTOVIBE_", frozen=True, extra="forbid")

    home: Path = Field(default_factory=default_home, description="Where everything autovibe keeps lies.")

    url: str = Field(default="", description="The Hub the CLI and SDK talk to; empty: http://<hub_host>:<hub_port>.")
    api_key: SecretStr | None = Field(default=None, description="The key to send; empty: <home>/credentials.")

    hub_host: str = Field(default="127.0.0.1", description="The address the Hub binds to.")
    hub_port: int = Field(default=8080, ge=1, le=65535, description="The port of the Hub.")
    behind_proxy: bool = Field(default=False, description="A proxy in front of the Hub ends TLS; allows other binds.")
    tls_certificate: Path | None = Field(default=None, description="PEM file; the Hub then serves HTTPS itself.")
    tls_key: Path | None = Field(default=None, description="PEM file of the certificate's key.")
    database_url: str = Field(
        default="", description="postgresql://… for several hubs; empty: SQLite in <home>/hub/autovibe.db."
    )
    workers: int = Field(default=16, ge=1, le=32, description="Workflows one hub process carries out at a time.")

    proxmox_url: str = Field(default="", description="https://host:8006; empty: the embedded node.")
    proxmox_token: SecretStr | None = Field(default=None, description="user@realm!id=uuid of an API token.")
    proxmox_token_file: Path | None = Field(default=None, description="A 0600 file that holds the token.")
    proxmox_fingerprint: str = Field(default="", description="SHA-256 of the API's certificate, AA:BB:…; pinned.")
    proxmox_ca_file: Path | None = Field(default=None, description="A CA to verify the API with, instead of a pin.")
    proxmox_node: str = Field(default="autovibe", description="The node machines are made on.")
    proxmox_storage: str = Field(default="local-lvm", description="The storage of machines' disks.")
    proxmox_import_storage: str = Field(default="local", description="The storage images are uploaded to.")
    proxmox_bridge: str = Field(default="vmbr0", description="The bridge of machines' first network card.")
    proxmox_pool: str = Field(default="", description="The pool machines are put into; empty: none.")
    vmid_first: int = Field(default=9000, ge=100, le=999_999_999, description="The first vmid the Hub may take.")
    vmid_last: int = Field(default=9999, ge=100, le=999_999_999, description="The last vmid the Hub may take.")
    ssh_via: Literal["forward", "address"] = Field(
        default="forward",
        description="How guests are reached: the embedded node's forwards, or the guest's own address.",
    )
    ssh_key_file: Path | None = Field(default=None, description="The Hub's SSH key; empty: <home>/hub/ssh/id_ed25519.")

    node_host: str = Field(default="127.0.0.1", description="The address the embedded node binds to (loopback).")
    node_port: int = Field(default=8006, ge=1, le=65535, description="The port of the embedded node.")
    node_accel: Literal["auto", "kvm", "tcg"] = Field(default="auto", description="auto: KVM if a probe boots.")

    image: str = Field(default="debian-12", description="The guest image projects begin with (images/<name>.yaml).")
    guest_user: str = Field(default="agent", description="The user the prompt and exec run as in the guest.")
    guest_cores: int | None = Field(
        default=None, ge=1, le=512, description="Cores of a machine; empty: 2, or what the host has."
    )
    guest_memory_mb: int | None = Field(default=None, ge=256, description="Memory; empty: 1024, 512 on TCG.")
    boot_deadline_seconds: float = Field(default=300, gt=0, description="How long a guest may take to answer on SSH.")
    provision_deadline_seconds: float = Field(default=1800, gt=0, description="How long a playbook may take.")
    ca_bundle: Path | None = Field(default=None, description="A CA bundle handed to image builds and guests.")
    apt_sources: Path | None = Field(default=None, description="A deb822 sources file handed to image builds.")
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$", description="Of all money; nothing is ever converted.")
    pool_daily_money: float | None = Field(default=None, ge=0, description="Money all projects share a day.")
    pool_daily_time_hours: float | None = Field(default=None, ge=0, description="Machine hours they share a day.")
    pool_daily_api_calls: int | None = Field(default=None, ge=0, description="Model calls they share a day.")
    price_core_hour: float = Field(default=0.05, ge=0, description="Money for an hour of a core.")
    price_memory_gb_hour: float = Field(default=0.01, ge=0, description="Money for an hour of a GB of memory.")
    price_disk_gb_hour: float = Field(default=0.001, ge=0, description="Money for an hour of a GB of disk.")
    budget_tail_seconds: float = Field(
        default=60, ge=1, le=3600, description="Machine time kept back for freezing and checkpointing at a limit."
    )
    hub_checkpoint_daily: bool = Field(default=True, description="Checkpoint the Hub itself once a UTC day.")
    hub_checkpoints_kept: int = Field(default=7, ge=1, le=1000, description="Daily checkpoints of the Hub that stay.")
    hub_vmid: int | None = Field(
        default=None, ge=100, le=999_999_999, description="The VM of this Proxmox the Hub itself runs in, if it does."
    )
    rate_limit_per_minute: int = Field(
        default=100,
        ge=0,
        le=10**9,
        description="Requests a key may send a minute, to all hub processes together; 0: any number.",
    )
    rate_limit_heavy_per_minute: int = Field(
        default=10, ge=0, le=10**9, description="Of these, spawns and checkpoints; also wrong keys from one address."
    )
    audit_days: int = Field(default=90, ge=1, description="Days the audit log goes back.")
    hub_url_for_guests: str = Field(
        default="", description="The Hub's URL as machines reach it, told with their own key; empty: not told."
    )
    min_free_gb: float = Field(default=2, ge=0, description="Free space below which nothing new is started.")
    metrics_open: bool = Field(
        default=False, description="Serve /metrics without a key, on an address that only this computer reaches."
    )
    log_format: Literal["text", "json"] = Field(default="text", description="Of the Hub's log; json: an object a line.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Of hub and node.")

    @field_validator("home", mode="after")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @model_validator(mode="after")
    def _is_consistent(self) -> Settings:
        if self.vmid_last < self.vmid_first:
            raise ValueError("vmid_last is below vmid_first.")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together.")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        flags = init_settings()
        home = Path(flags.get("home") or default_home()).expanduser()
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=home / "config.toml")

    # Places in the home

    @property
    def hub_home(self) -> Path:
        return self.home / "hub"

    @property
    def node_home(self) -> Path:
        return self.home / "node"

    @property
    def credentials(self) -> Path:
        return self.home / "credentials"

    @property
    def images_home(self) -> Path:
        return self.home / "images"

    @property
    def hub_url(self) -> str:
        scheme = "https" if self.tls_certificate else "http"
        return (self.url or f"{scheme}://{_in_url(self.hub_host)}:{self.hub_port}").rstrip("/")

    @property
    def uses_embedded_node(self) -> bool:
        return not self.proxmox_url

    @property
    def hypervisor_url(self) -> str:
        return self.proxmox_url or f"https://{_in_url(self.node_host)}:{self.node_port}"

    @property
    def hub_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.hub_home / 'autovibe.db'}"

    def read_api_key(self) -> str | None:
        """The key of the environment or config, else the one the first `up` wrote, else None."""
        if self.api_key is not None:
            return self.api_key.get_secret_value()
        return read_secret(self.credentials)

    def read_proxmox_token(self) -> str | None:
        if self.proxmox_token is not None:
            return self.proxmox_token.get_secret_value()
        return read_secret(self.proxmox_token_file or self.node_home / "token")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host  # an IPv6 address


def read_secret(path: Path) -> str | None:
    """The one line of a secret's file, None where there is none. Raises ConfigurationError when others may read it."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if mode & 0o077:
        raise ConfigurationError(f"'{path}' holds a secret and may be read by others; run: chmod 600 '{path}'.")
    return path.read_text(encoding="utf-8").strip() or None


def write_secret(path: Path, text: str) -> None:
    """Write one line to a new or replaced file of mode 0600; never readable by others, not even for a moment."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(**flags: Any) -> Settings:
    """Read the settings once. Flags that are None count as not given. Raises ConfigurationError naming the setting."""
    _refuse_misspelt_variables()
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise ConfigurationError(f"The settings are wrong: {faults}.") from error
    except ValueError as error:  # config.toml that is no TOML
        raise ConfigurationError(f"'config.toml' cannot be read: {error}.") from error


def _refuse_misspelt_variables() -> None:
    """A misspelt variable would be without effect, and nobody would know; variables of others are let alone."""
    for variable in sorted(os.environ):
        name = variable.removeprefix("AUTOVIBE_").lower()
        if not variable.startswith("AUTOVIBE_") or name in Settings.model_fields:
            continue
        if close := difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=0.8):
            raise ConfigurationError(
                f"The environment variable {variable} is no setting; did you mean AUTOVIBE_{close[0].upper()}?"
            )
