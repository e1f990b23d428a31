"""A multipart body taken in as it arrives: the fields into memory, the one file straight to the disk."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from autovibe.node.refusal import Refusal, faulty
from autovibe.node.state import Upload

_FIELD_BYTES = 16 << 10
_SPARE_BYTES = 256 << 20
"""Free space that an upload must leave: running VMs are not to meet a full disk."""
_SPACE_EVERY = 16 << 20


def receive(content_type: str, body: Iterable[bytes], directory: Path) -> tuple[dict[str, str], Upload | None]:
    """The fields, and the file of the field `filename` under a temporary name in `directory`."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise _failed(f"upload 'Content-Type '{content_type}' not implemented")
    parts = _Parts(directory)
    try:
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        for block in body:
            parser.write(block)
        parser.finalize()
    except MultipartParseError as error:
        parts.discard()
        raise _failed(f"upload failed - {error}") from None
    except OSError as error:
        parts.discard()
        raise Refusal(f"upload failed - {error.strerror}") from error
    except BaseException:
        parts.discard()
        raise
    if not parts.is_complete:
        parts.discard()
        raise _failed("upload failed")
    return parts.fields, parts.upload()


def _failed(reason: str) -> Refusal:
    """As the real one's server refuses an upload it cannot read, before the API has seen it."""
    return Refusal(reason, status=501, is_bare=True)


class _Parts:
    """What the parser calls as the parts come by."""

    def __init__(self, directory: Path) -> None:
        self.fields: dict[str, str] = {}
        self.is_complete = False
        self._directory = directory
        self._header, self._value = b"", b""
        self._headers: dict[str, bytes] = {}
        self._name, self._filename = "", ""
        self._text = b""
        self._file: BinaryIO | None = None
        self._path: Path | None = None
        self._size = 0

    def callbacks(self) -> dict[str, Callable[..., Any]]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._add_header,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": self._take,
            "on_part_end": self._close,
            "on_end": self._finish,
        }

    def upload(self) -> Upload | None:
        return Upload(self._filename, self._path, self._size) if self._path else None

    def discard(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _begin(self) -> None:
        self._headers, self._text, self._name = {}, b"", ""

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header.decode("latin1").lower()] = self._value
        self._header, self._value = b"", b""

    def _open(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        if filename is None:
            return
        if self._name != "filename" or self._path is not None:
            raise _failed(f"wrong field name '{self._name}' for file upload, expected 'filename'")
        self._filename = filename.decode("utf-8", "replace")
        self._path = self._directory / f"upload-{secrets.token_hex(8)}"
        _require_space(self._directory)
        self._file = self._path.open("xb")

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])
            if self._size // _SPACE_EVERY != (self._size + end - start) // _SPACE_EVERY:
                _require_space(self._directory)
            self._size += end - start
            return
        self._text += data[start:end]
        if len(self._text) > _FIELD_BYTES:
            raise faulty({self._name or "content": "value is too long"})

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        elif self._name:
            self.fields[self._name] = self._text.decode("utf-8", "replace").strip()

    def _finish(self) -> None:
        self.is_complete = True


def _require_space(directory: Path) -> None:
    told = os.statvfs(directory)
    if told.f_bavail * told.f_frsize < _SPARE_BYTES:
        raise Refusal("upload failed - No space left on device")
