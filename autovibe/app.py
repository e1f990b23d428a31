"""The composition root: builds the hub's parts from the settings, mounts the doors, owns start and stop.

    serve    pid file, logs, database migrated, parts started, then requests are accepted
    SIGTERM  no more requests, long polls and streams answer, workflows are parked, connections closed: within 10 s

What a stop leaves unfinished goes on at the next start, or in another hub process, where it was.
"""

from __future__ import annotations

import gc
import ipaddress
import json
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from autovibe.api import errors as api_errors
from autovibe.api import metrics, v1
from autovibe.api.guard import Guard
from autovibe.api.log import configure_logs
from autovibe.api.protocol import Protocol
from autovibe.api.requests import BodyLimit, Requests, Traffic
from autovibe.assets import asset
from autovibe.domain.budget import Prices, micros_of
from autovibe.domain.columns import now
from autovibe.durable import Durable
from autovibe.errors import AutovibeError, ConfigurationError
from autovibe.guest import Guests
from autovibe.hub import Hub
from autovibe.hub.access import Keys, ensure_key, ensure_ssh_key
from autovibe.hub.events import Events
from autovibe.hub.health import Watchtower
from autovibe.hub.instance import Gauge, ensure_uuid
from autovibe.hub.limits import Limits
from autovibe.hub.trail import Trail
from autovibe.hub.upkeep import Upkeep
from autovibe.hypervisor import Proxmox
from autovibe.premises import launch_of, premises_of
from autovibe.settings import Settings, read_secret, write_secret
from autovibe.store import Store
from autovibe.store.keys import Keyring, open_keyring
from autovibe.store.ledger import Ledger
from autovibe.store.trees import Trees
from autovibe.types import MICROS, Resource
from autovibe.version import __version__
from autovibe.workflows import Workflows, World

logger = logging.getLogger(__name__)

STOP_SECONDS = 10.0
_STREAMS_SECONDS = 2.0  # what open requests get to answer in
_PARK_SECONDS = 4.0
_CONVERSATIONS = 64
_PROBE_PATIENCE_SECONDS = 10.0
_TOKEN_PATIENCE_SECONDS = 20.0  # `up` starts the node and the hub together


@dataclass
class Parts:
    """A hub process, built and not yet started."""

    settings: Settings
    hub: Hub
    durable: Durable
    upkeep: Upkeep
    app: ASGIApp

    def start(self) -> None:
        with self.hub.store.transaction() as session:
            self.hub.ledger.refit(session)  # the pool's settings may be others now
        self.durable.launch()
        self.hub.name, self.hub.started_at = self.durable.executor_id, now()
        self.hub.events.start()
        self.hub.trail.start()
        self.upkeep.start()

    def close(self) -> bool:
        """Stop everything; False when something would not stop and the process should end without it."""
        self.hub.events.release()
        self.upkeep.close()
        is_parked = self.durable.close(_PARK_SECONDS)
        self.hub.guests.close()
        self.hub.conversations.shutdown(wait=False, cancel_futures=True)
        self.hub.events.close()
        self.hub.trail.close()
        self.hub.store.close()
        return is_parked


def build(settings: Settings) -> Parts:
    """Every part, made of the settings; the database is migrated, nothing runs yet.

    Raises ConfigurationError, DatabaseUnavailable. The Proxmox API need not answer.
    """
    store = Store(settings.hub_database_url)
    store.migrate(settings.hub_home / "backups")
    uuid, premises = ensure_uuid(store), premises_of(settings)
    key_file = settings.ssh_key_file or settings.hub_home / "ssh" / "id_ed25519"
    ensure_ssh_key(store, key_file, socket.gethostname())
    given = settings.api_key.get_secret_value() if settings.api_key is not None else None
    kept = read_secret(settings.credentials)
    keyring = open_keyring(store)
    key = ensure_key(store, keyring, given, kept)
    if kept is None:
        write_secret(settings.credentials, key)
    proxmox, guests, trees = _proxmox(settings), Guests(key_file), Trees(store)
    durable = Durable(
        settings.database_url or f"sqlite:///{settings.hub_home / 'durable.db'}",
        home=settings.hub_home,
        workers=settings.workers,
        host=socket.gethostname(),
    )
    hub = Hub(
        store=store,
        trees=trees,
        events=Events(store),
        keys=Keys(store, keyring),
        keyring=keyring,
        limits=Limits(store, settings.rate_limit_per_minute, settings.rate_limit_heavy_per_minute),
        trail=Trail(store),
        audit_days=settings.audit_days,
        workflows=Workflows(_world(settings, store, trees, proxmox, guests, key_file, keyring), durable),
        proxmox=proxmox,
        guests=guests,
        conversations=ThreadPoolExecutor(_CONVERSATIONS, thread_name_prefix="exec"),
        name="",
        home=settings.home,
        node=settings.proxmox_node,
        storage=settings.proxmox_storage,
        image=settings.image,
        guest_user=settings.guest_user,
        vmids=range(settings.vmid_first, settings.vmid_last + 1),
        min_free_bytes=int(settings.min_free_gb * 1e9),
        ledger=_ledger(settings),
        prices=_prices(settings),
        tail_seconds=settings.budget_tail_seconds,
        uuid=uuid,
        premises=premises,
        is_checkpointed_daily=settings.hub_checkpoint_daily,
        hub_checkpoints_kept=settings.hub_checkpoints_kept,
        launch=launch_of(settings),
    )
    with store.transaction() as session:  # the pool is a setting, and may be another one than this morning
        hub.ledger.refit(session)
    is_open = settings.metrics_open and _is_loopback(settings.hub_host)
    return Parts(settings, hub, durable, Upkeep(hub), mount(hub, are_metrics_open=is_open))


