"""The head of a request, held to the rules of Proxmox's own server before anything else looks at it.

The rules and their words are those of pve-http-server's AnyEvent.pm: what is too large is dropped without an answer,
what cannot be understood gets a bare error, and a body in chunks is refused.
"""

from __future__ import annotations

import re

from autovibe.node.http.messages import Response

METHODS = ("GET", "POST", "PUT", "DELETE")
MAX_BYTES = 8 << 10
MAX_LINES = 64  # the empty line that ends the head is one of them

_END = re.compile(rb"\n\r?\n")
_REQUEST = re.compile(rb"(\S+) (\S+) HTTP/(\d+)\.(\d+)")
_HEADER = re.compile(rb"([^:\s]+)\s*:\s*(.*)")


class TooLarge(Exception):
    """A head beyond the limits; the connection ends without an answer."""


def find_end(data: bytes) -> int | None:
    """Where the head at the beginning of `data` ends, None while more of it must come."""
    if match := _END.search(data):
        return match.end()
    if len(data) > MAX_BYTES + 4 * MAX_LINES:
        raise TooLarge
    return None


def complaint(head: bytes) -> Response | None:
    """How a head is refused, None when it is fine. Raises TooLarge."""
    first, *lines = [line.removesuffix(b"\r") for line in head.split(b"\n")[:-1]]
    match = _REQUEST.search(first)
    if match is None:
        return _bare(400, "bad request")
    method, url, major, minor = match.groups()
    if major != b"1":
        return _bare(506, f"http protocol version {major.decode()}.{minor.decode()} not supported")
    if re.match(rb"[^/]*@", url):
        return _bare(400, "invalid url")
    if len(lines) >= MAX_LINES or sum(map(len, lines)) >= MAX_BYTES:
        raise TooLarge
    headers: dict[bytes, bytes] = {}
    for line in lines[:-1]:
        header = _HEADER.match(line)
        if header is None and not line[:1].isspace():
            return _bare(506, "unable to parse request header")
        if header is not None:
            headers[header[1].lower()] = header[2].strip()
    if method.decode("latin1") not in METHODS:
        return _bare(501, f"method '{method.decode('latin1')}' not available")
    coding = headers.get(b"transfer-encoding", b"").decode("latin1")
    if coding.lower() == "chunked":
        return _bare(501, "chunked transfer encoding not supported")
    return _bare(501, f"Unknown transfer encoding '{coding}'") if coding else None


def _bare(status: int, reason: str) -> Response:
    return Response(status, reason, closes=True)
