"""Fetches a page that was found and returns its passage around the snippet, or None: then the snippet has to do.

| outcome        | what happened                                                                        |
|----------------|--------------------------------------------------------------------------------------|
| ok             | the passage was found                                                                |
| refused        | it, or what it redirects to, has no address on the public web (`guard.py`)           |
| redirects      | more than `page_redirects`, or one without an address                                |
| status         | not 200                                                                              |
| content_type   | not text/html or text/plain                                                          |
| too_large      | more than `max_page_bytes`, after decompression                                      |
| timeout        | not there within `page_timeout_s`                                                    |
| connection     | no such host, connection refused or cut, TLS, a broken encoding                      |
| extract_slow   | finding the main text took longer than `extract_timeout_s`                           |
| extract_died   | the process that looked for it died                                                  |
| empty          | the page has no text                                                                 |
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import aiohttp
from yarl import URL

from services.contract.config.retriever import WebConfig
from services.retriever.metrics import Metrics
from services.retriever.web.extract import Task
from services.retriever.web.extractors import ExtractionFailed, Extractors
from services.retriever.web.guard import Refused, check_url

Outcome: TypeAlias = Literal[
    "refused", "redirects", "status", "content_type", "too_large", "timeout", "connection", "extract_slow", "extract_died", "empty"
]
CONTENT_TYPES = ("text/html", "text/plain")
REDIRECTS = (301, 302, 303, 307, 308)


class Wanted(NamedTuple):
    """A page and what its passage is looked for by."""

    url: str
    clues: str


class PageFailed(Exception):
    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class Page(NamedTuple):
    body: bytes
    content_type: str


class Pages:
    def __init__(self, config: WebConfig, metrics: Metrics, session: Callable[[], aiohttp.ClientSession]) -> None:
        """`session` refuses addresses that are not public, and keeps no cookies."""
        self.config, self._metrics, self._session = config, metrics, session
        self._extractors = Extractors(config.extract_processes, config.extract_timeout_s)
        self._all = asyncio.Semaphore(config.page_concurrency)
        self._hosts: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        """By host; gone when no fetch holds or awaits it."""

    async def passage(self, wanted: Wanted) -> str | None:
        try:
            page = await self._fetch(wanted.url)
            text = await self._extract(page, wanted.clues)
        except PageFailed as failed:
            self._metrics.web_pages.labels(failed.outcome).inc()
            return None
        self._metrics.web_pages.labels("ok").inc()
        return text

    async def close(self) -> None:
        await self._extractors.close()

    async def _fetch(self, address: str) -> Page:
        """Follows redirects by hand, each checked like the first address. Raises PageFailed."""
        left_s = self.config.page_timeout_s
        for _ in range(self.config.page_redirects + 1):
            url = self._checked(address)
            async with self._host(url.host or ""), self._all:  # in this order: who waits for a busy host keeps nobody else waiting
                started = time.monotonic()
                answer = await self._request(url, left_s)
                left_s -= time.monotonic() - started
            if isinstance(answer, Page):
                return answer
            address = answer
        raise PageFailed("redirects")

    def _checked(self, address: str) -> URL:
        try:
            url = URL(address)
            check_url(url, self.config.page_ports)
        except (ValueError, Refused):
            raise PageFailed("refused") from None
        return url

    def _host(self, host: str) -> asyncio.Semaphore:
        return self._hosts.setdefault(host, asyncio.Semaphore(self.config.pages_per_host))

    async def _request(self, url: URL, limit_s: float) -> Page | str:
        """The page, or the address that it redirects to."""
        try:
            async with asyncio.timeout(limit_s), self._session().get(url, allow_redirects=False) as response:
                if response.status in REDIRECTS:
                    return str(url.join(URL(response.headers["Location"])))
                return Page(await self._read(response), response.headers["Content-Type"])
        except TimeoutError:
            raise PageFailed("timeout") from None
        except aiohttp.InvalidURL:  # such as an IPv4 address in one number
            raise PageFailed("refused") from None
        except (KeyError, ValueError):
            raise PageFailed("redirects") from None
        except (aiohttp.ClientError, OSError) as error:
            raise PageFailed("refused" if _is_refusal(error) else "connection") from None

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        """Raises PageFailed."""
        if response.status != 200:
            raise PageFailed("status")
        if "Content-Type" not in response.headers or response.content_type not in CONTENT_TYPES:
            raise PageFailed("content_type")
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > self.config.max_page_bytes:
                raise PageFailed("too_large")
        return bytes(body)

    async def _extract(self, page: Page, clues: str) -> str:
        """Raises PageFailed."""
        try:
            text = await self._extractors.passage(page.body, Task(page.content_type, clues, self.config.page_chars))
        except ExtractionFailed as failed:
            raise PageFailed("extract_slow" if failed.timeout else "extract_died") from None
        if not text:
            raise PageFailed("empty")
        return text


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, Refused) or isinstance(getattr(error, "os_error", None), Refused)
