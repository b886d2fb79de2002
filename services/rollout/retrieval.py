"""Asks the retriever for passages, in Search-R1's shape: ``POST /retrieve {"queries", "topk", "return_scores"}``.

Ours answers it, and so do Search-R1's own servers: passages come as ``{"document": {"contents", …}, "score"}``, from its web
search without a score, from slime's server bare. What FAISS fills up with when an index has too few rows is left out.

| the retriever                       | what follows                                                        |
|-------------------------------------|---------------------------------------------------------------------|
| answers                             | the passages                                                        |
| away, too slow, 5xx, 429            | asked again with growing pauses (Retry-After is kept), then RetrieverError |
| 422                                 | None: the query itself is unusable, which is the model's doing      |
| any other 4xx, an unreadable answer | RetrieverError at once: a wrong URL or another service              |
"""

from __future__ import annotations

import asyncio
import random
import time
from types import TracebackType
from typing import Any

import aiohttp
import msgspec

from services.contract.config import RolloutConfig
from services.contract.messages import PassageRef
from services.rollout.failures import RetrieverError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
UNUSABLE_QUERY, TOO_MANY = 422, 429
FILLED_UP = -1e38
"""FAISS gives -3.4e38 to the places it cannot fill; Search-R1's server then shows the corpus's last passage there."""


class Passages(msgspec.Struct, frozen=True):
    """Best first. `contents` is "title, newline, text"; `refs` are their ids and scores."""

    contents: list[str]
    refs: list[PassageRef]
    latency_s: float = 0.0


class _Document(msgspec.Struct):
    contents: str
    id: str | int | None = None


class _Hit(msgspec.Struct):
    document: _Document
    score: float = 0.0


class _Scored(msgspec.Struct):
    result: list[list[_Hit]]


class _Bare(msgspec.Struct):
    result: list[list[_Document]]


_decode_scored, _decode_bare = msgspec.json.Decoder(_Scored).decode, msgspec.json.Decoder(_Bare).decode


class _TryAgain(Exception):
    """Worth another attempt; `after_s` is what the retriever asked for."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


class Retriever:
    """A pooled client; use as an async context manager. At most `retrieval_concurrency` requests are under way."""

    def __init__(self, base_url: str, rollout: RolloutConfig) -> None:
        self._url = base_url.rstrip("/") + "/retrieve"
        self._attempts = rollout.retrieval_retries + 1
        self._timeout = aiohttp.ClientTimeout(total=rollout.retrieval_timeout_s)
        self._slots = asyncio.Semaphore(rollout.retrieval_concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Retriever:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=self._timeout)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._session
        await self._session.close()

    async def retrieve(self, query: str, topk: int) -> Passages | None:
        """The passages for one query; None when the retriever calls the query unusable. Raises RetrieverError."""
        started = time.monotonic()
        for attempt in range(1, self._attempts + 1):
            try:
                async with self._slots:
                    body = await self._ask(query, topk)
                return None if body is None else self._read(body, time.monotonic() - started)
            except _TryAgain as problem:
                if attempt == self._attempts:
                    raise RetrieverError(f"{self._url} failed {attempt} times, last with: {problem}") from problem
                await asyncio.sleep(pause_before_retry(attempt, problem.after_s))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _ask(self, query: str, topk: int) -> bytes | None:
        assert self._session, "use the retriever as an async context manager"
        request = {"queries": [query], "topk": topk, "return_scores": True}
        try:
            async with self._session.post(self._url, json=request) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _TryAgain(f"{type(error).__name__} {error}".rstrip()) from error
        if response.status == UNUSABLE_QUERY:
            return None
        reason = f"status {response.status}: {body[:300].decode(errors='replace')}"
        if response.status >= 500 or response.status == TOO_MANY:
            raise _TryAgain(reason, _seconds(response.headers.get("Retry-After")))
        if response.status != 200:
            raise RetrieverError(f"{self._url} answered {reason}; is retriever.url right?")
        return body

    def _read(self, body: bytes, latency_s: float) -> Passages:
        try:
            hits = read_hits(body)
        except (msgspec.DecodeError, ValueError) as error:
            raise RetrieverError(f"{self._url} gave an answer that cannot be read ({error}): {body[:200]!r}") from None
        refs = [PassageRef(_name(hit.document.id), hit.score) for hit in hits]
        return Passages([hit.document.contents for hit in hits], refs, latency_s)


def read_hits(body: bytes) -> list[_Hit]:
    """The passages of the one query that was asked, best first. Raises msgspec.DecodeError or ValueError."""
    try:
        (hits,) = _decode_scored(body).result
    except msgspec.ValidationError as error:
        try:
            (documents,) = _decode_bare(body).result
        except msgspec.ValidationError:
            raise error from None  # of the two shapes, the one that was asked for
        hits = [_Hit(document) for document in documents]
    return [hit for hit in hits if hit.score > FILLED_UP]


def pause_before_retry(attempt: int, asked_s: float) -> float:
    """Doubling from half a second, spread so that many episodes do not return together; never less than was asked for."""
    grown = min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S)
    return max(grown * random.uniform(0.75, 1.25), min(asked_s, LONGEST_PAUSE_S))


def _seconds(header: str | None) -> float:
    """Retry-After as seconds; a date, or nothing, counts as 0."""
    try:
        return float(header or 0)
    except ValueError:
        return 0.0


def _name(identifier: Any) -> str:
    return "" if identifier is None else str(identifier)
