"""Stores for tests: an S3 server on loopback, reached through a door that can break its answers."""

from __future__ import annotations

import atexit
import functools
import http.client
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, Literal

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

# Of a request: an error of the server's; the connection is closed before the answer, or in the middle of it.
Fault = Literal["500", "drop", "truncate"]
SERVER = (
    "from moto.server import ThreadedMotoServer; import sys\n"
    "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0); server.start()\n"
    "print(server.get_host_and_port()[1], flush=True); sys.stdin.read()"
)


class Kept(MemoryFileSystem):
    """A store in this process's memory, by a name of its own: `memory://` is refused where a run would write to it."""

    protocol = "kept"
    store: ClassVar[dict[str, object]] = {}
    pseudo_dirs = [""]  # noqa: RUF012  # as the class that it is of has it

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("kept://")))


fsspec.register_implementation("kept", "tests.stores.Kept")


class Door(ThreadingHTTPServer):
    """Hands requests on to a server and its answers back, unless `fault` says otherwise.

    Attributes:
        fault: of a request's method and path; None lets it pass.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = port
        self.fault: Callable[[str, str], Fault | None] = lambda method, path: None
        self.faults = 0

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no error of a test's."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Door

    def _pass(self) -> None:
        body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(
            int(self.headers.get("Content-Length", 0)))  # fmt: skip
        fault = self.server.fault(self.command, self.path)
        self.server.faults += fault is not None
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "500":
            self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
            return
        headers = {key: value for key, value in self.headers.items() if key != "Transfer-Encoding"}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        content = answer.read()
        self._answer(answer.status, dict(answer.getheaders()), content, cut=fault == "truncate")
        connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass  # noqa: N815  as http.server calls them

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return found

    def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        length = headers.get("Content-Length", str(len(content)))
        for key, value in headers.items():
            if key.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(key, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


@functools.cache
def _server() -> int:
    """The port of a server that all tests of this process share."""
    pipe = subprocess.PIPE  # its input ends with this process
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    )
    atexit.register(server.kill)
    assert server.stdout is not None
    return int(next(line for line in server.stdout if line.strip().isdecimal()))


@contextmanager
def s3(monkeypatch: pytest.MonkeyPatch, bucket: str) -> Iterator[Door]:
    """An S3 server with a bucket, which the environment of this process and its children names."""
    for package in ("s3fs", "moto.server", "flask"):
        pytest.importorskip(package, reason="pip install -e .[dev] runs this test")
    monkeypatch.setattr("botocore.retryhandler.delay_exponential", lambda **_: 0.001)  # else up to seconds a fault
    door = Door(_server())
    threading.Thread(target=door.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{door.server_address[1]}"
    for key, value in {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
                       "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    fsspec.filesystem("s3").clear_instance_cache()  # of another test's server
    for method, path in (("POST", "moto-api/reset"), ("PUT", bucket)):  # nothing is left of another test's
        urllib.request.urlopen(urllib.request.Request(f"{url}/{path}", method=method)).close()
    try:
        yield door
    finally:
        door.shutdown()
        door.server_close()
