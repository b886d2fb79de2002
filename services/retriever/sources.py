"""What a request can ask: an index by itself, two of them fused, or either with a cross-encoder on top.

| source   | made of                                      | score                                              |
|----------|----------------------------------------------|----------------------------------------------------|
| dense    | encoder and FAISS index, one owner           | inner product                                      |
| bm25     | Lucene index, one owner                      | BM25                                               |
| hybrid   | dense and bm25                               | reciprocal rank fusion, sum of 1 / (k + rank)      |
| web      | a search provider's API, no owner            | 1 / rank                                           |
| reranked | any of these, and the cross-encoder's owner  | the cross-encoder's logit                          |

All of them answer with the same `Passage`s. Sources are awaited on the event loop; what computes is an `Owner`'s thread.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol, TypeAlias

from services.retriever.owner import Owner
from services.retriever.passages import Passage, contents

Lookup: TypeAlias = tuple[str, int]
"""A query and its topk."""
Pair: TypeAlias = tuple[str, str]
"""A query and a passage's contents, for the cross-encoder."""


class Source(Protocol):
    async def retrieve(self, queries: Sequence[str], topk: int, deadline: float) -> list[list[Passage]]:
        """For each query at most `topk` passages, best first. What still waits in a queue at `deadline` (by `time.monotonic`) is
        dropped from it; the caller stops waiting by itself.

        Raises NotReady, QueueFull, DeadlinePassed or BackendFailure: for one query as for all, never an empty list instead.
        """
        ...


class Indexed:
    """An index over the corpus, through its owner."""

    def __init__(self, owner: Owner[Lookup, list[Passage]]) -> None:
        self.owner = owner

    async def retrieve(self, queries: Sequence[str], topk: int, deadline: float) -> list[list[Passage]]:
        return await asyncio.wrap_future(self.owner.submit([(query, topk) for query in queries], deadline))


class Hybrid:
    """Reciprocal rank fusion (Cormack, Clarke and Büttcher 2009) of the first `depth` passages of each part."""

    def __init__(self, parts: Sequence[Source], depth: int, k: float) -> None:
        self.parts, self.depth, self.k = parts, depth, k

    async def retrieve(self, queries: Sequence[str], topk: int, deadline: float) -> list[list[Passage]]:
        depth = max(self.depth, topk)
        rankings = await asyncio.gather(*(part.retrieve(queries, depth, deadline) for part in self.parts))
        return [fuse(of_one, self.k)[:topk] for of_one in zip(*rankings, strict=True)]


def fuse(rankings: Sequence[Sequence[Passage]], k: float) -> list[Passage]:
    """One ranking of all passages by the sum of 1 / (k + rank), ranks from 1; ties in the order of the rankings."""
    scores: dict[bytes, float] = defaultdict(float)
    for ranking in rankings:
        for rank, passage in enumerate(ranking, 1):
            scores[passage.document] += 1 / (k + rank)
    return sorted((Passage(document, score) for document, score in scores.items()), key=lambda passage: -passage.score)


class Reranked:
    """The first `depth` passages of `first`, in the cross-encoder's order. A query meets its own candidates only."""

    def __init__(self, first: Source, owner: Owner[Pair, float], depth: int) -> None:
        self.first, self.owner, self.depth = first, owner, depth

    async def retrieve(self, queries: Sequence[str], topk: int, deadline: float) -> list[list[Passage]]:
        candidates = await self.first.retrieve(queries, max(self.depth, topk), deadline)
        pairs = [(query, contents(p)) for query, passages in zip(queries, candidates, strict=True) for p in passages]
        scores = iter(await asyncio.wrap_future(self.owner.submit(pairs, deadline)) if pairs else [])
        return [
            sorted((Passage(p.document, next(scores)) for p in passages), key=lambda passage: -passage.score)[:topk]
            for passages in candidates
        ]
