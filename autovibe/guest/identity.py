"""Makes a cloned guest somebody of its own: hostname, machine-id, SSH host keys, clock."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING
from uuid import UUID

from autovibe.errors import GuestCommandFailed
from autovibe.guest import program
from autovibe.guest.keys import HOST_KEY_TYPE
from autovibe.guest.links import Address, HostKeyChanged

if TYPE_CHECKING:
    from autovibe.guest.pool import Guests

_KEY = re.compile(rf"{HOST_KEY_TYPE} [A-Za-z0-9+/]{{68}}")  # it ends in a row and in known_hosts files


def identify(guests: Guests, address: Address, hostname: str, *, machine_uuid: UUID | str | None = None) -> str:
    """Give the guest its own identity, once an instance, in one round trip; returns its host key after.

    The instance is `machine_uuid`, else the VM's own firmware uuid with the hostname. A marker in the guest tells
    what was done, so that a second call changes nothing. Host keys are made anew only when they are older than this
    boot, which means that they are the parent's: cloud-init renews them at the first boot of an instance it does not
    know. The pool's connections are kept, under the new key.
    """
    try:
        return _identify(guests, address, hostname, str(machine_uuid or ""))
    except HostKeyChanged:
        # The keys were made anew and the Hub died before it took note: this is a first contact again.
        seen = guests.reach(address.host, address.port, address.user)
        return _identify(guests, address.with_key(seen), hostname, str(machine_uuid or ""))


def _identify(guests: Guests, address: Address, hostname: str, instance: str) -> str:
    order = {
        "instance": instance,
        "hostname": hostname,
        "host_key": address.host_key,
        "now": time.time(),
    }
    answer = program.run(guests, address, "identify", order, timeout_seconds=120)
    host_key = str(answer.get("host_key", ""))
    if not _KEY.fullmatch(host_key):
        raise GuestCommandFailed(f"The guest at {address} tells no SSH host key of its own.")
    guests.repin(address, host_key)
    return host_key
