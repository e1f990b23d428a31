"""The npm package proxmox-api: login with a password and with a token, bodies as undici's fetch sends them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from tests.clients.parts import HERE, NODE, Lab, node_modules


def test_proxmox_api_drives_it(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(node_modules() / "node_modules")
    shutil.copy(HERE / "npm" / "drive.mjs", tmp_path)
    user, name, secret = lab.token
    given = {"host": "127.0.0.1", "port": lab.node.port, "user": user, "password": lab.password}
    given |= {"tokenId": f"{user}!{name}", "tokenSecret": secret}
    result = subprocess.run(
        ["node", "drive.mjs"],
        cwd=tmp_path,
        env=lab.environment,
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert seen["version"]["version"].startswith("9.2")
    assert seen["nextid"] == "100"
    assert [seen[name] for name in ("created", "started", "stopped", "deleted")] == ["OK"] * 4
    assert (seen["config"]["name"], seen["config"]["onboot"]) == ("from-npm", 1)
    assert seen["config"]["protection"] == 0
    assert seen["changed"] is None
    assert {"key": "name", "value": "from-npm"} in seen["pending"]
    assert (seen["current"]["onboot"], seen["current"]["description"]) == (0, "gr\u00fc\u00dfe\nzwei")
    assert seen["running"] == "running"
    assert "Error 500 VM 100 is running - destroy failed: {" in seen["refused"]
    assert "Error 400 Parameter verification failed.: {" in seen["unknown"]
    assert '"nonsense":"property is not defined in schema' in seen["unknown"]
    assert "Error 500 No QEMU guest agent configured" in seen["agent"]
    assert seen["listed"] == ["from-npm"]
    assert seen["wrong"].endswith("/access/ticket Failed!")
    assert lab.client.get(f"/nodes/{NODE}/qemu") == []
