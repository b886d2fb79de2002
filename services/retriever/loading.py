"""How each part is loaded. The imports are inside: torch, FAISS and a JVM take seconds, and only what is named is loaded."""

from __future__ import annotations

from services.contract.config import Config
from services.retriever.owner import Resource
from services.retriever.saying import Say
from services.retriever.service import Loaders


def loaders(config: Config, rebuild: str) -> Loaders:
    """`rebuild` is the command that an index which does not fit is mended with."""

    def dense(say: Say) -> Resource:
        from services.retriever.dense import load_dense

        return load_dense(config, rebuild, say)

    def bm25(say: Say) -> Resource:
        from services.retriever.bm25 import load_bm25

        return load_bm25(config, rebuild, say)

    def rerank(say: Say) -> Resource:
        from services.retriever.rerank import load_reranker

        return load_reranker(config, say)

    return {"dense": dense, "bm25": bm25, "rerank": rerank}
