"""Routes about storages and what they hold."""

from __future__ import annotations

from autovibe.node import formats
from autovibe.node.options import FLAG, NODE, STORAGE, VMID
from autovibe.node.parameters import Param, Table
from autovibe.node.permissions import ALL_USERS
from autovibe.node.routes.route import DELAY, N, Route, S, on_storage, route
from autovibe.node.verbs import storage

_UPLOAD: Table = {
    "content": Param(optional=False, enum=("iso", "vztmpl", "import", "snippets")),
    "filename": Param(max_length=255),
    "checksum": Param(requires="checksum-algorithm"),
    "checksum-algorithm": Param(enum=("md5", "sha1", "sha224", "sha256", "sha384", "sha512"), requires="checksum"),
}

ROUTES: tuple[Route, ...] = (
    route(
        "GET",
        f"{N}/storage",
        storage.list_all,
        ALL_USERS,
        {
            "content": Param(form=formats.contents),
            "enabled": FLAG,
            "format": FLAG,
            "storage": STORAGE,
            "target": NODE,
        },
    ),
    route("GET", S, storage.index, on_storage("Datastore.Audit", "Datastore.AllocateSpace", any=True)),
    route(
        "GET",
        f"{S}/status",
        storage.status,
        on_storage("Datastore.Audit", "Datastore.AllocateSpace", any=True),
    ),
    route(
        "GET",
        f"{S}/content",
        storage.content,
        on_storage("Datastore.Audit", "Datastore.AllocateSpace", any=True),
        {"content": Param(form=formats.content), "vmid": VMID},
    ),
    route("GET", f"{S}/content/{{volume}}", storage.volume, ALL_USERS),
    route("DELETE", f"{S}/content/{{volume}}", storage.delete, ALL_USERS, {"delay": DELAY}),
    route(
        "POST",
        f"{S}/upload",
        storage.upload,
        on_storage("Datastore.AllocateTemplate"),
        _UPLOAD,
        takes_file=True,
    ),
)
