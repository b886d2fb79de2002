"""Stand-ins of the tests: scripted generation, a retriever over real HTTP whose behaviour a test may change at any time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from services.contract.codec import Codec
from services.contract.messages import PassageRef, Sampling, VersionSpan
from services.rollout.engine import Finish, Generation
from services.rollout.retrieval import Passages
from tests.rollout.tiny_model import PASSAGES


class ScriptedModel:
    """Answers each turn with the next text of a script, cut to the tokens it is allowed; remembers what it was given."""

    def __init__(self, codec: Codec, turns: Sequence[str], version: int = 0) -> None:
        self.codec, self.turns, self.version = codec, list(turns), version
        self.inputs: list[list[int]] = []
        self.limits: list[int] = []

    async def generate(self, input_ids: list[int], sampling: Sampling, max_new_tokens: int) -> Generation:
        self.inputs.append(list(input_ids))
        self.limits.append(max_new_tokens)
        all_ids = self.codec.encode(self.turns[len(self.inputs) - 1])
        ids = all_ids[:max_new_tokens]
        finish: Finish = "length" if len(ids) < len(all_ids) else "stop"
        return Generation(ids, [-0.5] * len(ids), finish, [VersionSpan(self.version, 0, len(ids))])


class ScriptedRetriever:
    """Finds the same passages for every query; remembers the queries."""

    def __init__(self, contents: Sequence[str] = PASSAGES) -> None:
        refs = [PassageRef(f"p{i}", 1.0 - i / 10) for i in range(len(contents))]
        self.found: Passages | None = Passages(list(contents), refs, 0.01)
        self.queries: list[str] = []

    async def retrieve(self, query: str, topk: int) -> Passages | None:
        self.queries.append(query)
        return self.found


class StandInRetriever:
    """A stand-in for the retriever service, over real HTTP. `statuses` are given out first, one a request; then all is well."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.always: int = 200
        self.headers: dict[str, str] = {}
        self.delay_s = 0.0
        self.body: bytes | None = None
        self.requests: list[dict[str, Any]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: dict[str, Any]) -> tuple[int, bytes]:
        self.requests.append(request)
        time.sleep(self.delay_s)
        status = self.statuses.pop(0) if self.statuses else self.always
        if status != 200:
            return status, b'{"detail": "the test says so"}'
        hits = [{"document": {"id": f"p{i}", "contents": text}, "score": 0.9 - i / 10} for i, text in enumerate(PASSAGES)]
        return 200, self.body or json.dumps({"result": [hits[: request["topk"]]]}).encode()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        retriever = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:  # noqa: N802
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, body = retriever.answer(request) if self.path == "/retrieve" else (404, b"")
                self.send_response(status)
                for name, value in retriever.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
