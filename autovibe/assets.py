"""Where the files that travel with autovibe lie: playbooks, inventories and image recipes."""

from pathlib import Path


def asset(kind: str) -> Path:
    """The directory of `kind` ("playbooks", "inventories" or "images").

    In an installed wheel it is `autovibe/assets/<kind>`; in a checkout, the directory at the top of the project.
    """
    package = Path(__file__).resolve().parent
    installed = package / "assets" / kind
    return installed if installed.is_dir() else package.parent / kind
