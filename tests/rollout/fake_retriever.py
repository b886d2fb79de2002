"""A fake retriever in a process of its own, so that a test may kill it. Only the standard library: it starts at once.

    python -m tests.rollout.fake_retriever --port 8000

`POST /test {"hold": true}` keeps every request waiting until it is taken back; `GET /test` tells how many wait.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STATE: dict[str, Any] = {"hold": False, "waiting": 0, "requests": 0, "delay_s": 0.0, "contents": ""}
COUNTING = threading.Lock()
CONTENTS = '"France"\nThe capital is Paris.'


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # noqa: N802
        self._reply(STATE)

    def do_POST(self) -> None:  # noqa: N802
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/test":
            STATE.update(request)
            self._reply({})
        else:
            self._retrieve(request)

    def _retrieve(self, request: dict[str, Any]) -> None:
        with COUNTING:
            STATE["waiting"] += 1
            STATE["requests"] += 1
        time.sleep(STATE["delay_s"])
        while STATE["hold"]:
            time.sleep(0.02)
        with COUNTING:
            STATE["waiting"] -= 1
        hits = [{"document": {"id": f"p{i}", "contents": STATE["contents"]}, "score": 0.9 - i / 10} for i in range(request["topk"])]
        self._reply({"result": [hits for _ in request["queries"]]})

    def _reply(self, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--length", type=int, default=0, help="characters that every passage is filled up to")
    arguments = parser.parse_args()
    STATE["contents"] = CONTENTS + " and so on" * ((arguments.length - len(CONTENTS)) // 10)
    ThreadingHTTPServer.request_queue_size = 1024
    server = ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler)
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    main()
