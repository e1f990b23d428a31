"""Files a storage fetches from a URL: a site of the test's own, and all that may go wrong on the way."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autovibe.node.http import certificate
from tests.contract.node_parts import Answer, Client
from tests.contract.test_node_storage import MIB, L, N, faults, fill_disk, image, leftovers


class Site(http.server.BaseHTTPRequestHandler):
    """Files of a test; `/loop` leads to itself, `/hop` to `/x.iso`, `/file` to a file of the host."""

    files: dict[str, bytes] = {}
    sent = threading.Event()
    go_on = threading.Event()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        target = {"/loop": "/loop", "/hop": "/x.iso", "/file": "file:///etc/passwd", "/ftp": "ftp://127.0.0.1/x"}.get(
            path
        )
        if target is not None:
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
            return
        data = self.files.get(path)
        self.send_response(200 if data is not None else 404)
        if data is None:
            self.end_headers()
            return
        self.send_header("Content-Type", "application/octet-stream; charset=x")
        size = {"/huge.iso": 1 << 60, "/short.iso": len(data) + 9, "/slow.iso": len(data) * 2}.get(path, len(data))
        self.send_header("Content-Length", str(size))
        if path == "/named":
            self.send_header("Content-Disposition", 'attachment; filename="other.iso"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
        if path == "/slow.iso":
            self.sent.set()
            self.go_on.wait(60)
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def site() -> Iterator[str]:
    Site.files = dict.fromkeys(("/x.iso", "/named", "/huge.iso", "/short.iso"), b"i" * 300000)
    Site.files["/slow.iso"] = b"s" * (2 << 20)
    Site.sent.clear()
    Site.go_on.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Site.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class TestDownloads:
    def fetch(self, client: Client, url: str, name: str = "x.iso", **fields: Any) -> Answer:
        return client.ask("POST", f"{L}/download-url", {"url": url, "content": "iso", "filename": name, **fields})

    def test_with_a_checksum(self, client: Client, site: str) -> None:
        good = {"checksum": hashlib.sha256(b"i" * 300_000).hexdigest(), "checksum-algorithm": "sha256"}
        answer = self.fetch(client, f"{site}/hop", **good)
        assert ":download:x.iso:" in answer.data
        assert client.end_of(answer.data) == "OK"
        assert client.get(f"{L}/content")[0]["size"] == 300_000
        log = client.log(answer.data)
        assert any("(100%)" in line for line in log), log
        assert log[-2].startswith("download of '")
        assert client.end_of(self.fetch(client, f"{site}/x.iso", **good).data) == "OK"
        unchecked = client.end_of(self.fetch(client, f"{site}/x.iso").data)
        assert unchecked.startswith("refusing to override existing file")
        bad = {"checksum": "00", "checksum-algorithm": "md5"}
        assert client.end_of(self.fetch(client, f"{site}/x.iso", "y.iso", **bad).data).startswith("checksum mismatch")
        assert leftovers(client) == []

    @pytest.mark.parametrize(
        ("path", "text"),
        [
            ("/none.iso", "invalid server response: '404 Not Found'"),
            ("/loop", "infinite loop"),
            ("/file", "'file:///etc/passwd' is not allowed"),
            ("/ftp", "which is not HTTP"),
            ("/huge.iso", "not enough free space"),
            ("/short.iso", "download failed"),
        ],
    )
    def test_what_goes_wrong(self, client: Client, site: str, path: str, text: str) -> None:
        assert text in client.end_of(self.fetch(client, f"{site}{path}").data)
        assert client.get(f"{L}/content") == []
        assert leftovers(client) == []

    def test_nobody_there(self, client: Client) -> None:
        assert client.end_of(self.fetch(client, "http://127.0.0.1:9/x.iso").data).startswith("download failed: ")

    @pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "gopher://x", "//x/y"])
    def test_only_http(self, client: Client, url: str) -> None:
        assert faults(self.fetch(client, url)) == {"url": "value does not match the regex pattern"}

    def test_it_can_be_stopped(self, client: Client, site: str) -> None:
        upid = self.fetch(client, f"{site}/slow.iso").data
        assert Site.sent.wait(30)
        assert client.ask("DELETE", f"{N}/tasks/{upid}").status == 200
        Site.go_on.set()
        assert client.end_of(upid) == "received interrupt"
        assert leftovers(client) == []

    @pytest.mark.parametrize(("compression", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress)])
    def test_compressed(self, client: Client, site: str, compression: str, pack: Callable[[bytes], bytes]) -> None:
        Site.files["/x.iso.z"] = pack(b"z" * 100_000)
        assert client.end_of(self.fetch(client, f"{site}/x.iso.z", compression=compression).data) == "OK"
        assert client.node.state.disks.path("local:iso/x.iso").read_bytes() == b"z" * 100_000
        broken = self.fetch(client, f"{site}/x.iso", "y.iso", compression=compression)
        assert client.end_of(broken.data).startswith("decompression failed")
        assert self.fetch(client, f"{site}/x.iso", "y.iso", compression="zst").status == 501
        assert leftovers(client) == []

    def test_hostile_images(self, client: Client, site: str, tmp_path: Path) -> None:
        (tmp_path / "secret").write_bytes(b"s" * MIB)
        backed = image(tmp_path / "a.qcow2", "-b", str(tmp_path / "secret"), "-F", "raw")
        Site.files["/a.qcow2"] = backed.read_bytes()
        fields = {"url": f"{site}/a.qcow2", "content": "import", "filename": "a.qcow2"}
        assert "has a backing file" in client.run("POST", f"{L}/download-url", **fields)
        assert leftovers(client) == []

    def test_the_disk_fills(self, client: Client, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
        fill_disk(monkeypatch)
        assert "not enough free space" in client.end_of(self.fetch(client, f"{site}/x.iso").data)
        assert leftovers(client) == []

    def test_not_on_a_thin_pool(self, client: Client, site: str) -> None:
        fields = {"url": f"{site}/x.iso", "content": "iso", "filename": "x.iso"}
        answer = client.ask("POST", f"{N}/storage/local-lvm/download-url", fields)
        assert answer.reason == "can't upload to storage type 'lvmthin', not a file based storage!"

    def test_certificates_are_verified(self, client: Client, tmp_path: Path) -> None:
        Site.files = {"/x.iso": b"tls"}
        home = tmp_path / "site"
        home.mkdir()
        certificate.load(home, "127.0.0.1")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*sorted(home.glob("*.pem"), key=lambda path: "key" in path.name))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        url = f"https://127.0.0.1:{server.server_port}/x.iso"
        try:
            assert "certificate verify failed" in client.end_of(self.fetch(client, url).data).lower()
            assert client.end_of(self.fetch(client, url, **{"verify-certificates": 0}).data) == "OK"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def test_what_a_url_would_give(self, client: Client, site: str) -> None:
        ask = lambda path: client.get(f"{N}/query-url-metadata", url=f"{site}{path}")  # noqa: E731
        assert ask("/x.iso?a=b") == {"filename": "x.iso", "size": 300_000, "mimetype": "application/octet-stream"}
        assert ask("/hop")["filename"] == "hop"
        assert ask("/named")["filename"] == "other.iso"
        missing = client.ask("GET", f"{N}/query-url-metadata", {"url": f"{site}/none"})
        assert (missing.status, missing.reason) == (500, "invalid server response: '404 Not Found'")
