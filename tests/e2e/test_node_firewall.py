"""A real guest whose outbound policy is DROP: it reaches nothing, and is still reached over SSH."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from autovibe.node.vm.qemu import forward_address
from tests.contract.node_parts import Client
from tests.e2e.guest_node import DEBIAN, Guest, N, give_image, wait_for

VMID = 100
GATEWAY = "10.0.2.2"
"""Where a guest's user network has the host."""


def greeting(client: Client) -> bytes:
    """What the guest's SSH server says first, through the forward."""
    try:
        with socket.create_connection((forward_address(VMID), client.node.state.qemu.forward_port), 10) as connection:
            return connection.recv(4)
    except OSError:
        return b""


@pytest.mark.guest
def test_a_guest_without_a_way_out(client: Client, guest_image: Path) -> None:
    """The card without `firewall=1` stands beside it as the control: through it the host is reached."""
    image = give_image(client.node.state.home, guest_image)
    nets = {"net0": "virtio,bridge=vmbr0,firewall=1", "net1": "virtio,bridge=vmbr0"}
    client.do("POST", f"{N}/qemu", vmid=VMID, **{**DEBIAN, **nets}, scsi0=f"local-lvm:0,import-from={image}")
    for at in (f"{N}/qemu/{VMID}/firewall/options", "/cluster/firewall/options"):
        assert client.ask("PUT", at, {"enable": 1}).status == 200
    assert client.ask("PUT", f"{N}/qemu/{VMID}/firewall/options", {"policy_out": "DROP"}).status == 200
    client.do("POST", f"{N}/qemu/{VMID}/status/start")
    guest = Guest(client, VMID)
    guest.await_agent()
    wait_for(lambda: greeting(client) == b"SSH-", 120, "SSH through the forward")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connect = (
            "import socket, sys; s = socket.socket(); s.settimeout(5); "
            "s.setsockopt(socket.SOL_SOCKET, 25, sys.argv[1].encode()); "  # 25 is SO_BINDTODEVICE
            f"print(s.connect_ex(('{GATEWAY}', {listener.getsockname()[1]})))"
        )
        first, second = guest.run("ls /sys/class/net | grep -v ^lo | sort").split()
        guest.run(f"ip link set {second} up; ip address add 10.0.2.77/24 dev {second} || true")
        assert guest.run(f'python3 -c "{connect}" {first}') != "0"
        assert guest.run(f'python3 -c "{connect}" {second}') == "0"
