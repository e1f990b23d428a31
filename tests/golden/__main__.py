"""`python -m tests.golden`: write what is generated now; `git diff` then shows what clients will notice."""

from __future__ import annotations

from tests.golden import OPENAPI, openapi

OPENAPI.write_text(openapi(), encoding="utf-8")
print(f"{OPENAPI} is what the routes are now.")
