"""What the node writes down about itself, its storages and its VMs every ten seconds, in one thread.

Everything but the disks' counters is read from `/proc`; those are asked of each running QEMU in a thread of its own, so
that one that hangs holds up neither the others nor the clock. A stopped VM costs a look for its pid file.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from autovibe.node.disks.volume import DiskError
from autovibe.node.host.rrd import Recorder
from autovibe.node.refusal import Refusal
from autovibe.node.verbs import vms
from autovibe.node.vm import drives
from autovibe.node.vm.monitor import MonitorError

if TYPE_CHECKING:
    from autovibe.node.state import State
    from autovibe.node.vm.vmconfig import Config

logger = logging.getLogger(__name__)

PERIOD_SECONDS = 10.0
_ANSWER_SECONDS = 2.0  # for all the QEMUs together
_PRESSURES = tuple(f"pressure{what}" for what in ("cpusome", "iosome", "iofull", "memorysome", "memoryfull"))

FIELDS = {
    "node": (
        "loadavg", "maxcpu", "cpu", "iowait", "memtotal", "memused", "swaptotal", "swapused", "roottotal", "rootused",
        "netin", "netout", "memavailable", "arcsize", *_PRESSURES,
    ),
    "storage": ("total", "used"),
    "vm": (
        "maxcpu", "cpu", "maxmem", "mem", "maxdisk", "disk", "netin", "netout", "diskread", "diskwrite", "memhost",
    ),
}  # fmt: skip
"""The figures of each kind of series, as Proxmox VE 9 names them (a VM has no pressures: it is in no control group)."""


class Sampler:
    """The samples of one node; `recorder` keeps them."""

    def __init__(self, directory: Path) -> None:
        self.recorder = Recorder(directory, FIELDS)
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self._sizes: dict[int, tuple[str, dict[str, float]]] = {}
        self._disk_bytes: dict[int, tuple[int, int]] = {}
        self._asked: dict[int, threading.Thread] = {}

    def start(self, state: State) -> None:
        self._thread = threading.Thread(target=self._run, args=(state,), name="sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        if self._thread is not None:
            self._thread.join(_ANSWER_SECONDS)

    def disk_bytes(self, vmid: int) -> tuple[int, int]:
        """What a running VM's disks have read and written since its start, as of the last sample."""
        return self._disk_bytes.get(vmid, (0, 0))

    def _run(self, state: State) -> None:
        trouble = ""
        while not self._is_over.is_set():
            try:
                self.sample(state, time.time())
                trouble = ""
            except (OSError, DiskError, Refusal, psutil.Error) as error:  # a full disk, mostly: said once, tried again
                if str(error) != trouble:
                    trouble = str(error)
                    logger.warning("Figures could not be recorded: %s", error)
            self._is_over.wait(PERIOD_SECONDS)

    def sample(self, state: State, now: float) -> None:
        record = self.recorder.record
        record("node", now, *_of_node(state.home))
        names = {"node"}
        for status in state.disks.statuses():
            names.add(name := f"storage-{status['storage']}")
            record(name, now, {"total": status["total"], "used": status["used"]})
        vmids = state.configs.vmids()
        running = {vmid: pid for vmid in vmids if (pid := state.qemu.pid(vmid)) is not None}
        self._ask_disks(state, running)
        for vmid in vmids:
            if (config := state.configs.find(vmid)) is not None:
                names.add(f"vm-{vmid}")
                self._record_vm(now, vmid, config, running.get(vmid))
        self.recorder.keep_only(names)
        for gone in self._sizes.keys() - set(vmids):
            del self._sizes[gone]

    def _record_vm(self, now: float, vmid: int, config: Config, pid: int | None) -> None:
        sizes = self._sizes_of(vmid, config)
        gauges, counters = dict(sizes), {}
        if pid is not None:
            with contextlib.suppress(psutil.Error):  # it ended in this moment
                process = psutil.Process(pid)
                memory, times = process.memory_info().rss, process.cpu_times()
                gauges |= {"mem": memory, "memhost": memory, "netin": 0, "netout": 0}
                counters["cpu"] = (times.user + times.system) / sizes["maxcpu"]
            if vmid in self._disk_bytes:
                counters["diskread"], counters["diskwrite"] = map(float, self._disk_bytes[vmid])
        self.recorder.record(f"vm-{vmid}", now, gauges, counters)

    def _sizes_of(self, vmid: int, config: Config) -> dict[str, float]:
        """What is known of a VM from its configuration alone, worked out once for each."""
        known = self._sizes.get(vmid)
        if known is None or known[0] != config.digest:
            known = self._sizes[vmid] = (config.digest, _sizes(config))
        return known[1]

    def _ask_disks(self, state: State, running: dict[int, int]) -> None:
        for gone in self._disk_bytes.keys() - running.keys():
            self._disk_bytes.pop(gone, None)
        self._asked = {vmid: thread for vmid, thread in self._asked.items() if thread.is_alive()}
        for vmid in running.keys() - self._asked.keys():
            thread = threading.Thread(target=self._ask_disk, args=(state, vmid), name=f"disks:{vmid}", daemon=True)
            self._asked[vmid] = thread
            thread.start()
        deadline = time.monotonic() + _ANSWER_SECONDS
        for thread in self._asked.values():
            thread.join(max(0.0, deadline - time.monotonic()))

    def _ask_disk(self, state: State, vmid: int) -> None:
        monitor = state.monitor(vmid)
        if monitor is None:
            return
        try:
            disks: list[dict[str, Any]] = [each["stats"] for each in monitor.execute("query-blockstats")]
        except MonitorError as error:
            logger.debug("%s", error)
            self._disk_bytes.pop(vmid, None)
            return
        self._disk_bytes[vmid] = sum(each["rd_bytes"] for each in disks), sum(each["wr_bytes"] for each in disks)


