"""Routes about storages: their configuration, what they hold, and how files come to them."""

from __future__ import annotations

from autovibe.node.access.permissions import ALL_USERS, ROOT_ONLY, both, either, perm
from autovibe.node.routes.route import DELAY, N, Route, S, on_node, on_storage, route
from autovibe.node.schema import formats
from autovibe.node.schema.options import FLAG, NODE, STORAGE, VMID
from autovibe.node.schema.parameters import Param, Table
from autovibe.node.schema.storage_formats import CREATE, TYPES, UPDATE
from autovibe.node.verbs import downloads, storage, storages

_READING = on_storage("Datastore.Audit", "Datastore.AllocateSpace", any=True)
_ALLOCATING = perm("/storage", "Datastore.Allocate")
_REACHING_OUT = either(perm("/", "Sys.Audit", "Sys.Modify"), on_node("Sys.AccessNetwork"))

_CHECKED: Table = {
    "checksum": Param(requires="checksum-algorithm"),
    "checksum-algorithm": Param(enum=("md5", "sha1", "sha224", "sha256", "sha384", "sha512"), requires="checksum"),
}
_FROM_URL: Table = {"url": Param(optional=False, pattern=r"https?://.*"), "verify-certificates": FLAG}

ROUTES: tuple[Route, ...] = (
    route("GET", "/storage", storages.list_all, ALL_USERS, {"type": Param(enum=TYPES)}),
    route("POST", "/storage", storages.create, _ALLOCATING, {**CREATE, "storage": STORAGE.required()}),
    route("GET", "/storage/{storage}", storages.get, on_storage("Datastore.Allocate")),
    route(
        "PUT",
        "/storage/{storage}",
        storages.update,
        _ALLOCATING,
        {**UPDATE, "delete": Param(form=formats.config_ids, max_length=4096), "digest": Param(max_length=64)},
    ),
    route("DELETE", "/storage/{storage}", storages.delete, _ALLOCATING),
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
    route("GET", S, storage.index, _READING),
    route("GET", f"{S}/status", storage.status, _READING),
    route(
        "GET",
        f"{S}/content",
        storage.content,
        _READING,
        {"content": Param(form=formats.content), "vmid": VMID},
    ),
    route(
        "POST",
        f"{S}/content",
        storage.allocate,
        on_storage("Datastore.AllocateSpace"),
        {
            "filename": Param(optional=False),
            "format": Param(enum=("raw", "qcow2", "subvol", "vmdk"), requires="size"),
            "size": Param(optional=False, pattern=r"\d+[MG]?"),
            "vmid": VMID.required(),
        },
    ),
    route("GET", f"{S}/content/{{volume}}", storage.volume, ALL_USERS),
    route(
        "PUT",
        f"{S}/content/{{volume}}",
        storage.set_attributes,
        ALL_USERS,
        {"notes": Param(is_multiline=True), "protected": FLAG},
    ),
    route(
        "POST",
        f"{S}/content/{{volume}}",
        storage.copy,
        ROOT_ONLY,
        {"target": Param(optional=False), "target_node": NODE},
    ),
    route("DELETE", f"{S}/content/{{volume}}", storage.delete, ALL_USERS, {"delay": DELAY}),
    route(
        "POST",
        f"{S}/upload",
        downloads.upload,
        on_storage("Datastore.AllocateTemplate"),
        {
            "content": Param(optional=False, enum=("iso", "vztmpl", "import", "snippets")),
            "filename": Param(max_length=255),
            **_CHECKED,
        },
        takes_file=True,
    ),
    route(
        "POST",
        f"{S}/download-url",
        downloads.download,
        both(on_storage("Datastore.AllocateTemplate"), _REACHING_OUT),
        {
            **_FROM_URL,
            "content": Param(optional=False, enum=("iso", "vztmpl", "import")),
            "filename": Param(optional=False, max_length=255),
            "compression": Param(enum=("gz", "lzo", "zst", "bz2")),
            **_CHECKED,
        },
    ),
    route("GET", f"{N}/query-url-metadata", downloads.metadata, _REACHING_OUT, _FROM_URL),
)
