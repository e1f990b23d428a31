"""Making a VM, and removing one."""

from __future__ import annotations

from autovibe.node import host
from autovibe.node.refusal import Refusal, not_implemented
from autovibe.node.state import Call, State, start_vm_task
from autovibe.node.tasks import Task
from autovibe.node.verbs import option_rights, power
from autovibe.node.verbs.config import options_of
from autovibe.node.vm import drives, volumes
from autovibe.node.vm.vmconfig import Config


def create(state: State, call: Call) -> str:
    """Take the vmid at once (a taken one is a clean 500), then make the disks in a task."""
    vmid, given, pool = call.vmid, options_of(call), call.get("pool")
    storage = call.get("storage", "local")
    if pool:
        state.access.require_pool(pool)
    _check_rights(state, call, given, pool)
    if call.get("archive"):
        raise not_implemented("Restoring a VM from an archive is not implemented")
    if state.configs.exists(vmid):
        raise _taken(state, vmid)
    volumes.check(state, given, storage)

    def take() -> None:
        if not state.configs.create(vmid, {"lock": "create"}):
            raise _taken(state, vmid)

    def work(task: Task) -> None:
        try:
            _make(state, vmid, given, storage, pool, task)
        except Exception as error:
            remove_half_made(state, vmid)
            raise Refusal(f"unable to create VM {vmid} - {error}") from error
        if call.get("start"):
            power.start_vm(state, vmid, task)

    return state.tasks.start(call.actor, "qmcreate", vmid, work, intent={"vmid": vmid}, prepare=take)


def _check_rights(state: State, call: Call, given: dict[str, str], pool: str | None) -> None:
    """Who may make a VM: by its number or by its pool; then each option for itself."""
    actor, vmid = call.actor, call.vmid
    if (name := call.get("storage")) and not state.allows(actor, f"/storage/{name}", "Datastore.AllocateSpace"):
        raise Refusal(f"Permission check failed (/storage/{name}, Datastore.AllocateSpace)", status=403)
    places = [f"/vms/{vmid}", *([f"/pool/{pool}"] if pool else [])]
    if not any(state.allows(actor, place, "VM.Allocate") for place in places):
        raise Refusal("Permission check failed", status=403)
    option_rights.check_volumes(state, actor, vmid, given, call.get("storage", "local"))
    option_rights.check(state, actor, vmid, given, (), pool)


def _taken(state: State, vmid: int) -> Refusal:
    return Refusal(f"unable to create VM {vmid} - VM {vmid} already exists on node '{state.name}'")


def _make(state: State, vmid: int, given: dict[str, str], storage: str, pool: str | None, task: Task) -> None:
    made = volumes.create(state, vmid, given, storage, task.log)
    values = {**volumes.new_identity(host.qemu_version()), **made.values}
    if "boot" not in values and (order := _default_boot_order(values)):
        values["boot"] = f"order={';'.join(order)}"
    try:
        task.check()
        if pool:
            state.access.join_pool(pool, vmid)
        state.configs.save(vmid, Config(values))
    except BaseException:
        made.undo()
        raise


def _default_boot_order(values: dict[str, str]) -> list[str]:
    """The first disk, the first disc drive, the first network card (QemuServer.pm get_default_bootdevices)."""
    disk = next((key for key, _ in drives.disks(values)), None)
    disc = next(
        (key for key, drive in drives.attached(values) if drives.is_cdrom(drive) and not drives.is_cloudinit(drive)),
        None,
    )
    net = next((key for key in sorted(values) if key.startswith("net")), None)
    return [key for key in (disk, disc, net) if key]


def remove_half_made(state: State, vmid: int) -> None:
    """Undo a create or a clone that did not get to its end: what still carries the lock of its making."""
    config = state.configs.find(vmid)
    if config is None or config.get("lock") not in ("create", "clone"):
        return
    for volid in state.owned_by(vmid):
        state.disks.free(volid)
    state.access.leave_pools(vmid)
    state.firewall.remove(vmid)
    state.configs.delete(vmid)


def destroy(state: State, call: Call) -> str:
    vmid = call.vmid
    config = state.configs.load(vmid)
    is_lock_ignored = call.check_skiplock()
    _refuse_destroy(state, vmid, config)

    def work(task: Task) -> None:
        with state.locks.exclusive(vmid):
            present = state.configs.load(vmid)
            if not is_lock_ignored and present.get("lock") != "suspended":
                present.check_lock()
            _refuse_destroy(state, vmid, present)
            remove(state, vmid, present, task, with_unreferenced=bool(call.get("destroy-unreferenced-disks")))

    with_unreferenced = bool(call.get("destroy-unreferenced-disks"))
    return start_vm_task(state, call, "qmdestroy", work, with_unreferenced=with_unreferenced)


def _refuse_destroy(state: State, vmid: int, config: Config) -> None:
    if config.has("protection"):
        raise Refusal(f"can't remove VM {vmid} - protection mode enabled")
    if state.qemu.is_running(vmid):
        raise Refusal(f"VM {vmid} is running - destroy failed")


def remove(state: State, vmid: int, config: Config, task: Task, *, with_unreferenced: bool) -> None:
    """Free the volumes of every section, then the configuration: what is left after a kill can be done again."""
    sections = [config.values, config.pending, *config.snapshots.values()]
    named = list(dict.fromkeys(volid for values in sections for volid in drives.owned_volumes(values)))
    owned = state.owned_by(vmid)
    for volid in owned if with_unreferenced else [volid for volid in named if volid in owned]:
        state.disks.free(volid)
        task.write(f'  Volume "{volid}" successfully removed')
    state.access.forget_vm(vmid)
    state.firewall.remove(vmid)
    state.configs.delete(vmid)
