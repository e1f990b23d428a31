"""Routes about the node itself: its status, its tasks, what it is and has, and all of its VMs at a time."""

from __future__ import annotations

from autovibe.node.access.permissions import ALL_USERS, perm
from autovibe.node.host import datacenter, networks
from autovibe.node.routes.route import START, N, Route, on_node, route
from autovibe.node.schema import formats
from autovibe.node.schema.options import FLAG, NODE, STORAGE, TEXT, VMID
from autovibe.node.schema.parameters import Param, Table
from autovibe.node.verbs import bulk, cluster, host, journal, options, tasks

_TASK_FILTERS: Table = {
    "errors": FLAG,
    "limit": START,
    "start": START,
    "since": Param("integer"),
    "until": Param("integer"),
    "source": Param(enum=("archive", "active", "all")),
    "statusfilter": Param(form=formats.task_statuses),
    "typefilter": TEXT,
    "userfilter": TEXT,
    "vmid": VMID,
}

_DATE = Param(pattern=r"\d{4}-\d{2}-\d{2}( \d{2}:\d{2}(:\d{2})?)?")
_SYSLOG: Table = {
    "start": START,
    "limit": START,
    "since": _DATE,
    "until": _DATE,
    "service": Param(max_length=128),
}
_JOURNAL: Table = {
    **dict.fromkeys(("since", "until", "lastentries"), START),
    **dict.fromkeys(("startcursor", "endcursor"), TEXT),
    **dict.fromkeys(("identifiers", "kernel", "structured", "units"), FLAG),
    "priority": Param(pattern=r"([0-7](\.\.[0-7])?)?"),
    "service": Param(max_length=128, pattern=r"[A-Za-z0-9_.@:*?!\[\]\/-]+"),
    "unit": Param(max_length=256, pattern=r"[A-Za-z0-9_.@:-]+"),
}
_NETWORK_TYPES = (
    "bridge", "bond", "eth", "alias", "vlan", "fabric", "OVSBridge", "OVSBond", "OVSPort", "OVSIntPort", "vnet",
    "any_bridge", "any_local_bridge", "include_sdn",
)  # fmt: skip
_INTERFACE = {"iface": Param(min_length=2, max_length=20, form=networks.interface_name, optional=False)}
_SERVICE = {"service": Param(enum=host.SERVICES, optional=False)}
_PROPERTY = {"property": Param(enum=tuple(sorted(datacenter.NODE_OPTIONS)))}
_ARCH = {"arch": Param(enum=("x86_64", "aarch64"))}
_WORKERS = Param("integer", minimum=1, maximum=64)
_MANY: Table = {"vms": Param(form=bulk.vmid_list), "max-workers": _WORKERS}

_AUDIT = on_node("Sys.Audit")
_Q = f"{N}/capabilities/qemu"

_TASK_ROUTES = (
    route("GET", f"{N}/tasks", tasks.list_node, ALL_USERS, _TASK_FILTERS),
    route("GET", f"{N}/tasks/{{upid}}", tasks.index, ALL_USERS),
    route("DELETE", f"{N}/tasks/{{upid}}", tasks.stop, ALL_USERS),
    route("GET", f"{N}/tasks/{{upid}}/log", tasks.log, ALL_USERS, {"start": START, "limit": START, "download": FLAG}),
    route("GET", f"{N}/tasks/{{upid}}/status", tasks.status, ALL_USERS),
)
_BULK_ROUTES = (
    route("POST", f"{N}/startall", bulk.start_all, ALL_USERS, {**_MANY, "force": FLAG}),
    route(
        "POST",
        f"{N}/stopall",
        bulk.stop_all,
        ALL_USERS,
        {**_MANY, "force-stop": FLAG, "timeout": Param("integer", minimum=0, maximum=7200)},
    ),
    route("POST", f"{N}/suspendall", bulk.suspend_all, ALL_USERS, _MANY),
    route(
        "POST",
        f"{N}/migrateall",
        bulk.migrate_all,
        ALL_USERS,
        {**_MANY, "maxworkers": _WORKERS, "target": NODE.required(), "with-local-disks": FLAG},
    ),
    route("POST", f"{N}/wakeonlan", host.wake, on_node("Sys.PowerMgmt")),
)
_CAPABILITY_ROUTES = (
    route("GET", f"{N}/capabilities", host.capabilities_index, ALL_USERS),
    route("GET", _Q, host.qemu_index, ALL_USERS),
    route("GET", f"{_Q}/cpu", host.processors, ALL_USERS, _ARCH),
    route("GET", f"{_Q}/cpu-flags", host.processor_flags, ALL_USERS, {**_ARCH, "accel": Param(enum=("kvm", "tcg"))}),
    route("GET", f"{_Q}/machines", host.machines, ALL_USERS, _ARCH),
    route("GET", f"{_Q}/migration", host.migration, _AUDIT),
)

ROUTES: tuple[Route, ...] = (
    route("GET", N, host.index, ALL_USERS),
    route("GET", f"{N}/status", host.status, _AUDIT),
    route(
        "POST",
        f"{N}/status",
        host.power,
        on_node("Sys.PowerMgmt"),
        {"command": Param(enum=("reboot", "shutdown"), optional=False)},
    ),
    route("GET", f"{N}/version", cluster.version, ALL_USERS),
    route("GET", f"{N}/time", host.read_time, _AUDIT),
    route("GET", f"{N}/dns", host.dns, _AUDIT),
    route("GET", f"{N}/hosts", host.hosts, perm("/", "Sys.Audit")),
    route("GET", f"{N}/config", options.get_node, perm("/", "Sys.Audit"), _PROPERTY),
    route(
        "PUT",
        f"{N}/config",
        options.put_node,
        perm("/", "Sys.Modify"),
        {**datacenter.NODE_OPTIONS, **datacenter.CHANGING_WITH_DIGEST},
    ),
    route("GET", f"{N}/network", host.list_networks, ALL_USERS, {"type": Param(enum=_NETWORK_TYPES)}),
    route("GET", f"{N}/network/{{iface}}", host.network, _AUDIT, _INTERFACE),
    route("GET", f"{N}/netstat", cluster.nothing, _AUDIT),
    route("GET", f"{N}/services", host.services, _AUDIT),
    route("GET", f"{N}/services/{{service}}", host.service_index, _AUDIT, _SERVICE),
    route("GET", f"{N}/services/{{service}}/state", host.service_state, _AUDIT, _SERVICE),
    route("GET", f"{N}/syslog", journal.syslog, on_node("Sys.Syslog"), _SYSLOG),
    route("GET", f"{N}/journal", journal.journal, on_node("Sys.Syslog"), _JOURNAL),
    route("GET", f"{N}/report", host.report, _AUDIT),
    route("GET", f"{N}/subscription", host.subscription, ALL_USERS),
    route("GET", f"{N}/replication", cluster.nothing, ALL_USERS, {"guest": VMID}),
    route("GET", f"{N}/lxc", cluster.nothing, ALL_USERS),
    route("GET", f"{N}/aplinfo", cluster.nothing, ALL_USERS),
    route("GET", f"{N}/vzdump/defaults", host.backup_defaults, ALL_USERS, {"storage": STORAGE}),
    *_TASK_ROUTES,
    *_BULK_ROUTES,
    *_CAPABILITY_ROUTES,
)
