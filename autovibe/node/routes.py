"""Every route of the node in one table: method, path, verb, parameters. What is not in it answers 501."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from autovibe.node import formats
from autovibe.node.options import DESCRIPTION, DIGEST, DRIVE_KEYS, FLAG, NODE, OPTIONS, SNAPSHOT, STORAGE, TEXT, VMID
from autovibe.node.parameters import Param, Table
from autovibe.node.state import Call, State
from autovibe.node.verbs import (
    access,
    agent,
    clones,
    cloudinit,
    cluster,
    config,
    create,
    power,
    snapshots,
    storage,
    tasks,
    vms,
)

Verb = Callable[[State, Call], Any]


@dataclass(frozen=True)
class Route:
    """`is_public` routes need no authentication; `takes_file` ones a multipart body of any size, and no CSRF token."""

    method: str
    path: str
    verb: Verb
    table: Table = field(default_factory=dict)
    is_public: bool = False
    takes_file: bool = False


_PATH: Table = {
    "node": NODE.required(),
    "vmid": VMID.required(),
    "upid": Param(optional=False),
    "snapname": SNAPSHOT.required(),
    "storage": STORAGE.required(),
    "volume": Param(optional=False, max_length=255),
}

_N, _V = "/nodes/{node}", "/nodes/{node}/qemu/{vmid}"
_S, _A = "/nodes/{node}/storage/{storage}", "/nodes/{node}/qemu/{vmid}/agent"
_START = Param("integer", minimum=0)
_SECONDS = Param("integer", minimum=0)
_DELAY = Param("integer", minimum=1, maximum=30)
_DISK = Param(enum=DRIVE_KEYS)
_SKIPLOCK = {"skiplock": FLAG}

_TASK_FILTERS: Table = {
    "errors": FLAG,
    "limit": _START,
    "start": _START,
    "since": Param("integer"),
    "until": Param("integer"),
    "source": Param(enum=("archive", "active", "all")),
    "statusfilter": TEXT,
    "typefilter": TEXT,
    "userfilter": TEXT,
    "vmid": VMID,
}
_CREATE: Table = {
    **OPTIONS,
    "vmid": VMID.required(),
    "archive": Param(max_length=255),
    "bwlimit": _START,
    "force": Param("boolean", requires="archive"),
    "import-working-storage": STORAGE,
    "pool": Param(form=formats.pool_id),
    "start": FLAG,
    "storage": STORAGE,
    "unique": Param("boolean", requires="archive"),
}
_CONFIGURE: Table = {
    **OPTIONS,
    "delete": Param(form=formats.config_ids),
    "revert": Param(form=formats.config_ids),
    "digest": DIGEST,
    "force": Param("boolean", requires="delete"),
    **_SKIPLOCK,
}
_CLONE: Table = {
    "newid": VMID.required(),
    "name": OPTIONS["name"],
    "description": DESCRIPTION,
    "snapname": SNAPSHOT,
    "full": FLAG,
    "storage": STORAGE,
    "format": Param(enum=("raw", "qcow2", "vmdk")),
    "pool": Param(form=formats.pool_id),
    "target": NODE,
    "bwlimit": _START,
}
_STARTING: Table = {
    **_SKIPLOCK,
    "timeout": _SECONDS,
    "machine": OPTIONS["machine"],
    "force-cpu": TEXT,
    "stateuri": Param(max_length=128),
    "migratedfrom": NODE,
    "targetstorage": TEXT,
}
_STOPPING: Table = {**_SKIPLOCK, "timeout": _SECONDS, "keepActive": FLAG}
_UPLOAD: Table = {
    "content": Param(optional=False, enum=("iso", "vztmpl", "import", "snippets")),
    "filename": Param(max_length=255),
    "checksum": Param(requires="checksum-algorithm"),
    "checksum-algorithm": Param(enum=("md5", "sha1", "sha224", "sha256", "sha384", "sha512"), requires="checksum"),
}
_FILE_READ: Table = {
    "file": Param(optional=False),
    "count": Param("integer", minimum=1, maximum=16777216),
    "offset": _START,
    "decode": FLAG,
}
_FILE_WRITE: Table = {
    "file": Param(optional=False),
    "content": Param(optional=False, max_length=61440, is_multiline=True, is_binary=True),
    "encode": FLAG,
}
_EXEC: Table = {
    "command": Param("array", optional=False, is_multiline=True),
    "input-data": Param(max_length=65536, is_multiline=True, is_binary=True),
}
_PASSWORD: Table = {
    "username": Param(optional=False),
    "password": Param(optional=False, min_length=5, max_length=1024),
    "crypted": FLAG,
}
_LOGIN: Table = {
    "username": Param(optional=False, max_length=64),
    "password": Param(optional=False),
    "realm": Param(max_length=32),
    "otp": TEXT,
    "path": Param(max_length=64, requires="privs"),
    "privs": Param(max_length=64, requires="path"),
    "new-format": FLAG,
}


def _route(method: str, path: str, verb: Verb, table: Mapping[str, Param] | None = None, **marks: bool) -> Route:
    """A route whose table has its path's parameters too."""
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    return Route(method, path, verb, {**(table or {}), **{name: _PATH[name] for name in names}}, **marks)


