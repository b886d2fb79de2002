"""The client of the retriever's `/retrieve`: patient while the service is away or busy, at once plain about a bad request.

| what comes back                             | what happens                                     |
|---------------------------------------------|--------------------------------------------------|
| no connection, time-out, 429, 5xx           | tried again, with growing pauses, for `patience_s` |
| another 4xx                                 | PrepareError with the service's own reason       |
| not the shape that was asked for            | PrepareError                                     |
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from types import TracebackType

import httpx
import msgspec

from services.prepare.errors import PrepareError

logger = logging.getLogger("prepare")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
QUERIES_PER_REQUEST = 32


class Found(msgspec.Struct, frozen=True):
    """A passage that the retriever returned."""

    id: str | int
    contents: str


class _Item(msgspec.Struct):
    document: Found
    score: float


class _Answer(msgspec.Struct):
    result: list[list[_Item]]


class Busy(Exception):
    """Worth trying again."""


class Retriever:
    """`retriever(queries)` gives for each query its passages, best first."""

    def __init__(self, url: str, topk: int, timeout_s: float = 30.0, patience_s: float = 120.0) -> None:
        self._endpoint = f"{url.rstrip('/')}/retrieve"
        self._topk, self._patience_s = topk, patience_s
        self._client = httpx.Client(timeout=timeout_s)
        self._decode = msgspec.json.Decoder(_Answer).decode

    def __enter__(self) -> Retriever:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.close()

    def __call__(self, queries: Sequence[str]) -> list[list[Found]]:
        parts = [queries[i : i + QUERIES_PER_REQUEST] for i in range(0, len(queries), QUERIES_PER_REQUEST)]
        return [found for part in parts for found in self._patiently(part)]

    def _patiently(self, queries: Sequence[str]) -> list[list[Found]]:
        deadline, pause = time.monotonic() + self._patience_s, FIRST_PAUSE_S
        while True:
            try:
                return self._ask(queries)
            except (httpx.TransportError, Busy) as error:
                if time.monotonic() + pause > deadline:
                    raise PrepareError(
                        f"the retriever at {self._endpoint} did not answer within {self._patience_s:.0f} s ({error}): "
                        "start it, or mend retriever.url"
                    ) from error
                logger.warning("the retriever does not answer (%s); trying again in %.1f s", error, pause)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _ask(self, queries: Sequence[str]) -> list[list[Found]]:
        body = {"queries": list(queries), "topk": self._topk, "return_scores": True}
        response = self._client.post(self._endpoint, json=body)
        if response.status_code == 429 or response.status_code >= 500:
            raise Busy(f"HTTP {response.status_code}: {response.text[:200]}")
        if response.status_code != 200:
            raise PrepareError(f"{self._endpoint} refused the request: HTTP {response.status_code}: {response.text[:500]}")
        try:
            answer = self._decode(response.content)
        except msgspec.DecodeError as error:
            raise PrepareError(f"{self._endpoint} answered in another shape ({error}): is it Forage's retriever?") from error
        if len(answer.result) != len(queries):
            raise PrepareError(f"{self._endpoint} answered {len(answer.result)} of {len(queries)} queries")
        return [[item.document for item in found] for found in answer.result]