def mount(hub: Hub, *, are_metrics_open: bool = False) -> ASGIApp:
    """The doors of a hub as an ASGI application."""
    app = FastAPI(
        title="autovibe",
        version=__version__,
        docs_url=None,  # the page would load its scripts from elsewhere
        redoc_url=None,
        openapi_url=f"{v1.PREFIX}/openapi.json",
        redirect_slashes=False,
    )
    app.state.hub = hub
    app.state.traffic = traffic = Traffic(hub.tally)
    app.state.watchtower = Watchtower()
    app.state.gauge = Gauge()
    api_errors.install(app)
    v1.mount(app)
    open_paths = v1.OPEN_PATHS | metrics.mount(app, hub, meter := metrics.Meter(), is_open=are_metrics_open)
    # Around the whole application: the framework's own middleware would leave out what it does when a route crashes.
    unlimited = v1.UNLIMITED_PATHS | {metrics.PATH}
    guard = Guard(app, hub, v1.ROUTES, prefix=v1.PREFIX, open_paths=open_paths, unlimited_paths=unlimited)
    return Requests(BodyLimit(guard), traffic, meter)


def _proxmox(settings: Settings) -> Proxmox:
    fingerprint = settings.proxmox_fingerprint
    token = settings.read_proxmox_token()
    if settings.uses_embedded_node:
        # The node writes both at its first start, which may be this very moment.
        place = settings.node_home / "fingerprint"
        deadline = time.monotonic() + _TOKEN_PATIENCE_SECONDS
        while (token is None or not (fingerprint or place.exists())) and time.monotonic() < deadline:
            time.sleep(0.2)
            token = settings.read_proxmox_token()
        fingerprint = fingerprint or (place.read_text(encoding="utf-8").strip() if place.exists() else "")
    if token is None or (settings.uses_embedded_node and not fingerprint):
        raise ConfigurationError(
            "The embedded node has never run in this home; start both with: autovibe up"
            if settings.uses_embedded_node
            else "There is no Proxmox API token; set 'proxmox_token_file' (or AUTOVIBE_PROXMOX_TOKEN)."
        )
    return Proxmox(
        settings.hypervisor_url,
        token,
        node=settings.proxmox_node,
        fingerprint=fingerprint,
        ca_file=settings.proxmox_ca_file,
    )


def _world(
    settings: Settings,
    store: Store,
    trees: Trees,
    proxmox: Proxmox,
    guests: Guests,
    private_key: Path,
    keyring: Keyring,
) -> World:
    is_emulated = settings.uses_embedded_node and not _has_kvm(settings)
    return World(
        store=store,
        trees=trees,
        proxmox=proxmox,
        guests=guests,
        keyring=keyring,
        storage=settings.proxmox_storage,
        import_storage=settings.proxmox_import_storage,
        pool=settings.proxmox_pool,
        bridge=settings.proxmox_bridge,
        image=settings.image,
        guest_user=settings.guest_user,
        cores=settings.guest_cores or (min(2, os.cpu_count() or 1) if settings.uses_embedded_node else 2),
        memory_mb=settings.guest_memory_mb or (512 if is_emulated else 1024),
        ssh_via=settings.ssh_via,
        forward_port=settings.node_port + 1,
        runs=settings.hub_home / "runs",
        playbooks=asset("playbooks"),
        private_key=private_key,
        vmid_first=settings.vmid_first,
        vmid_last=settings.vmid_last,
        min_free_bytes=int(settings.min_free_gb * 1e9),
        ledger=_ledger(settings),
        prices=_prices(settings),
        tail_seconds=settings.budget_tail_seconds,
        url_for_guests=settings.hub_url_for_guests,
        boot_deadline=settings.boot_deadline_seconds,
        provision_deadline=settings.provision_deadline_seconds,
        premises=premises_of(settings),
    )


def _ledger(settings: Settings) -> Ledger:
    pool = {
        Resource.money: settings.pool_daily_money,
        Resource.time_hours: settings.pool_daily_time_hours,
        Resource.api_calls: settings.pool_daily_api_calls,
    }
    return Ledger(
        {resource: micros_of(limit) for resource, limit in pool.items() if limit is not None}, settings.currency
    )


def _prices(settings: Settings) -> Prices:
    return Prices(
        core=round(settings.price_core_hour * MICROS),
        memory_gb=round(settings.price_memory_gb_hour * MICROS),
        disk_gb=round(settings.price_disk_gb_hour * MICROS),
    )


