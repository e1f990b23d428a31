"""A password as Proxmox keeps it in a VM's configuration: SHA-256 crypt (`$5$…`), which every guest's libc reads.

The scheme is Ulrich Drepper's "Unix crypt using SHA-256 and SHA-512", with its default of 5000 rounds.
"""

from __future__ import annotations

import hashlib
import re
import secrets

_ALPHABET = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_HASHED = re.compile(r"\$(?:[156y]|2[ay])(\$.+){2,3}")
_ROUNDS = 5000
_SALT_CHARACTERS = 16


def hashed(password: str) -> str:
    """The hash of a password; what is one already stays as it is."""
    if _HASHED.fullmatch(password):
        return password
    return sha256_crypt(password, "".join(secrets.choice(_ALPHABET) for _ in range(_SALT_CHARACTERS)))


def sha256_crypt(password: str, salt: str) -> str:
    key, grain = password.encode(), salt.encode()
    b = hashlib.sha256(key + grain + key).digest()
    mixed = key + grain + _stretched(b, len(key))
    bits = len(key)
    while bits:
        mixed += b if bits & 1 else key
        bits >>= 1
    a = hashlib.sha256(mixed).digest()
    p = _stretched(hashlib.sha256(key * len(key)).digest(), len(key))
    s = _stretched(hashlib.sha256(grain * (16 + a[0])).digest(), len(grain))
    for number in range(_ROUNDS):
        data = p if number % 2 else a
        data += s if number % 3 else b""
        data += p if number % 7 else b""
        data += a if number % 2 else p
        a = hashlib.sha256(data).digest()
    return f"$5${salt}${_encode(a)}"


def _stretched(digest: bytes, length: int) -> bytes:
    return (digest * (length // len(digest) + 1))[:length]


def _encode(digest: bytes) -> str:
    """The digest's bytes three by three, in the order the scheme gives them, as 64 characters."""
    text = ""
    order = (0, 10, 20)
    for _ in range(10):
        text += _characters(digest[order[0]] << 16 | digest[order[1]] << 8 | digest[order[2]], 4)
        order = (order[2] + 1, order[0] + 1, order[1] + 1)
    return text + _characters(digest[31] << 8 | digest[30], 3)


def _characters(value: int, count: int) -> str:
    return "".join(_ALPHABET[value >> 6 * place & 63] for place in range(count))
