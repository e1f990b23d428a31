"""Routes about the cluster, which is this one node."""

from __future__ import annotations

from autovibe.node.access.permissions import ALL_USERS, ROOT_ONLY, perm
from autovibe.node.host import datacenter
from autovibe.node.routes.route import Route, route
from autovibe.node.schema import formats
from autovibe.node.schema.options import FLAG, NODE, TEXT, VMID
from autovibe.node.schema.parameters import Param, Table
from autovibe.node.verbs import cluster, ha, options, tasks

_AUDIT = perm("/", "Sys.Audit")
_HA = "/cluster/ha"
_SID = {"sid": Param(form=ha.resource_id, optional=False)}
_CONFIG_ID = Param(form=formats.config_id, optional=False)
_JOB = {"id": Param(pattern=r"[1-9][0-9]{2,8}-\d{1,9}", optional=False)}
_RULES: Table = {"resource": TEXT, "type": Param(enum=("node-affinity", "resource-affinity"))}
_ZONE_TYPE = Param(enum=("evpn", "faucet", "qinq", "simple", "vlan", "vxlan"))
_STATE_OF_NETWORKS: Table = {"pending": FLAG, "running": FLAG}

_HA_ROUTES = (
    route("GET", _HA, ha.index, _AUDIT),
    route("GET", f"{_HA}/status", ha.status_index, ALL_USERS),
    route("GET", f"{_HA}/status/current", ha.status, _AUDIT),
    route("GET", f"{_HA}/status/manager_status", ha.manager_status, _AUDIT),
    route("GET", f"{_HA}/resources", cluster.nothing, _AUDIT, {"type": Param(enum=("ct", "vm"))}),
    route("GET", f"{_HA}/resources/{{sid}}", ha.resource, _AUDIT, _SID),
    route("GET", f"{_HA}/groups", ha.list_groups, _AUDIT),
    route("GET", f"{_HA}/groups/{{group}}", ha.group, _AUDIT, {"group": _CONFIG_ID}),
    route("GET", f"{_HA}/rules", cluster.nothing, _AUDIT, _RULES),
    route("GET", f"{_HA}/rules/{{rule}}", ha.rule, _AUDIT, {"rule": _CONFIG_ID}),
)

ROUTES: tuple[Route, ...] = (
    route("GET", "/", cluster.root_index, ALL_USERS),
    route("GET", "/version", cluster.version, ALL_USERS),
    route("GET", "/cluster", cluster.index, ALL_USERS),
    route("GET", "/cluster/nextid", cluster.next_id, ALL_USERS, {"vmid": VMID}),
    route(
        "GET",
        "/cluster/resources",
        cluster.resources,
        ALL_USERS,
        {"type": Param(enum=("vm", "storage", "node", "sdn"))},
    ),
    route("GET", "/cluster/status", cluster.status, _AUDIT),
    route("GET", "/cluster/tasks", tasks.list_cluster, ALL_USERS),
    route("GET", "/cluster/log", cluster.log, ALL_USERS, {"max": Param("integer", minimum=1)}),
    route("GET", "/cluster/options", options.get_cluster, ALL_USERS),
    route(
        "PUT",
        "/cluster/options",
        options.put_cluster,
        perm("/", "Sys.Modify"),
        {**datacenter.CLUSTER, **datacenter.CHANGING},
    ),
    *_HA_ROUTES,
    route("GET", "/cluster/replication", cluster.nothing, ALL_USERS),
    route("GET", "/cluster/replication/{id}", cluster.replication_job, ALL_USERS, _JOB),
    route("GET", "/cluster/backup", cluster.nothing, _AUDIT),
    route("GET", "/cluster/backup-info", cluster.backup_info_index, ROOT_ONLY),
    route("GET", "/cluster/backup-info/not-backed-up", cluster.not_backed_up, _AUDIT),
    route("GET", "/cluster/config", cluster.config_index, _AUDIT),
    route("GET", "/cluster/config/qdevice", cluster.quorum_device, _AUDIT),
    route("GET", "/cluster/jobs", cluster.jobs_index, ALL_USERS),
    route("GET", "/cluster/jobs/realm-sync", cluster.nothing, _AUDIT),
    route("GET", "/cluster/mapping", cluster.mapping_index, ALL_USERS),
    *(
        route("GET", f"/cluster/mapping/{kind}", cluster.nothing, ALL_USERS, {"check-node": NODE})
        for kind in ("dir", "pci", "usb")
    ),
    route("GET", "/cluster/sdn", cluster.network_index, perm("/sdn", "SDN.Audit")),
    route("GET", "/cluster/sdn/zones", cluster.nothing, ALL_USERS, {**_STATE_OF_NETWORKS, "type": _ZONE_TYPE}),
    route("GET", "/cluster/sdn/vnets", cluster.nothing, ALL_USERS, _STATE_OF_NETWORKS),
    route("GET", "/nodes", cluster.nodes, ALL_USERS),
)
