"""Which accelerator guests run under: KVM only where a probe boot under it works, else TCG.

A machine can have `/dev/kvm` and still not boot a guest: without hardware support below it (nested or paravirtual KVM)
QEMU may refuse the CPU, or the guest's kernel may crawl a thousand times slower than under TCG. So a boot sector does
what a kernel does first (long mode, paging, arithmetic on memory, timer interrupts that wake a halted CPU) and must be
done in a time of which real KVM needs a twentieth.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path

from autovibe.node.disks.volume import write_durably

_PROBE_SECONDS = 4.0
"""Measured: 0.12 s under TCG, 12 s under a KVM (kvm_pvm) on which Linux did not finish unpacking itself in 30 s."""

_SUCCESS = 43
"""QEMU's exit status when the guest writes 0x15 to isa-debug-exit: 0x15 * 2 + 1."""

# probe.S beside this file, made by: as --64 probe.S -o probe.o
# ld -m elf_x86_64 -Ttext 0x7c00 --oformat binary -o probe.bin probe.o
_BOOT_SECTOR = (
    bytes.fromhex(
        "fa31c08ed88ec08ed0bc007cb052e8940066bf001000006631c066b90010000066f3ab66c70600100320000066c70600200330000066c706"
        "00300340000066c70608308300200066bf0040000066b803000000676689076605001000006683c7086681ff0050000072e90f0116607d0f"
        "20e0660da00000000f22e066b8001000000f22d866b9800000c00f32660d000100000f300f20c0660d010000800f22c0eaaa7c0800baf803"
        "eec3b04c66baf803ee0f20d80f22d80f013c250050000031c00fa2b980841e0089c825f80f000048018800001000ffc975eeb8457d000066"
        "8904250052000066c7042502520000080066c7042504520000008ec1e81066890425065200000f011c25667d0000b011e620b020e621b004"
        "e621b001e621b0fee621b034e643b09ce640b02ee64031dbfbf483fb0572fab05466baf803eeb015e6f4f4ebfdffc350b020e6205848cf90"
        "000000000000000000000000009a20000f00507d00000f020050"
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)


def probe(home: Path, *, kvm: Path = Path("/dev/kvm")) -> str:
    """`kvm` or `tcg`. What was found is kept in `home`, and tried again under another kernel, QEMU or processor."""
    if not os.access(kvm, os.R_OK | os.W_OK):
        return "tcg"
    cache, key = home / "accel.json", _fingerprint()
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
        if known["key"] == key and known["accel"] in ("kvm", "tcg"):
            return str(known["accel"])
    except (OSError, ValueError, LookupError, TypeError):
        pass  # never tried, or a file of another version: try
    accel = "kvm" if boots("kvm", "host") else "tcg"
    write_durably(cache, {"key": key, "accel": accel})
    return accel


def boots(accel: str, cpu: str, *, seconds: float = _PROBE_SECONDS) -> bool:
    """Whether the probe's boot sector comes to its end in time."""
    with tempfile.NamedTemporaryFile(prefix="autovibe-probe-") as disk:
        disk.write(_BOOT_SECTOR)
        disk.flush()
        file = {"driver": "file", "filename": disk.name}
        # fmt: off
        argv = [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "64",
            "-accel", accel, "-cpu", cpu, "-device", "isa-debug-exit,iobase=0xf4,iosize=4",
            "-blockdev", json.dumps({"driver": "raw", "node-name": "probe", "file": file}),
            "-device", "ide-hd,drive=probe",
        ]
        # fmt: on
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False)
        except (subprocess.TimeoutExpired, OSError):
            return False
    return done.returncode == _SUCCESS


def _fingerprint() -> str:
    try:
        told = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, timeout=10, check=False).stdout
        cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    except (OSError, subprocess.TimeoutExpired):
        told, cpu = b"", ""
    parts = (platform.release().encode(), told, cpu.encode(), _BOOT_SECTOR)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()
