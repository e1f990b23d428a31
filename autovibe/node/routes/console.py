"""Routes about consoles of VMs.

Shells of the node itself (`termproxy`, `vncshell` and `spiceshell` of a node) are not among them and answer 501: the
node runs as its user on that user's machine, and whoever holds a token of it must not get a shell there.
"""

from __future__ import annotations

from autovibe.node.routes.route import Route, V, on_vm, route
from autovibe.node.schema import formats
from autovibe.node.schema.options import FLAG
from autovibe.node.schema.parameters import Param
from autovibe.node.verbs import console

_ON_CONSOLE = on_vm("VM.Console")

ROUTES: tuple[Route, ...] = (
    route("POST", f"{V}/vncproxy", console.vncproxy, _ON_CONSOLE, {"websocket": FLAG, "generate-password": FLAG}),
    route(
        "POST",
        f"{V}/termproxy",
        console.termproxy,
        _ON_CONSOLE,
        {"serial": Param(enum=("serial0", "serial1", "serial2", "serial3"))},
    ),
    route("POST", f"{V}/spiceproxy", console.spiceproxy, _ON_CONSOLE, {"proxy": Param(form=formats.host)}),
    route(
        "GET",
        f"{V}/vncwebsocket",
        console.vncwebsocket,
        _ON_CONSOLE,
        {
            "port": Param("integer", optional=False, minimum=5900, maximum=5999),
            "vncticket": Param(optional=False, max_length=512),
        },
    ),
)
