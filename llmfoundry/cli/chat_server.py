"""`llmfoundry chat --web`: a chat page and OpenAI's API, for this machine only.

The server listens on the loopback address. A request must name that address as its host, and if a browser says which
site it comes from, it must be this one. So other websites cannot use it, not even by a name that resolves to 127.0.0.1.
Answers are written one at a time; the page keeps the conversation and is a client of the API.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import logging
import re
import select
import socket
import threading
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import TYPE_CHECKING

from llmfoundry.cli.chat_request import ChatRequest, parse_request
from llmfoundry.config import ConfigError

if TYPE_CHECKING:
    from llmfoundry.eval.chat import Answer, Chat
    from llmfoundry.eval.generate import Sampling

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MOST_BYTES = 2**23  # maximum size of a request
_REASONS = {"stop": "stop", "length": "length", "interrupted": "stop"}
Json = dict[str, object]


class Server(ThreadingHTTPServer):
    """Serves one model.

    Args:
        how: sampling settings for requests that do not set them.
        system: the system message with which the page starts.
        name: the model's name in the API.
        port: 0: any free port.

    Raises:
        ConfigError: if the port is in use.
    """

    daemon_threads = True

    def __init__(self, chat: Chat, how: Sampling, system: str, name: str, port: int) -> None:
        self.chat, self.how, self.name = chat, how, name
        self.turn = threading.Lock()  # held while an answer is written
        self.page = _page(how, system)
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise ConfigError(f"--port {port}: cannot be used ({error.strerror}); choose another one") from None
        self.hosts = {f"{host}:{self.server_port}" for host in (LOOPBACK, "localhost")}

    @property
    def url(self) -> str:
        """The URL of the page."""
        return f"http://{LOOPBACK}:{self.server_port}"


def serve(chat: Chat, how: Sampling, system: str, *, name: str, port: int) -> None:
    """Serve until Ctrl-C; arguments and errors are those of `Server`."""
    with Server(chat, how, system, name, port) as server:
        print(f"open {server.url} in a browser on this machine; the API is {server.url}/v1; Ctrl-C ends", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _page(how: Sampling, system: str) -> bytes:
    text = files("llmfoundry.cli").joinpath("assets/chat.html").read_text(encoding="utf-8")
    for key, value in {**how._asdict(), "system": system}.items():
        text = text.replace(f"{{{key}}}", html.escape(str(value)), 1)
    return text.encode()


def _policy(page: bytes) -> str:
    """Return a content security policy that runs only the page's own script and loads nothing."""
    (script,), (style,) = (
        [hashlib.sha256(found).digest() for found in re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)]
        for tag in (b"script", b"style")
    )
    said = {"script-src": script, "style-src": style}
    hashes = "; ".join(f"{what} 'sha256-{base64.b64encode(digest).decode()}'" for what, digest in said.items())
    return f"default-src 'none'; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'; {hashes}"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    began = False  # whether the status has been sent

    def do_GET(self) -> None:
        if not self._allowed():
            return
        if self.path == "/":
            page = self.server.page
            self._send(200, page, "text/html; charset=utf-8", {"Content-Security-Policy": _policy(page)})
        elif self.path == "/v1/models":
            model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "llmfoundry"}
            self._send_json(200, {"object": "list", "data": [model]})
        else:
            self._refuse(404, f"{self.path}: there are only /, /v1/models and /v1/chat/completions")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return self._refuse(413, f"Content-Length must be there, and at most {MOST_BYTES}")
        body = self.rfile.read(int(length))
        if not self._allowed():
            return
        if self.path != "/v1/chat/completions":
            return self._refuse(404, f"{self.path}: only /v1/chat/completions takes a POST")
        if self.headers.get_content_type() != "application/json":
            return self._refuse(415, "Content-Type must be application/json")
        try:
            request = parse_request(body)
            if request.model not in (None, self.server.name):
                raise ConfigError(f"model: {request.model} is not served; {self.server.name} is")
            with self.server.turn:
                self._answer(request)
        except ConfigError as error:
            self._refuse(400, str(error))
        except ConnectionError:
            self.close_connection = True  # the client has disconnected
        except Exception as error:
            self._refuse(500, f"{type(error).__name__}: see the server's terminal")
            raise

    def _answer(self, request: ChatRequest) -> None:
        head: Json = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.server.name}
        stream = _Events(self._begin_stream, self._event, head)
        answer = self.server.chat.answer(
            request.conversation,
            request.sampling(self.server.how),
            emit=stream.text if request.stream else lambda piece: None,
            until=request.endings,
            interrupted=lambda: _has_left(self.connection),
        )
        usage = _usage(answer)
        reason = _REASONS[answer.finish]
        if request.stream:
            stream.end(reason, usage if request.stream_options.include_usage else None)
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            message = {"role": "assistant", "content": answer.text}
            choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
            self._send_json(200, {**head, "object": "chat.completion", "choices": [choice], "usage": usage})

    def _allowed(self) -> bool:
        """Return whether the request comes from this site or from a program; if not, answer it with an error."""
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        if host in self.server.hosts and (origin is None or origin in {f"http://{each}" for each in self.server.hosts}):
            return True
        self._refuse(403, "only requests from this machine's own page and programs are answered")
        return False

    def _refuse(self, status: int, message: str) -> None:
        """Answer with an error; in a stream that has started, as its last event."""
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error: Json = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        if self.began:
            self._event(error)
        else:
            self._send_json(status, error)

    def _begin_stream(self) -> None:
        self._head(200, "text/event-stream; charset=utf-8", {})

    def _event(self, data: Json) -> None:
        self.wfile.write(b"data: %s\n\n" % json.dumps(data).encode())

    def _send_json(self, status: int, data: Json) -> None:
        self._send(status, json.dumps(data).encode(), "application/json", {})

    def _send(self, status: int, body: bytes, kind: str, more: dict[str, str]) -> None:
        self._head(status, kind, {"Content-Length": str(len(body)), **more})
        self.wfile.write(body)

    def _head(self, status: int, kind: str, more: dict[str, str]) -> None:
        self.began = True
        self.send_response(status)
        common = {"Content-Type": kind, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        for key, value in (common | more).items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)


class _Events:
    """The chunks of a streamed answer. The status is sent with the first one, so earlier errors get their own."""

    def __init__(self, begin: Callable[[], None], send: Callable[[Json], None], head: Json) -> None:
        self._begin, self._send, self._head = begin, send, head | {"object": "chat.completion.chunk"}
        self._began = False

    def text(self, piece: str) -> None:
        """Send a piece of the answer."""
        if piece:
            self._chunk({"content": piece}, None)

    def end(self, reason: str, usage: Json | None) -> None:
        """Send why the answer ends and, if requested, the token counts."""
        self._chunk({}, reason)
        if usage is not None:
            self._send(self._head | {"choices": [], "usage": usage})

    def _chunk(self, delta: Json, reason: str | None) -> None:
        if not self._began:
            self._began = True
            self._begin()
            delta = {"role": "assistant", "content": ""} | delta
        self._send(self._head | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})


def _usage(answer: Answer) -> Json:
    return {
        "prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens,
        "total_tokens": answer.prompt_tokens + answer.tokens,
        "prompt_tokens_details": {"cached_tokens": answer.reused},
    }  # fmt: skip


def _has_left(client: socket.socket) -> bool:
    """Return whether the client has closed the connection."""
    readable, _, _ = select.select([client], [], [], 0)
    try:
        return bool(readable) and client.recv(1, socket.MSG_PEEK) == b""
    except ConnectionError:
        return True
