"""The Hub's SSH key and the form of host keys: ed25519 only, since a handshake under emulation costs a second as it
is.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import secrets
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from autovibe.errors import ConfigurationError

HOST_KEY_TYPE = "ssh-ed25519"


def generate_key(path: Path) -> str:
    """The public key line of the key at `path`, which is made (mode 0600, with `<path>.pub`) where there is none.

    Two processes that do this at once end up with the same key.
    """
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another process was first; its key is the key
                os.link(temporary, path)
        finally:
            temporary.unlink()
    line = public_line(path)
    public = path.with_name(path.name + ".pub")
    if not public.exists():
        public.write_text(line + "\n", encoding="utf-8")
    return line


def public_line(path: Path) -> str:
    """`ssh-ed25519 AAAA… autovibe` of the private key at `path`. Raises ConfigurationError for what is no ed25519
    key.
    """
    try:
        key = load_ssh_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"The SSH key '{path}' cannot be read: {error}.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError(f"The SSH key '{path}' is no ed25519 key; name another file in ssh_key_file.")
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")
    return f"{public} autovibe"


def fingerprint(host_key: str) -> str:
    """`SHA256:…` of a host key line, as ssh-keygen -l prints it."""
    try:
        blob = base64.b64decode(host_key.split()[1], validate=True)
    except (IndexError, ValueError):
        return "no key"
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode("ascii").rstrip("=")