def _has_kvm(settings: Settings) -> bool:
    """Whether the embedded node runs guests under KVM; it notes what its probe found, seconds after its first start."""
    if settings.node_accel != "auto":
        return settings.node_accel == "kvm"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    note = settings.node_home / "accel.json"
    deadline = time.monotonic() + _PROBE_PATIENCE_SECONDS
    while not note.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    try:
        return bool(json.loads(note.read_text(encoding="utf-8"))["accel"] == "kvm")
    except (OSError, ValueError, LookupError, TypeError):
        return False  # the smaller machine fits both


# Serving


class _Server(uvicorn.Server):
    """Ends long polls and streams before it waits for the open requests. Signals are `serve`'s."""

    def __init__(self, config: uvicorn.Config, parts: Parts) -> None:
        super().__init__(config)
        self._parts = parts

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # uvicorn would raise the signal again after its end, and so end the process before the parts are closed

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._parts.hub.events.release()
        await super().shutdown(sockets)


class _Stop:
    """The handler of SIGTERM and SIGINT: before the server runs it ends the process, then the server."""

    def __init__(self) -> None:
        self.server: uvicorn.Server | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.server is None:
            raise SystemExit(0)
        if not self.server.should_exit:
            logger.info("The Hub stops: %s.", signal.Signals(number).name)
            _leave_at(STOP_SECONDS - 0.5)
        self.server.should_exit = True


def serve(settings: Settings) -> None:
    """Run a hub process in the foreground until SIGTERM or SIGINT. Raises ConfigurationError, DatabaseUnavailable."""
    _require_safe_bind(settings)
    settings.hub_home.mkdir(mode=0o700, parents=True, exist_ok=True)
    _raise_open_files()
    configure_logs(settings.hub_home / "hub.log", settings.log_level, _secrets(settings), settings.log_format)
    stop = _Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    listener = _bind(settings)
    pid_file = settings.hub_home / "hub.pid"
    pid_file.write_text(f"{os.getpid()}\n", encoding="ascii")
    is_clean = True
    try:
        parts = build(settings)
        try:
            parts.start()
            _collect_seldom()
            stop.server = make_server(parts)
            logger.info("The Hub %s listens on %s.", __version__, settings.hub_url)
            stop.server.run(sockets=[listener])
        finally:
            is_clean = parts.close()
    except AutovibeError as error:
        logger.error("The Hub cannot run: %s %s", error.message, error.log_detail)  # noqa: TRY400 - no defect
        raise
    except Exception:
        logger.exception("The Hub met a defect and ends.")
        raise
    finally:
        listener.close()
        _remove_own(pid_file)
    logger.info("The Hub has stopped.")
    if not is_clean:
        _leave("A step did not stop in time; it is run again at the next start.")


def _collect_seldom() -> None:
    """What there is now stays for the life of the process, and a request leaves hardly any cycles: the collector's
    defaults would take a tenth of its time looking through both.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def make_server(parts: Parts) -> uvicorn.Server:
    """The HTTP server of built parts; `run(sockets=[…])` serves until it is told to exit."""
    settings = parts.settings
    config = uvicorn.Config(
        parts.app,
        http=Protocol,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=int(_STREAMS_SECONDS),
        timeout_keep_alive=30,
        proxy_headers=settings.behind_proxy,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )
    return _Server(config, parts)


def _require_safe_bind(settings: Settings) -> None:
    if not _is_loopback(settings.hub_host) and settings.tls_certificate is None and not settings.behind_proxy:
        raise ConfigurationError(
            f"The Hub would listen on '{settings.hub_host}' and receive keys in the clear; set 'tls_certificate' and "
            "'tls_key', or '--behind-proxy' when a proxy in front of it ends TLS."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bind(settings: Settings) -> socket.socket:
    """The socket, bound and not yet listening: nobody connects before the Hub can answer."""
    host, port = settings.hub_host, settings.hub_port
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Named as TCP, or asyncio would not set TCP_NODELAY on its connections: 40 ms an answer.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
    except OSError as error:
        raise ConfigurationError(
            f"The Hub cannot listen on {host}:{port}: {error.strerror}. See whether another one runs (autovibe status) "
            "or choose another 'hub_port'."
        ) from error
    listener.set_inheritable(False)
    return listener


def _raise_open_files() -> None:
    """Connections to guests, clients and databases add up; the soft limit of 1024 is no limit of ours."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _secrets(settings: Settings) -> list[str]:
    token = settings.read_proxmox_token() or ""
    return [settings.read_api_key() or "", token, token.partition("=")[2]]


def _remove_own(pid_file: Path) -> None:
    try:
        if pid_file.read_text(encoding="ascii").strip() == str(os.getpid()):
            pid_file.unlink()
    except OSError:
        logger.debug("The pid file was gone already.")


def _leave_at(seconds: float) -> None:
    """The last resort: leave after so many seconds, whatever hangs. What was unfinished is then as after a kill."""
    timer = threading.Timer(seconds, _leave, ("Something did not stop in time.",))
    timer.daemon = True
    timer.start()


def _leave(reason: str) -> None:
    logger.warning("%s The Hub leaves without it.", reason)
    logging.shutdown()
    os._exit(0)
