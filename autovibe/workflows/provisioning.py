"""Running a type's playbook on a machine that is being spawned, unless its origin was provisioned by the same one."""

from __future__ import annotations

import shutil
from pathlib import Path
from uuid import UUID

from autovibe import provision as playbook_run
from autovibe.domain import Machine, Operation
from autovibe.domain.machine_type import machine_type
from autovibe.errors import NotYet, ProvisionFailed
from autovibe.workflows import vms
from autovibe.workflows.world import World

_LOST_RUNS = 3  # times a run may vanish with its process before the step fails


def provision(world: World, operation_uuid: UUID) -> None:
    """Run the type's playbook, unless what the machine was spawned from was provisioned by the same one."""
    operation, machine = vms.machine_of(world, operation_uuid)
    kind = machine_type(machine.type)
    wanted = world.provisioned_for(kind.name)
    if operation.order.get("provisioned_for") == wanted:
        return
    if vms.origin_of(world, machine).provisioned_for != wanted:
        _run_playbook(world, operation, machine, kind.playbook)
    vms.note(world, operation_uuid, provisioned_for=wanted)
    for run in _runs(world, operation):
        shutil.rmtree(run, ignore_errors=True)  # a failed one is kept to be looked at


def _run_playbook(world: World, operation: Operation, machine: Machine, playbook: str) -> None:
    run = _runs(world, operation)[-1]
    address = vms.address_of(world, machine)
    playbook_run.start(
        run,
        playbook=world.playbooks / playbook,
        host=address.host,
        port=address.port,
        user=address.user,
        host_key=address.host_key,
        private_key=world.private_key,
        variables={"machine_name": machine.name, "machine_uuid": str(machine.uuid), "machine_type": machine.type},
        project_dir=world.playbooks,
    )
    report = playbook_run.poll(run)
    if report is None:
        raise NotYet(f"playbook '{playbook}' is running")
    lost = int(operation.order.get("lost_runs", 0)) + 1
    if report.status == "lost" and lost < _LOST_RUNS:
        vms.note(world, operation.uuid, lost_runs=lost)
        raise NotYet(f"playbook '{playbook}' is begun again, its process has vanished")
    if report.status != "ok":
        task = f" at task '{report.failed_task}'" if report.failed_task else ""
        raise ProvisionFailed(
            f"Playbook '{playbook}' of machine '{machine.name}' ended {report.status}{task}: {report.message}",
            details={"playbook": playbook, "status": report.status, "task": report.failed_task, "stats": report.stats},
        )


def _runs(world: World, operation: Operation) -> list[Path]:
    """The directories of the operation's runs: those that were lost, and the present one."""
    lost = int(operation.order.get("lost_runs", 0))
    return [world.runs / f"{operation.uuid}-{number}" for number in range(1, lost + 2)]


def stop(world: World, operation_uuid: UUID) -> None:
    operation, _ = vms.machine_of(world, operation_uuid)
    for run in _runs(world, operation):
        playbook_run.stop(run)