def _sizes(config: Config) -> dict[str, float]:
    found: dict[str, float] = {"maxcpu": 1, "disk": 0}
    with contextlib.suppress(Refusal, ValueError, LookupError):  # a file edited by hand
        found["maxcpu"] = int(config.get("vcpus") or int(config.get("cores", "1")) * int(config.get("sockets", "1")))
        found |= {"maxmem": vms.memory_mb(config) << 20, "maxdisk": drives.boot_disk_size(config.values)}
    return found


def _of_node(home: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Gauges and counters; the processors' times are counters, whose rate is their use."""
    memory, swap, disk = psutil.virtual_memory(), psutil.swap_memory(), psutil.disk_usage(str(home))
    processors, times = psutil.cpu_count() or 1, psutil.cpu_times()
    waiting = getattr(times, "iowait", 0.0)
    gauges = {
        "loadavg": psutil.getloadavg()[0],
        "maxcpu": processors,
        "memtotal": memory.total,
        "memused": memory.total - memory.available,
        "memavailable": memory.available,
        "swaptotal": swap.total,
        "swapused": swap.used,
        "roottotal": disk.total,
        "rootused": disk.used,
        "arcsize": 0,
        **dict(_pressures()),
    }
    used = times.user + times.nice + times.system + getattr(times, "irq", 0.0) + getattr(times, "softirq", 0.0)
    counters = {"cpu": used / processors, "iowait": waiting / processors}
    with contextlib.suppress(OSError):  # a sandbox without the interfaces' counters
        cards = [card for name, card in psutil.net_io_counters(pernic=True).items() if name != "lo"]
        counters["netin"] = float(sum(card.bytes_recv for card in cards))
        counters["netout"] = float(sum(card.bytes_sent for card in cards))
    return gauges, counters


def _pressures() -> Iterator[tuple[str, float]]:
    """The kernel's pressure stall figures of the last ten seconds, in percent, where it keeps them."""
    for what in ("cpu", "io", "memory"):
        with contextlib.suppress(OSError, ValueError, LookupError):
            for line in Path("/proc/pressure", what).read_text(encoding="ascii").splitlines():
                kind, average, *_ = line.split()
                if (name := f"pressure{what}{kind}") in _PRESSURES:
                    yield name, float(average.removeprefix("avg10="))
