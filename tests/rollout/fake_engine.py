"""A fake SGLang over real HTTP: the endpoints that a worker uses, with scripted turns instead of a model.

For what a real engine is too slow for, or cannot be brought to do: dozens of kills, a thousand episodes, a swap in mid-turn.
It keeps what matters about the real one: a pause holds requests and lets control commands through; a load without a pause
fails while requests run; an abort ends them; every token carries the version that wrote it.

    python -m tests.rollout.fake_engine --port 30000 --turns '[[5, 6], [7, 8]]'

`turns` are token ids. An input that holds the n-th turn gets the one after it. `POST /test {"hold": true}` keeps every request
from finishing until it is taken back; `GET /test` tells what has been going on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web


class FakeEngine:
    def __init__(self, turns: Sequence[Sequence[int]], turn_s: float = 0.0, version: str = "default") -> None:
        self.turns, self.turn_s, self.version = [list(turn) for turn in turns], turn_s, version
        self.spread = 0.0
        """Standard deviation of the logarithm of a turn's time; 0: all alike."""
        self.load_s = 0.0
        self.hold = self.paused = False
        self.fail_loads = 0
        self.slots = 10_000
        """Requests decoded together; the others are queued."""
        self.context = 100_000
        self.url = ""
        self.requests: list[list[int]] = []
        self.control: list[str] = []
        self.tokens = 0
        self._running: set[asyncio.Event] = set()
        self._queued = 0
        self._changed = asyncio.Condition()

    def application(self) -> web.Application:
        application = web.Application(client_max_size=1 << 26)
        application.add_routes(
            [
                web.post("/generate", self.generate),
                web.post("/pause_generation", self.pause),
                web.post("/continue_generation", self.resume),
                web.post("/abort_request", self.abort),
                web.post("/update_weights_from_disk", self.update),
                web.get("/model_info", self.model_info),
                web.get("/server_info", self.server_info),
                web.get("/v1/loads", self.loads),
                web.get("/test", self.tell),
                web.post("/test", self.change),
            ]
        )
        return application

    @contextlib.asynccontextmanager
    async def serve(self, port: int = 0) -> AsyncIterator[str]:
        runner = web.AppRunner(self.application(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port, backlog=2048)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    # -- generation ----------------------------------------------------------------------------------------------------

    async def generate(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        ids, limit = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        self._queued += 1
        try:
            await self._until(lambda: not self.paused and len(self._running) < self.slots)
        finally:
            self._queued -= 1
        aborted = asyncio.Event()
        self._running.add(aborted)
        self.requests.append(ids)
        try:
            return self._answer(await self._decode(self._next_turn(ids)[:limit], aborted))
        finally:
            self._running.discard(aborted)
            await self._tell_waiters()

    async def _decode(self, ids: list[int], aborted: asyncio.Event) -> tuple[list[int], list[str], str]:
        """Half of the tokens by the version at the start, half by the one at the end of the turn's time."""
        first = self.version
        seconds = self.turn_s * (random.lognormvariate(0, self.spread) if self.spread else 1.0)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(aborted.wait(), seconds)
        await self._until(lambda: aborted.is_set() or not (self.hold or self.paused))
        if aborted.is_set():
            return [], [], "abort"
        self.tokens += len(ids)
        half = len(ids) // 2
        return ids, [first] * half + [self.version] * (len(ids) - half), "stop"

    def _answer(self, decoded: tuple[list[int], list[str], str]) -> web.Response:
        ids, versions, finish = decoded
        if finish == "abort":
            return _json({"output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}, "weight_version": self.version}})
        starts = [i for i in range(len(ids)) if i == 0 or versions[i] != versions[i - 1]]
        ends = [*starts[1:], len(ids)]
        spans = [{"version": versions[a], "start": a, "end": b} for a, b in zip(starts, ends, strict=True)]
        meta = {"finish_reason": {"type": finish}, "weight_version": self.version, "weight_versions": spans}
        return _json({"output_ids": ids, "meta_info": meta | {"output_token_logprobs": [[-0.5, i, None] for i in ids]}})

    def _next_turn(self, ids: list[int]) -> list[int]:
        played = sum(_holds(ids, turn) for turn in self.turns)
        return self.turns[min(played, len(self.turns) - 1)]

    # -- control -------------------------------------------------------------------------------------------------------

    async def pause(self, request: web.Request) -> web.Response:
        self.control.append("pause")
        self.paused = True
        return _json({})

    async def resume(self, request: web.Request) -> web.Response:
        self.control.append("resume")
        self.paused = False
        await self._tell_waiters()
        return _json({})

    async def abort(self, request: web.Request) -> web.Response:
        self.control.append("abort")
        for aborted in self._running:
            aborted.set()
        await self._tell_waiters()
        return _json({})

    async def update(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.control.append(f"load {body['weight_version']}")
        await asyncio.sleep(self.load_s)
        self.fail_loads -= 1
        if self.fail_loads >= 0 or not Path(body["model_path"]).is_dir():
            return _json({"success": False, "message": "the test says so, or no such folder"}, 400)
        self.version = body["weight_version"]
        if self._running and not self.paused:
            return _json({"success": False, "message": "the cache was not flushed"}, 400)
        return _json({"success": True, "message": ""})

    async def model_info(self, request: web.Request) -> web.Response:
        return _json({"weight_version": self.version})

    async def server_info(self, request: web.Request) -> web.Response:
        return _json({"context_length": self.context, "max_total_num_tokens": self.context})

    async def loads(self, request: web.Request) -> web.Response:
        use = min(1.0, len(self._running) / self.slots)
        return _json({"loads": [{"num_running_reqs": len(self._running), "num_waiting_reqs": self._queued, "token_usage": use}]})

    # -- the test's hand -----------------------------------------------------------------------------------------------

    async def change(self, request: web.Request) -> web.Response:
        for name, value in (await request.json()).items():
            setattr(self, name, value)
        await self._tell_waiters()
        return _json({})

    async def tell(self, request: web.Request) -> web.Response:
        figures = {"requests": len(self.requests), "running": len(self._running), "tokens": self.tokens}
        return _json(figures | {"version": self.version, "paused": self.paused, "control": self.control})

    async def _until(self, holds: Any) -> None:
        async with self._changed:
            await self._changed.wait_for(holds)

    async def _tell_waiters(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _holds(ids: list[int], turn: list[int]) -> bool:
    return any(ids[i : i + len(turn)] == turn for i in range(len(ids) - len(turn) + 1) if ids[i] == turn[0])


def _json(body: dict[str, Any], status: int = 200) -> web.Response:
    return web.json_response(body, status=status)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--turns", type=json.loads, required=True)
    parser.add_argument("--turn-s", type=float, default=0.0)
    parser.add_argument("--spread", type=float, default=0.0)
    arguments = parser.parse_args()
    engine = FakeEngine(arguments.turns, arguments.turn_s)
    engine.spread = arguments.spread
    async with engine.serve(arguments.port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
