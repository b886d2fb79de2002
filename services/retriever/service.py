"""Everything that one server answers from: the parts that the configuration needs, and the sources made of them.

Only what is named is loaded: `hybrid` brings dense and bm25 with it, `retriever.rerank.model` the cross-encoder.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from services.contract.config import RetrieverConfig
from services.retriever.errors import BackendFailure, DeadlinePassed, NotReady, QueueFull
from services.retriever.metrics import Metrics
from services.retriever.owner import Owner, Resource, State
from services.retriever.saying import Say
from services.retriever.sources import Hybrid, Indexed, Reranked, Source
from services.retriever.web.source import Web

Part = Literal["dense", "bm25", "rerank"]
Loaders = Mapping[Part, Callable[[Say], Resource]]
CANARY_TIMEOUT_S = 30
WORST_FIRST: tuple[State, ...] = ("failed", "closed", "closing", "loading", "ready")


def needed_parts(config: RetrieverConfig) -> list[Part]:
    """What has to be loaded for `config`."""
    indexed = ("dense", "bm25") if "hybrid" in config.backends else config.backends
    parts = [part for part in ("dense", "bm25") if part in indexed]
    return cast(list[Part], parts + (["rerank"] if config.rerank.model else []))


class Service:
    """The owners and the sources. `start`, then `source(...)`; `close` and `join` at the end."""

    def __init__(self, config: RetrieverConfig, metrics: Metrics, loaders: Loaders) -> None:
        self.config, self.metrics = config, metrics
        per_query: dict[Part, int] = {"rerank": config.rerank.depth}
        self.owners: dict[Part, Owner] = {
            part: Owner(part, config, metrics, loaders[part], per_query.get(part, 1)) for part in needed_parts(config)
        }
        self.web = Web(config.web, metrics) if "web" in config.backends else None
        self._sources = self._make_sources()
        for part, owner in self.owners.items():
            metrics.watch_depth(part, lambda owner=owner: owner.depth)
        metrics.watch_passages(lambda: max((info.get("passages", 0) for info in self._infos().values()), default=0))

    def _make_sources(self) -> dict[str, Source]:
        sources: dict[str, Source] = {part: Indexed(self.owners[part]) for part in ("dense", "bm25") if part in self.owners}
        if "hybrid" in self.config.backends:
            hybrid = self.config.hybrid
            sources["hybrid"] = Hybrid([sources["dense"], sources["bm25"]], hybrid.depth, hybrid.k)
        if self.web:
            sources["web"] = self.web
        return {name: sources[name] for name in self.config.backends}

    def source(self, backend: str | None, rerank: bool | None) -> Source:
        """The one that a request asked for; what it leaves open the configuration decides. Both were validated before."""
        first = self._sources[backend or self.config.backends[0]]
        wanted = self.config.rerank.always if rerank is None else rerank
        return Reranked(first, self.owners["rerank"], self.config.rerank.depth) if wanted and "rerank" in self.owners else first

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        for owner in self.owners.values():
            owner.start()

    def close(self, grace_s: float) -> None:
        """Take no more; answer what waits for at most `grace_s`. Returns at once."""
        for owner in self.owners.values():
            owner.close(grace_s)
        if self.web:
            self.web.stop(grace_s)

    async def join(self, timeout_s: float) -> None:
        """Wait until every owner's thread has ended."""
        until = time.monotonic() + timeout_s
        for owner in self.owners.values():
            await asyncio.to_thread(owner.join, max(until - time.monotonic(), 0.0))
        if self.web:
            await self.web.close()

    # -- how it is -----------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The worst of its parts'."""
        states: list[State] = [owner.state for owner in self.owners.values()]
        return min(states, key=WORST_FIRST.index) if states else "ready"

    @property
    def detail(self) -> str:
        """What the part in the worst state says about itself."""
        worst = [owner for owner in self.owners.values() if owner.state == self.state]
        if self.state == "ready" or not worst:
            return f"{', '.join(self._sources)} ready"
        return f"{worst[0].name}: {worst[0].detail}"

    async def why_not_ready(self) -> str | None:
        """None when ready. After a failed batch the canary decides, so that a mended part becomes ready again."""
        if self.state != "ready":
            return self.detail
        for owner in self.owners.values():
            if owner.last_error and (problem := await _canary_problem(owner)):
                return problem
        return None

    def info(self) -> dict[str, Any] | None:
        """What is being served; None while something is not loaded."""
        if any(owner.resource is None for owner in self.owners.values()):
            return None
        limits = {name: getattr(self.config, name) for name in ("topk", "max_topk", "max_queries", "max_query_chars")}
        web = {"web": self.web.info} if self.web else {}
        return {"backends": list(self._sources), "default_backend": self.config.backends[0], **limits, **self._infos(), **web}

    def _infos(self) -> dict[str, dict[str, Any]]:
        return {part: owner.resource.info for part, owner in self.owners.items() if owner.resource}


async def _canary_problem(owner: Owner) -> str | None:
    assert owner.resource is not None
    try:
        future = owner.submit([owner.resource.canary()], use_cache=False)
        await asyncio.wait_for(asyncio.wrap_future(future), CANARY_TIMEOUT_S)
    except (BackendFailure, DeadlinePassed, NotReady, QueueFull, TimeoutError) as error:
        return f"the last batch failed: {owner.last_error or error}"
    return None
