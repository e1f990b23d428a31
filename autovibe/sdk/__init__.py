"""Client: the Hub's nouns and verbs over HTTP.

    with Client() as client:
        project = client.projects.create("hello")
        machine = client.machines.spawn(project.uuid, prompt="echo hello", wait=True)

Without arguments it talks to the Hub of this machine's home, or to `AUTOVIBE_URL` with `AUTOVIBE_API_KEY`. Verbs return
the shapes of `autovibe.schemas` and raise the classes of `autovibe.errors`. Everything is plain blocking code; one
Client may be used by several threads.
"""

from __future__ import annotations

from pathlib import Path

from autovibe import schemas
from autovibe.sdk.analytics import Analytics
from autovibe.sdk.audit import Audit
from autovibe.sdk.checkpoints import Checkpoints
from autovibe.sdk.connection import Connection
from autovibe.sdk.events import Events
from autovibe.sdk.hub import TheHub
from autovibe.sdk.keys import Keys
from autovibe.sdk.machines import Machines
from autovibe.sdk.operations import Operations
from autovibe.sdk.projects import Projects
from autovibe.sdk.resources import Resources

__all__ = ["ROUTES", "Client"]

ROUTES: dict[tuple[str, str], tuple[str, str]] = {
    ("GET", "/health"): ("health", "status"),
    ("POST", "/projects"): ("projects.create", "project create"),
    ("GET", "/projects"): ("projects.list", "project list"),
    ("GET", "/projects/{}"): ("projects.get", "project show"),
    ("PUT", "/projects/{}"): ("projects.update", "project update"),
    ("GET", "/projects/{}/checkpoints"): ("checkpoints.list", "checkpoint list"),
    ("POST", "/machines"): ("machines.spawn", "machine spawn"),
    ("GET", "/machines"): ("machines.list", "machine list"),
    ("GET", "/machines/{}"): ("machines.get", "machine show"),
    ("POST", "/machines/{}/terminate"): ("machines.terminate", "machine terminate"),
    ("POST", "/machines/{}/checkpoint"): ("machines.checkpoint", "machine checkpoint"),
    ("POST", "/machines/{}/resume"): ("machines.resume", "machine resume"),
    ("POST", "/machines/{}/usage"): ("machines.report_usage", "machine usage"),
    ("POST", "/machines/{}/exec"): ("machines.exec", "machine exec"),
    ("GET", "/machines/{}/ssh"): ("machines.ssh", "machine ssh"),
    ("GET", "/machines/{}/logs"): ("machines.logs", "machine logs"),
    ("GET", "/checkpoints/{}"): ("checkpoints.get", "checkpoint show"),
    ("POST", "/checkpoints/{}/spawn"): ("checkpoints.spawn", "checkpoint spawn"),
    ("GET", "/checkpoints/{}/diff/{}"): ("checkpoints.diff", "checkpoint diff"),
    ("GET", "/hub/status"): ("hub.status", "hub status"),
    ("POST", "/hub/checkpoint"): ("hub.checkpoint", "hub checkpoint"),
    ("GET", "/hub/checkpoints"): ("hub.checkpoints", "hub checkpoints"),
    ("GET", "/hub/checkpoints/{}"): ("hub.get_checkpoint", "hub checkpoints"),
    ("POST", "/hub/spawn-experimental"): ("hub.spawn_experimental", "hub spawn-experimental"),
    ("GET", "/hub/experiments"): ("hub.experiments", "hub experiments"),
    ("GET", "/hub/experiments/{}"): ("hub.get_experiment", "hub experiment"),
    ("POST", "/hub/experiments/{}/stop"): ("hub.stop_experiment", "hub stop-experiment"),
    ("GET", "/resources/overview"): ("resources.overview", "resources show"),
    ("GET", "/resources/projects/{}"): ("resources.project", "resources project"),
    ("PUT", "/resources/projects/{}/budget"): ("resources.set_budget", "resources budget"),
    ("GET", "/resources/projects/{}/ledger"): ("resources.ledger", "resources ledger"),
    ("GET", "/analytics/efficiency"): ("analytics.efficiency", "analytics"),
    ("POST", "/keys"): ("keys.create", "key create"),
    ("GET", "/keys"): ("keys.list", "key list"),
    ("GET", "/keys/{}"): ("keys.get", "key show"),
    ("POST", "/keys/{}/revoke"): ("keys.revoke", "key revoke"),
    ("GET", "/audit"): ("audit.list", "audit list"),
    ("GET", "/events"): ("events.list", "watch"),
    ("GET", "/operations/{}"): ("operations.get", "machine show"),
}
"""Every route below /api/v1, the verb here that calls it, and the words of the command line that do."""


class Client:
    """A Hub. `timeout_seconds` bounds one answer of the Hub, not the work it carries out."""

    projects: Projects
    machines: Machines
    checkpoints: Checkpoints
    operations: Operations
    resources: Resources
    analytics: Analytics
    hub: TheHub
    keys: Keys
    audit: Audit
    events: Events

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_seconds: float = 30,
        ca_file: str | Path | None = None,
    ) -> None:
        """`ca_file` is verified against beside the system's own authorities. Raises InvalidRequest for a bad URL."""
        if url is None or api_key is None:
            from autovibe.settings import load

            settings = load()
            # The key of a home belongs to the home's Hub: it is not sent to another one.
            if api_key is None and (url is None or url.rstrip("/") == settings.hub_url):
                api_key = settings.read_api_key()
            ca_file = ca_file or (settings.tls_certificate if url is None else None)
            url = url or settings.hub_url
        self.connection = Connection(url, api_key, timeout_seconds, ca_file)
        self.url = self.connection.url
        self.operations = Operations(self.connection)
        self.events = Events(self.connection)
        self.keys = Keys(self.connection)
        self.audit = Audit(self.connection)
        self.hub = TheHub(self.connection, self.operations)
        self.projects = Projects(self.connection)
        self.resources = Resources(self.connection)
        self.analytics = Analytics(self.connection)
        self.machines = Machines(self.connection, self.operations)
        self.checkpoints = Checkpoints(self.connection, self.operations, self.machines)

    def health(self) -> schemas.Health:
        """What the Hub says of itself, also when it says that something is wrong. Needs no key."""
        return self.connection.get(schemas.Health, "/health", accept=(503,))

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