ROUTES: tuple[Route, ...] = (
    _route("GET", "/", cluster.root_index),
    _route("GET", "/version", cluster.version),
    _route("GET", "/access/ticket", access.login_page, is_public=True),
    _route("POST", "/access/ticket", access.login, _LOGIN, is_public=True),
    _route("GET", "/access/domains", access.domains, is_public=True),
    _route("GET", "/access/permissions", access.permissions, {"path": TEXT, "userid": TEXT}),
    _route("GET", "/cluster/nextid", cluster.next_id, {"vmid": VMID}),
    _route("GET", "/cluster/resources", cluster.resources, {"type": Param(enum=("vm", "storage", "node", "sdn"))}),
    _route("GET", "/cluster/status", cluster.status),
    _route("GET", "/cluster/tasks", tasks.list_cluster),
    _route("GET", "/nodes", cluster.nodes),
    _route("GET", _N, cluster.node_index),
    _route("GET", f"{_N}/status", cluster.node_status),
    _route("GET", f"{_N}/version", cluster.version),
    _route("GET", f"{_N}/tasks", tasks.list_node, _TASK_FILTERS),
    _route("GET", f"{_N}/tasks/{{upid}}", tasks.index),
    _route("DELETE", f"{_N}/tasks/{{upid}}", tasks.stop),
    _route("GET", f"{_N}/tasks/{{upid}}/log", tasks.log, {"start": _START, "limit": _START, "download": FLAG}),
    _route("GET", f"{_N}/tasks/{{upid}}/status", tasks.status),
    _route("GET", f"{_N}/qemu", vms.list_all, {"full": FLAG}),
    _route("POST", f"{_N}/qemu", create.create, _CREATE),
    _route("GET", _V, vms.index),
    _route("DELETE", _V, create.destroy, {**_SKIPLOCK, "purge": FLAG, "destroy-unreferenced-disks": FLAG}),
    _route("GET", f"{_V}/config", config.get, {"current": FLAG, "snapshot": SNAPSHOT}),
    _route("PUT", f"{_V}/config", config.put, _CONFIGURE),
    _route("POST", f"{_V}/config", config.post, {**_CONFIGURE, "background_delay": _DELAY}),
    _route("GET", f"{_V}/pending", config.pending),
    _route(
        "PUT",
        f"{_V}/resize",
        config.resize,
        {
            "disk": _DISK.required(),
            "size": Param(optional=False, pattern=r"\+?\d+(\.\d+)?[KMGT]?"),
            "digest": DIGEST,
            **_SKIPLOCK,
        },
    ),
    _route("POST", f"{_V}/clone", clones.clone, _CLONE),
    _route("POST", f"{_V}/template", clones.template, {"disk": _DISK}),
    _route(
        "GET",
        f"{_V}/feature",
        clones.feature,
        {"feature": Param(optional=False, enum=("snapshot", "clone", "copy")), "snapname": SNAPSHOT},
    ),
    _route("GET", f"{_V}/status", vms.status_index),
    _route("GET", f"{_V}/status/current", vms.current),
    _route("POST", f"{_V}/status/start", power.start, _STARTING),
    _route("POST", f"{_V}/status/stop", power.stop, {**_STOPPING, "overrule-shutdown": FLAG, "migratedfrom": NODE}),
    _route("POST", f"{_V}/status/shutdown", power.shutdown, {**_STOPPING, "forceStop": FLAG}),
    _route("POST", f"{_V}/status/reboot", power.reboot, {"timeout": _SECONDS}),
    _route("POST", f"{_V}/status/reset", power.reset, _SKIPLOCK),
    _route(
        "POST",
        f"{_V}/status/suspend",
        power.suspend,
        {**_SKIPLOCK, "todisk": FLAG, "statestorage": Param(form=formats.storage_id, requires="todisk")},
    ),
    _route("POST", f"{_V}/status/resume", power.resume, {**_SKIPLOCK, "nocheck": FLAG}),
    _route("GET", f"{_V}/snapshot", snapshots.list_all),
    _route(
        "POST",
        f"{_V}/snapshot",
        snapshots.create,
        {"snapname": SNAPSHOT.required(), "description": DESCRIPTION, "vmstate": FLAG},
    ),
    _route("GET", f"{_V}/snapshot/{{snapname}}", snapshots.index),
    _route("DELETE", f"{_V}/snapshot/{{snapname}}", snapshots.delete, {"force": FLAG}),
    _route("GET", f"{_V}/snapshot/{{snapname}}/config", snapshots.get_config),
    _route("PUT", f"{_V}/snapshot/{{snapname}}/config", snapshots.put_config, {"description": DESCRIPTION}),
    _route("POST", f"{_V}/snapshot/{{snapname}}/rollback", snapshots.rollback, {"start": FLAG}),
    _route("GET", f"{_V}/cloudinit", cloudinit.get),
    _route("PUT", f"{_V}/cloudinit", cloudinit.put),
    _route(
        "GET",
        f"{_V}/cloudinit/dump",
        cloudinit.dump,
        {"type": Param(optional=False, enum=("user", "network", "meta"))},
    ),
    _route("GET", _A, agent.index),
    _route("POST", _A, agent.run, {"command": Param(optional=False, enum=agent.COMMANDS)}),
    *(_route("GET", f"{_A}/{name}", partial(agent.command, name)) for name in agent.READING),
    *(_route("POST", f"{_A}/{name}", partial(agent.command, name)) for name in agent.ACTING),
    _route("POST", f"{_A}/exec", agent.execute, _EXEC),
    _route("GET", f"{_A}/exec-status", agent.execution, {"pid": Param("integer", optional=False)}),
    _route("GET", f"{_A}/file-read", agent.read_file, _FILE_READ),
    _route("POST", f"{_A}/file-write", agent.write_file, _FILE_WRITE),
    _route("POST", f"{_A}/set-user-password", agent.set_password, _PASSWORD),
    _route(
        "GET",
        f"{_N}/storage",
        storage.list_all,
        {
            "content": Param(form=formats.contents),
            "enabled": FLAG,
            "format": FLAG,
            "storage": STORAGE,
            "target": NODE,
        },
    ),
    _route("GET", _S, storage.index),
    _route("GET", f"{_S}/status", storage.status),
    _route("GET", f"{_S}/content", storage.content, {"content": Param(form=formats.content), "vmid": VMID}),
    _route("GET", f"{_S}/content/{{volume}}", storage.volume),
    _route("DELETE", f"{_S}/content/{{volume}}", storage.delete, {"delay": _DELAY}),
    _route("POST", f"{_S}/upload", storage.upload, _UPLOAD, takes_file=True),
)

_BRANCH = dict[str, Any]


def _plant() -> _BRANCH:
    """The table as a tree of path segments, `*` for a parameter; the routes of a path by method under ``."""
    root: _BRANCH = {}
    for route in ROUTES:
        branch = root
        for part in filter(None, route.path.split("/")):
            branch = branch.setdefault("*" if part.startswith("{") else part, {})
        branch.setdefault("", {})[route.method] = route
    return root


_TREE = _plant()


def find(method: str, path: str) -> tuple[Route, dict[str, str]] | None:
    """The route of a decoded path, and the path's parameters; a volume's name may hold slashes."""
    branch, values = _TREE, []
    parts = [part for part in path.split("/") if part]
    for position, part in enumerate(parts):
        if part in branch and part != "":
            branch = branch[part]
        elif "*" in branch:
            branch = branch["*"]
            if position and parts[position - 1] == "content":
                values.append("/".join(parts[position:]))
                break
            values.append(part)
        else:
            return None
    route: Route | None = branch.get("", {}).get(method)
    if route is None:
        return None
    names = [part[1:-1] for part in route.path.split("/") if part.startswith("{")]
    return route, dict(zip(names, values, strict=True))
