"""What the project generates and others rely on, as it was when somebody last looked. Renew: python -m tests.golden"""

from __future__ import annotations

import json
from pathlib import Path

from fastapi import FastAPI

from autovibe.api import v1

OPENAPI = Path(__file__).with_name("openapi.json")


def openapi() -> str:
    """The document of the v1 API, without the version, which changes with every release."""
    app = FastAPI(title="autovibe", version="0")
    v1.mount(app)
    return json.dumps(app.openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
