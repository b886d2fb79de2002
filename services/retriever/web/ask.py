"""Asks the provider for one page of results, again where that may help; says what went wrong, never the key.

| the provider                              | then                                             | metric `status` |
|-------------------------------------------|--------------------------------------------------|-----------------|
| 200 with results, or with none            | they are the answer                              | 200             |
| 200 that cannot be read (HTML, no fields) | BackendFailure                                   | unreadable      |
| 429, 5xx                                  | asked again; BackendFailure at last              | the status      |
| any other status, a redirect as well      | BackendFailure: asking again would not help      | the status      |
| connection refused, cut, TLS              | asked again; BackendFailure at last              | connection      |
| silent for `attempt_timeout_s`            | asked again; BackendFailure at last              | timeout         |

Redirects are not followed: the key would go with them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, quote_plus

import aiohttp
from yarl import URL

from services.contract.config.retriever import WebConfig
from services.retriever.errors import BackendFailure
from services.retriever.metrics import Metrics
from services.retriever.web.providers import PROVIDERS, Ask, Hit, Unreadable, clean, reason

log = logging.getLogger("retriever")

MAX_ANSWER_BYTES = 4_000_000
MAX_REASON_CHARS = 300


class Failed(Exception):
    """One attempt; the message is free of the key."""

    def __init__(self, message: str, again: bool, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.again, self.wait_s = again, wait_s


class Asker:
    """One provider with one key."""

    def __init__(self, config: WebConfig, key: str, metrics: Metrics, session: Callable[[], aiohttp.ClientSession]) -> None:
        self.config, self.provider = config, PROVIDERS[config.provider]
        self.url = config.url or self.provider.url
        self._key, self._metrics, self._session = key, metrics, session

    async def hits(self, query: str, page: int) -> list[Hit]:
        """Raises BackendFailure with provider, status and reason."""
        ask = self.provider.ask(self.config, self._key, query, page)
        until = time.monotonic() + self.config.timeout_s
        try:
            for number in range(self.config.retries):
                try:
                    return await self._attempt(ask, until)
                except Failed as failed:
                    wait_s = max(failed.wait_s, self.config.retry_wait_s * 2**number * random.uniform(0.5, 1))
                    if not failed.again or time.monotonic() + wait_s >= until:
                        raise
                    await asyncio.sleep(wait_s)
            return await self._attempt(ask, until)
        except Failed as failed:
            log.error("web: %s", failed)
            raise BackendFailure(f"web: {failed}") from None

    async def _attempt(self, ask: Ask, until: float) -> list[Hit]:
        """Raises Failed, and nothing else that could carry an address with the key in it."""
        limit_s = max(min(self.config.attempt_timeout_s, until - time.monotonic()), 0.001)
        try:
            async with asyncio.timeout(limit_s):
                return await self._exchange(ask)
        except TimeoutError:
            raise self._failed("timeout", f"did not answer within {limit_s:.3g} s", again=True) from None
        except (aiohttp.ClientError, OSError) as error:
            # An HTTP error's own text contains the whole address.
            text = error.message if isinstance(error, aiohttp.ClientResponseError) else str(error)
            raise self._failed("connection", f"could not be asked: {type(error).__name__}: {text}", again=True) from None

    async def _exchange(self, ask: Ask) -> list[Hit]:
        request = self._session().request(
            ask.method, self.url, params=ask.query, headers=ask.headers, json=ask.json, allow_redirects=False
        )
        async with request as response:
            body = await _read(response)
            if response.status != 200:
                again = response.status == 429 or response.status >= 500
                message = f"answered {response.status}: {_reason(body, response)}"
                raise self._failed(str(response.status), message, again, _retry_after(response))
        try:
            found = self.provider.read(_object(body))
        except Unreadable as error:
            raise self._failed("unreadable", f"answered 200, but {error}", again=False) from None
        self._count("200")
        return found

    def _failed(self, status: str, message: str, again: bool, wait_s: float = 0.0) -> Failed:
        self._count(status)
        return Failed(f"{self.config.provider} {_without(self._key, message)[:MAX_REASON_CHARS]}", again, wait_s)

    def _count(self, status: str) -> None:
        self._metrics.web_requests.labels(self.config.provider, status).inc()


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise aiohttp.ClientPayloadError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
    return bytes(body)


def _object(body: bytes) -> dict[str, Any]:
    """Python's own parser: providers send halves of surrogate pairs, which stricter ones refuse."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise Unreadable(f"it is no JSON: {_start(body)}") from None
    if not isinstance(answer, dict):
        raise Unreadable(reason(answer))
    return answer


def _reason(body: bytes, response: aiohttp.ClientResponse) -> str:
    try:
        return reason(_object(body))
    except Unreadable:
        return _start(body) or response.reason or "no reason given"


def _start(body: bytes) -> str:
    return clean(body[:200].decode("utf-8", "replace"))


def _retry_after(response: aiohttp.ClientResponse) -> float:
    """Seconds; 0 if it is not there or is a date."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _without(key: str, text: str) -> str:
    """Providers repeat the key, and addresses contain it, in one of these spellings."""
    for spelling in {key, quote(key, safe=""), quote(key), quote_plus(key), URL.build(query={"": key}).raw_query_string[1:]}:
        text = text.replace(spelling, "***")
    return text
