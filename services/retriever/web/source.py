"""A search provider's API instead of a corpus.

| a query with         | answers                                                                                   |
|----------------------|-------------------------------------------------------------------------------------------|
| results              | at most topk, each address once, in the provider's order; score 1 / rank                  |
| no results           | an empty list                                                                             |
| a provider's failure | BackendFailure for the whole request: the policy must not learn from results that are not |

A passage is `{"id": address, "contents": "\"title\"\ntext", "url": address}`; the text is the provider's snippet, or with
`pages` the page's own words around it. A page that cannot be had is replaced by its snippet and counted (`pages.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import aiohttp
import msgspec

from services.contract.config import ConfigError
from services.contract.config.retriever import WebConfig
from services.retriever.errors import NotReady, QueueFull
from services.retriever.metrics import Metrics
from services.retriever.passages import Passage
from services.retriever.web.ask import Asker
from services.retriever.web.guard import Guard, Lookup, guarded_connector, system_lookup
from services.retriever.web.pages import Pages, Wanted
from services.retriever.web.providers import Hit, distinct, pages_for
from services.retriever.web.shared import Shared

T = TypeVar("T")

NO_TITLE = "No title."
NO_SNIPPET = "No snippet available."
"""Search-R1's words for them."""


class Web:
    """`lookup` resolves the hosts of pages. Raises ConfigError when key or engine is missing."""

    def __init__(self, config: WebConfig, metrics: Metrics, lookup: Lookup = system_lookup) -> None:
        self.config = config
        self._lookup, self._closing = lookup, False
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._open = 0
        """Queries under way that the cache could not answer."""
        self._asker = Asker(config, required_key(config), metrics, self._provider_session)
        self._pages = Pages(config, metrics, self._page_session)
        keep = (config.cache_size, config.cache_ttl_s, metrics)
        self._results: Shared[tuple[str, int], list[Hit]] = Shared("web", self._ask, *keep, slots=config.concurrency)
        self._passages: Shared[Wanted, str | None] = Shared("web_pages", self._pages.passage, *keep)
        metrics.watch_depth("web", lambda: self._open)

    @property
    def info(self) -> dict[str, Any]:
        """For /info; nothing of the key."""
        names = ("provider", "country", "language", "pages", "page_chars")
        return {name: getattr(self.config, name) for name in names}

    async def retrieve(self, queries: Sequence[str], topk: int, deadline: float) -> list[list[Passage]]:
        """Raises NotReady, QueueFull or BackendFailure. What is not asked yet at `deadline` is dropped with its caller."""
        if self._closing:
            raise NotReady("web is not ready: shutting down")
        queries = [" ".join(query.split()) for query in queries]
        new = sum(not self._results.known((query, 0)) for query in dict.fromkeys(queries))
        if self._open + new > self.config.queue_size:
            raise QueueFull(f"{self._open} queries are under way to {self.config.provider}, {self.config.queue_size} at most")
        self._open += new
        try:
            return await together([self._answer(query, topk) for query in queries])
        finally:
            self._open -= new

    async def _answer(self, query: str, topk: int) -> list[Passage]:
        hits = await self._find(query, topk)
        texts = await together([self._text(hit, query) for hit in hits])
        return [passage(hit, text, rank) for rank, (hit, text) in enumerate(zip(hits, texts, strict=True), 1)]

    async def _find(self, query: str, topk: int) -> list[Hit]:
        """From as many pages of results as topk takes when they are full, one after the other: each costs money."""
        found: list[Hit] = []
        for page in range(pages_for(topk, self.config)):
            before = len(found)
            found = distinct([*found, *await self._results.get((query, page))])
            if len(found) == before or len(found) >= topk:
                break
        return found[:topk]

    async def _text(self, hit: Hit, query: str) -> str:
        text = await self._passages.get(Wanted(hit.url, hit.snippet or query)) if self.config.pages else None
        return (text or hit.snippet or NO_SNIPPET)[: self.config.page_chars]

    async def _ask(self, key: tuple[str, int]) -> list[Hit]:
        return await self._asker.hits(*key)

    # -- life ----------------------------------------------------------------------------------------------------------

    def stop(self, grace_s: float) -> None:
        """Take no more; whoever still waits after `grace_s` gets NotReady. Called on the event loop; returns at once."""
        self._closing = True
        asyncio.get_running_loop().call_later(grace_s, self._end)

    async def close(self) -> None:
        self._closing = True
        self._end()
        for session in self._sessions.values():
            await session.close()
        await self._pages.close()

    def _end(self) -> None:
        for shared in (self._results, self._passages):
            shared.end(NotReady("the retriever is shutting down"))

    def _provider_session(self) -> aiohttp.ClientSession:
        return self._session("provider")

    def _page_session(self) -> aiohttp.ClientSession:
        return self._session("pages")

    def _session(self, name: str) -> aiohttp.ClientSession:
        """Made when first needed: it belongs to the event loop. Only the pages' addresses are strangers' words."""
        if name not in self._sessions:
            guarded = guarded_connector(Guard(self.config.page_networks), self._lookup) if name == "pages" else None
            self._sessions[name] = aiohttp.ClientSession(
                connector=guarded or aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"User-Agent": self.config.user_agent} if guarded else None,
            )
        return self._sessions[name]


def required_key(config: WebConfig) -> str:
    """Raises ConfigError when something is missing that the provider cannot be asked without."""
    key = config.api_key.get_secret_value().strip() if config.api_key else ""
    if not key:
        raise ConfigError(
            f"retriever.backends names web, but there is no key for {config.provider}: set FORAGE_RETRIEVER__WEB__API_KEY"
        )
    if config.provider == "google" and not config.engine_id:
        raise ConfigError("retriever.web.engine_id is missing: set it to the cx of your Google search engine")
    return key


def passage(hit: Hit, text: str, rank: int) -> Passage:
    """`rank` from 1."""
    document = {"id": hit.url, "contents": f'"{hit.title or NO_TITLE}"\n{text}', "url": hit.url}
    return Passage(msgspec.json.encode(document), 1 / rank)


async def together(jobs: Sequence[Awaitable[T]]) -> list[T]:
    """All of them, or the first failure; then nothing is waited for any more."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
