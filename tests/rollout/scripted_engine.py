"""A fake SGLang over real HTTP that gives out the replies to `/generate` that a test has written, also such as no sane engine
would; `fake_engine.py` is one that behaves."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from services.contract.config import Config
from services.rollout.engine import Engine


class Reply(NamedTuple):
    """What is sent back for one request."""

    body: bytes
    status: int = 200
    delay_s: float = 0.0
    hang_up: bool = False
    """Promise more bytes than are sent, then close."""


def turn(ids: list[int], version: int = 0, finish: str = "stop", **meta: Any) -> Reply:
    """A good answer of SGLang 0.5.23 with these ids, or a bad one: `meta` replaces parts of `meta_info`, None takes one out."""
    info = {
        "finish_reason": {"type": finish},
        "output_token_logprobs": [[-0.25, token, None] for token in ids],
        "weight_version": str(version),
        "weight_versions": [{"version": str(version), "start": 0, "end": len(ids)}],
    } | meta
    info = {name: value for name, value in info.items() if value is not None}
    return Reply(json.dumps({"text": "", "output_ids": ids, "meta_info": info}).encode())


class ScriptedEngine:
    """Gives out `replies` one after the other; remembers what it was asked."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.requests: list[dict[str, Any]] = []
        self._over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._over.set()  # wakes replies that were told to take long
        self._server.shutdown()
        self._server.server_close()

    @contextlib.asynccontextmanager
    async def client(self, config: Config) -> AsyncIterator[Engine]:
        """The worker's own client, talking to this fake instead of to an SGLang."""
        engine = Engine(config.rollout, "scripted")
        engine.url = self.url
        engine._open()
        try:
            yield engine
        finally:
            await engine._close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                fake.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                reply = fake.replies.pop(0)
                fake._over.wait(reply.delay_s)
                with contextlib.suppress(OSError):  # a client that did not wait
                    self.send_response(reply.status)
                    self.send_header("Content-Length", str(len(reply.body) + 100 * reply.hang_up))
                    self.end_headers()
                    self.wfile.write(reply.body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
