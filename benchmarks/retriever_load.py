"""Clients: so many at once, each with one connection, each asking its next query when it has the answer to the last."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import aiohttp

from benchmarks.retriever_servers import body


@dataclass
class Outcome:
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    """Seconds, one an answered query."""
    refused: Counter[str] = field(default_factory=Counter)
    """Answers other than 200, by status; broken connections by the error's name."""

    @property
    def rate(self) -> float:
        """Queries a second."""
        return len(self.latencies) / self.seconds

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def __str__(self) -> str:
        refused = f"  refused {dict(self.refused)}" if self.refused else ""
        return f"{self.rate:7.1f} queries/s  p50 {self.percentile_ms(0.5):6.0f} ms  p99 {self.percentile_ms(0.99):6.0f} ms{refused}"


def load(url: str, clients: int, queries: Iterable[str], seconds: float) -> Outcome:
    """Ask for `seconds`, or until the queries are used up."""
    return asyncio.run(_load(url, clients, iter(queries), seconds))


async def _load(url: str, clients: int, queries: Iterator[str], seconds: float) -> Outcome:
    outcome, started = Outcome(), time.monotonic()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=clients)) as session:
        await asyncio.gather(*(_client(session, url, queries, started + seconds, outcome) for _ in range(clients)))
    outcome.seconds = time.monotonic() - started
    return outcome


async def _client(session: aiohttp.ClientSession, url: str, queries: Iterator[str], end: float, outcome: Outcome) -> None:
    while (asked := time.monotonic()) < end and (query := next(queries, None)) is not None:
        try:
            async with session.post(f"{url}/retrieve", json=body([query])) as response:
                await response.read()
        except (aiohttp.ClientError, OSError) as error:
            outcome.refused[type(error).__name__] += 1
            continue
        if response.status == 200:
            outcome.latencies.append(time.monotonic() - asked)
        else:
            outcome.refused[str(response.status)] += 1
            await asyncio.sleep(float(response.headers.get("Retry-After", 0)))


def repeated(queries: list[str], times: int) -> Iterator[str]:
    """Each query `times` over, as the samples of a group ask it: close together, not one after the other."""
    window = 16
    for start in range(0, len(queries), window):
        yield from itertools.chain.from_iterable([queries[start : start + window]] * times)
