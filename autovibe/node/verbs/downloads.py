"""Files that come to a storage: uploads, downloads from a URL, and what a URL would give.

A file is received under another name, checked, synced and only then renamed to its own, in place of a former one: what
is left of a killed task is removed at the next start.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import hmac
import http.client
import os
import re
import ssl
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from autovibe.node.disks import qemu_img
from autovibe.node.disks.volume import format_of, has_right_ending, partial_file
from autovibe.node.files import sync_directory
from autovibe.node.refusal import Refusal, faulty, not_implemented
from autovibe.node.state import Call, State
from autovibe.node.tasks import Task

_BLOCK = 1 << 20
_SPACE_EVERY = 16 << 20
_IDLE_SECONDS = 30.0
_REDIRECTS = 5
_REFUSED_IN_NAMES = re.compile(r"""[^\x20-\x7e]|["'`$;&|<>*?\\!{}\[\]~^#%]""")
_OPENERS: dict[str, Any] = {"gz": gzip.open, "bz2": bz2.open}


def upload(state: State, call: Call) -> str:
    """Give a received file its place, in a task, after checking its name and, there, its checksum."""
    received = call.upload
    if received is None:
        raise faulty({"filename": "property is missing and it is not optional"})
    try:
        target = _upload_target(state, call, received.filename)
    except BaseException:
        received.path.unlink(missing_ok=True)
        raise

    def work(task: Task) -> None:
        try:
            task.write(f"starting file import from: {received.path}")
            if algorithm := call.get("checksum-algorithm"):
                _verify(received.path, algorithm, call["checksum"], task)
            _check_content(state, call["content"], received.path, target)
            task.write(f"target node: {state.name}")
            task.write(f"target file: {target}")
            task.write(f"file size is: {received.size} bytes")
            _put(received.path, target)
            task.write("finished file import successfully")
        finally:
            with contextlib.suppress(FileNotFoundError):
                received.path.unlink()

    return state.tasks.start(call.actor, "imgcopy", "", work, intent={"upload": str(received.path)})


def _upload_target(state: State, call: Call, filename: str) -> Path:
    storage, content = state.require_storage(call["storage"]), call["content"]
    kind = state.disks.configuration.require(storage).type
    if kind != "dir":
        raise Refusal(f"can't upload to storage type '{kind}'")
    target = _target(state, call, filename)
    _require_content(state, storage, content, f"storage '{storage}' does not support '{content}' content")
    return target


def _target(state: State, call: Call, filename: str) -> Path:
    """Where a file goes, by the name that is left when folders, blanks and the like are taken out of the given one."""
    content = call["content"]
    name = re.sub(r".*[/\\]", "", filename.strip(" "), flags=re.DOTALL)
    if _REFUSED_IN_NAMES.search(name) or name.startswith("."):
        raise faulty({"filename": "invalid characters in filename"})
    name = re.sub(r"[^a-zA-Z0-9_.-]", "_", name)
    if not has_right_ending(content, name) or name.startswith("-"):
        fault = "invalid filename or wrong extension" if content == "import" else "wrong file extension"
        raise faulty({"filename": fault})
    return state.disks.path(f"{call['storage']}:{content}/{name}", must_exist=False)


def _require_content(state: State, storage: str, content: str, fault: str) -> None:
    if content not in state.disks.configuration.require(storage).content:
        raise Refusal(fault)


def _check_content(state: State, content: str, path: Path, target: Path) -> None:
    """An image that would make QEMU read other files is refused before anything can be made of it."""
    if content == "import":
        state.disks.check_import(path, format_of(target))


def _verify(path: Path, algorithm: str, checksum: str, task: Task) -> None:
    task.write(f"calculating checksum ({algorithm})...")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            task.check()
    if not hmac.compare_digest(digest.hexdigest(), checksum.strip().lower()):
        raise Refusal(f"checksum mismatch: got '{digest.hexdigest()}' != expect '{checksum}'")
    task.write("OK, checksum verified")


