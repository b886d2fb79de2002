"""A little internet on this machine: a search provider and web pages, served by a real HTTP server on 127.0.0.1.

The same server also listens on 127.0.0.2, which stands for the inside of somebody's network: nothing may be fetched there.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp import web

from services.contract.config import RetrieverConfig

KEY = "k3y/with+odd=signs & spaces"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Asked:
    """What the provider was asked."""

    method: str
    headers: dict[str, str]
    query: dict[str, str]
    json: Any


class Internet:
    def __init__(self) -> None:
        self.answers: list[Handler] = []
        """What the provider does with the next requests; the last one stays."""
        self.pages: dict[str, Handler] = {}
        self.asked: list[Asked] = []
        self.fetched: list[str] = []
        """Paths of pages, in the order of the requests."""
        self.inside: list[str] = []
        """What was fetched from the inside."""
        self.under_way, self.most_under_way = 0, 0
        """Page requests being answered."""
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        assert self._started.wait(10)

    def answer(self, *handlers: Handler) -> None:
        self.answers = list(handlers)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen())
        self._started.set()
        self._loop.run_forever()
        for task in (rest := asyncio.all_tasks(self._loop)):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))

    async def _listen(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/search", self._search)
        app.router.add_get("/{path:.*}", self._page)
        self._runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        await web.TCPSite(self._runner, "127.0.0.2", self.port).start()
        self.host = f"http://127.0.0.1:{self.port}"
        self.inner = f"http://127.0.0.2:{self.port}"

    async def _search(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.asked.append(Asked(request.method, dict(request.headers), dict(request.query), body))
        handler = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return await handler(request)

    async def _page(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        if request.transport.get_extra_info("sockname")[0] != "127.0.0.1":
            self.inside.append(request.path)
        self.fetched.append(request.path)
        self.under_way += 1
        self.most_under_way = max(self.under_way, self.most_under_way)
        try:
            return await self.pages[request.path](request) if request.path in self.pages else web.Response(status=404)
        finally:
            self.under_way -= 1


@pytest.fixture
def internet() -> Iterator[Internet]:
    running = Internet()
    yield running
    running.stop()


def web_config(internet: Internet, backends: list[str] | None = None, **settings: Any) -> RetrieverConfig:
    """Quick retries, and the little internet's address let through."""
    local = {"page_networks": ["127.0.0.1/32"], "page_ports": [internet.port], "page_timeout_s": 2}
    web_settings = {"url": f"{internet.host}/search", "api_key": KEY, "retry_wait_s": 0.01, **local, **settings}
    return RetrieverConfig.model_validate({"backends": backends or ["web"], "port": 0, "web": web_settings})


def result(number: int, **fields: Any) -> dict[str, Any]:
    """A provider's result, with the fields that all three have in common."""
    return {"title": f"Title {number}", "link": f"https://example.org/{number}", "snippet": f"Snippet {number}.", **fields}


def serper(*results: Any) -> Handler:
    return json_answer({"searchParameters": {}, "organic": list(results)})


def json_answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response(body, status=status, headers=headers)

    return answer


def text_answer(
    text: str | bytes, status: int = 200, content_type: str = "text/html", headers: dict[str, str] | None = None
) -> Handler:
    body = text.encode() if isinstance(text, str) else text

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=body, status=status, headers={"Content-Type": content_type, **(headers or {})})

    return answer


def redirect(location: str, status: int = 302) -> Handler:
    return text_answer("", status, headers={"Location": location})


def slow(seconds: float, then: Handler) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return await then(request)

    return answer


class Gate:
    """An answer that is held back until `open`."""

    def __init__(self, then: Handler) -> None:
        self.waiting = 0
        self._then, self._open = then, threading.Event()

    def open(self) -> None:
        self._open.set()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.waiting += 1
        while not self._open.is_set():
            await asyncio.sleep(0.01)
        return await self._then(request)


def no_index(say: Any) -> Any:
    """For services without an index: it is never called."""
    raise AssertionError("a web-only service loads nothing")


async def cut(request: web.Request) -> web.StreamResponse:
    """Announces more than it sends before it hangs up."""
    response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "text/html"})
    await response.prepare(request)
    await response.write(b'{"organic": [')
    assert request.transport is not None
    request.transport.close()
    return response


@pytest.fixture
def ask(internet: Internet, serve: Any) -> Any:
    """`ask(**settings)` starts a web-only service."""
    return lambda **settings: serve(web_config(internet, **settings), no_index).wait_ready()
