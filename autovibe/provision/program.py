"""The program of one run, `program.py RUN`: carries out RUN/order.json by ansible-runner."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ansible_runner

HIDDEN = "[hidden]"
SHORTEST_SECRET = 6
SECRET_NAMES = ("secret", "password", "passwd", "token", "api_key", "apikey", "private_key", "credential")


def secrets_of(variables: Any, name: str = "") -> set[str]:
    """The texts among the variables whose names say that they are secret."""
    if isinstance(variables, dict):
        return {text for key, value in variables.items() for text in secrets_of(value, f"{name} {key}".lower())}
    if isinstance(variables, list):
        return {text for value in variables for text in secrets_of(value, name)}
    is_secret = any(word in name for word in SECRET_NAMES)
    return {str(variables)} if is_secret and len(str(variables)) >= SHORTEST_SECRET else set()


def masked(value: Any, secrets: set[str]) -> Any:
    """The value with every secret in its texts replaced."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        return value
    if isinstance(value, dict):
        return {masked(key, secrets): masked(each, secrets) for key, each in value.items()}
    if isinstance(value, list):
        return [masked(each, secrets) for each in value]
    return value


def main() -> int:
    run = Path(sys.argv[1])
    order = json.loads((run / "order.json").read_text(encoding="utf-8"))
    secrets = secrets_of(json.loads((run / "env/extravars").read_text(encoding="utf-8")))

    def keep(event: dict[str, Any]) -> bool:
        if secrets:
            event.update(masked(dict(event), secrets))
        return True

    result = ansible_runner.run(
        private_data_dir=str(run),
        ident="run",
        project_dir=order["project_dir"],
        playbook=order["playbook"],
        inventory=str(run / "inventory/hosts.json"),
        event_handler=keep,
        quiet=True,
        settings={"suppress_output_file": True, "pexpect_use_poll": True, "pexpect_timeout": 1},
    )
    return 0 if result.status == "successful" else 1


if __name__ == "__main__":
    sys.exit(main())