def _put(path: Path, target: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.replace(target)
    sync_directory(target.parent)


# From a URL


def download(state: State, call: Call) -> str:
    storage, content = state.require_storage(call["storage"]), call["content"]
    kind = state.disks.configuration.require(storage).type
    if kind != "dir":
        raise Refusal(f"can't upload to storage type '{kind}', not a file based storage!")
    _require_content(state, storage, content, f"storage '{storage}' is not configured for content-type '{content}'")
    target = _target(state, call, call["filename"])
    compression = call.get("compression")
    if compression and compression not in _OPENERS:
        raise not_implemented(f"Decompression of '{compression}' is not implemented")

    def work(task: Task) -> None:
        if compression and content != "iso":
            raise Refusal(f"decompression not supported for {content}")
        if target.exists() and not _is_worth_replacing(target, call, task):
            return
        with partial_file(state.disks.incoming(storage, content)) as partial:
            _fetch(state, call, partial, target, task)
            if algorithm := call.get("checksum-algorithm"):
                _verify(partial, algorithm, call["checksum"], task)
            if compression:
                _decompress(state, call, partial, task)
            _check_content(state, content, partial, target)
            task.check()
            _put(partial, target)
        task.write(f"download of '{call['url']}' to '{target}' finished")

    return state.tasks.start(call.actor, "download", target.name, work, intent={"target": str(target)})


def _is_worth_replacing(target: Path, call: Call, task: Task) -> bool:
    """Whether a file that is there is another than the one asked for. Without a checksum nobody can tell: refused."""
    if not call.get("checksum"):
        raise Refusal(f"refusing to override existing file '{target}'")
    try:
        _verify(target, call["checksum-algorithm"], call["checksum"], task)
    except Refusal:
        task.check()
        task.write("mismatch, downloading again")
        return True
    task.write("OK, got correct file already, no need to download")
    return False


def _fetch(state: State, call: Call, partial: Path, target: Path, task: Task) -> None:
    task.write(f"downloading {call['url']} to {target}")
    with _open(call["url"], verifies=bool(call.get("verify-certificates", True))) as answer:
        size = _length(answer)
        state.disks.require_space(call["storage"], size or 0)
        with partial.open("wb") as file:
            done = _copy(state, call, iter(lambda: answer.read(_BLOCK), b""), file, task, size=size)
    if size is not None and done != size:
        raise Refusal(f"download failed: the connection ended after {done} of {size} bytes")


def _copy(state: State, call: Call, blocks: Iterator[bytes], file: IO[bytes], task: Task, *, size: int | None) -> int:
    """Write blocks as they come, as long as there is space; the progress goes to the log in steps of ten percent."""
    done, told, checked = 0, 0, 0
    for block in blocks:
        task.check()
        file.write(block)
        done += len(block)
        if done - checked >= _SPACE_EVERY:
            checked = done
            state.disks.require_space(call["storage"], 0)
        if size and done * 10 // size > told:
            told = done * 10 // size
            task.write(f"{qemu_img.render(done)} of {qemu_img.render(size)} ({told * 10}%)")
    return done


def _decompress(state: State, call: Call, partial: Path, task: Task) -> None:
    task.write("decompressing downloaded file...")
    with partial_file(partial.with_name(f"{partial.name}-plain")) as plain:
        try:
            with _OPENERS[call["compression"]](partial, "rb") as source, plain.open("wb") as file:
                _copy(state, call, iter(lambda: source.read(_BLOCK), b""), file, task, size=None)
        except (EOFError, OSError, zlib.error) as error:
            raise Refusal(f"decompression failed: {error}") from error
        plain.replace(partial)


def metadata(_state: State, call: Call) -> dict[str, Any]:
    """Name, size and type of what a URL gives, asked with HEAD."""
    try:
        with _open(call["url"], method="HEAD", verifies=bool(call.get("verify-certificates", True))) as answer:
            size, kind = _length(answer), answer.headers.get("Content-Type", "").partition(";")[0].strip()
            name = _filename(answer.headers.get("Content-Disposition", ""), call["url"])
    except UnicodeError as error:
        raise Refusal(f"invalid server response: {error}") from None
    found = {"filename": name, "size": size, "mimetype": kind}
    return {key: value for key, value in found.items() if value}


def _filename(disposition: str, url: str) -> str:
    match = re.search(r'filename="([^"]*)"', disposition) or re.search(r"filename=([^;]*)", disposition)
    return match[1].strip() if match else urlsplit(url).path.rpartition("/")[2]


def _length(answer: http.client.HTTPResponse) -> int | None:
    text = answer.headers.get("Content-Length", "")
    return int(text) if re.fullmatch(r"[0-9]{1,30}", text) else None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a few redirects, to HTTP only."""

    max_redirections = _REDIRECTS
    max_repeats = _REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise Refusal(f"download failed: redirected to '{newurl}', which is not HTTP")
        found = super().redirect_request(req, fp, code, msg, headers, newurl)
        if found is not None and req.get_method() == "HEAD":
            found.method = "HEAD"
        return found


@contextlib.contextmanager
def _open(url: str, *, verifies: bool, method: str = "GET") -> Iterator[http.client.HTTPResponse]:
    """The answer to a request. Raises the refusal of everything that can go wrong with it, also while it is read."""
    context = ssl.create_default_context()
    if not verifies:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=context),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    headers = {"User-Agent": "Proxmox VE", "Accept-Encoding": "identity"}
    try:
        request = urllib.request.Request(url, method=method, headers=headers)  # noqa: S310 - only HTTP has a handler
        with opener.open(request, timeout=_IDLE_SECONDS) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        error.close()
        raise Refusal(f"invalid server response: '{error.code} {_plain(error.reason)}'") from None
    except urllib.error.URLError as error:
        raise Refusal(f"download failed: {_plain(error.reason)}") from None
    except (http.client.error, ValueError, TimeoutError, ConnectionError, ssl.SSLError) as error:
        raise Refusal(f"download failed: {_plain(error) or type(error).__name__}") from None


def _plain(what: object) -> str:
    """An error's text for a status line; of one of the system's, what it means."""
    return re.sub(r"[^\x20-\x7e]+", " ", str(getattr(what, "strerror", None) or what))[:200]
