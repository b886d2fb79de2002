"""BM25 on the real Lucene: the scores of the formula, an honest answer to any text, and the same shape as dense."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.contract.config import Config
from services.retriever.bm25 import Bm25Index
from services.retriever.bm25_build import build_bm25
from services.retriever.build import build_index
from services.retriever.loading import loaders
from tests.retriever.bm25_support import configure, load, rows_of, with_bm25
from tests.retriever.conftest import Running, passage, query, write_corpus


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """100 passages, their BM25 index and that of the hashing encoder. Do not change its folder."""
    config = configure(tmp_path_factory.mktemp("bm25"), backends=["bm25", "dense", "hybrid"])
    build_bm25(config)
    build_index(config)
    return config


@pytest.fixture(scope="module")
def index(built: Config) -> Bm25Index:
    return load(built)


# -- what is found -----------------------------------------------------------------------------------------------------


def bm25_by_hand(texts: list[str], words: list[str], k1: float, b: float) -> list[float]:
    """Robertson's formula with Lucene's idf. Lengths up to 39 words are exact in Lucene, longer ones are rounded."""
    bags = [Counter(re.findall(r"[a-z0-9]+", text.lower())) for text in texts]
    mean = sum(bag.total() for bag in bags) / len(bags)
    scores = [0.0] * len(bags)
    for word in words:
        having = sum(word in bag for bag in bags)
        idf = math.log(1 + (len(bags) - having + 0.5) / (having + 0.5))
        for row, bag in enumerate(bags):
            scores[row] += idf * bag[word] / (bag[word] + k1 * (1 - b + b * bag.total() / mean))
    return scores


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.6, 1.0), (0.5, 0.0)])
def test_scores_are_those_of_the_formula(tmp_path: Path, k1: float, b: float) -> None:
    texts = [  # words that the analyzer leaves as they are
        "zinc tin lead",
        "zinc zinc zinc gold",
        "gold lead lead tin iron carbon radon neon",
        "neon",
        "iron radon radon argon argon argon argon xenon boron tin",
    ]
    config = configure(tmp_path)
    write_corpus(config.data.corpus_path, [{"id": str(n), "contents": text} for n, text in enumerate(texts)])
    build_bm25(config)
    words = ["tin", "zinc", "radon"]
    (found,) = load(with_bm25(config, k1=k1, b=b)).answer([(" ".join(words), 10)])
    by_hand = {text: score for text, score in zip(texts, bm25_by_hand(texts, words, k1, b), strict=True) if score > 0}
    assert [json.loads(p.document)["contents"] for p in found] == sorted(by_hand, key=by_hand.__getitem__, reverse=True)
    assert [p.score for p in found] == pytest.approx(sorted(by_hand.values(), reverse=True), abs=1e-4)  # Anserini rounds to 4


def test_what_is_served_is_the_line_of_the_corpus(index: Bm25Index) -> None:
    for row in (0, 17, 99):
        assert index.answer([(query(row), 3)])[0][0].document == json.dumps(passage(row)).encode()


def test_each_query_of_a_batch_gets_what_it_gets_alone(index: Bm25Index) -> None:
    keys = [(query(row), 1 + row % 5) for row in range(60)] + [("nothing of this kind", 3)]
    assert index.answer(keys) == [index.answer([key])[0] for key in keys]


def test_topk_beyond_the_matches_gives_the_matches_once(index: Bm25Index) -> None:
    assert sorted(rows_of(index, "harbour", 100)) == list(range(0, 100, 10))


ODD_QUERIES = {
    "punctuation": "?!... --- ()[]{} \"'",
    "operators": 'title: harbour AND (violin OR NOT [a TO b] && "x y"~2 ^3 \\',
    "stop words": "the of and",
    "emoji": "🙂🙂 👩‍👩‍👧",
    "long word": "x" * 4000,
    "long text": "harbour " * 500,
    "1,500 terms": " ".join(f"w{number}x" for number in range(1500)),
    "null": "\x00harbour\x00",
    "half a surrogate pair": "\ud800 harbour",
    "wildcards": "* ? harb* har?our",
    "regular expression": "/harb.*/ ",
    "right to left": "‏مرحبا‎",
}


@pytest.mark.parametrize("text", ODD_QUERIES.values(), ids=ODD_QUERIES.keys())
def test_any_text_is_a_bag_of_words(index: Bm25Index, text: str) -> None:
    words = set(re.findall(r"\w+", text.lower()))
    by_place = {row for row in range(100) if words & set(re.findall(r"\w+", passage(row)["contents"].lower())) - {"the", "a"}}
    assert set(rows_of(index, text, 100)) == by_place


def test_a_query_without_a_match_is_an_empty_list(index: Bm25Index) -> None:
    assert index.answer([("zzz", 3), (query(5), 1), ("?", 3)])[::2] == [[], []]


# -- over HTTP ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(built: Config) -> Iterator[Running]:
    running = Running(built.retriever, loaders(built, "REBUILD")).wait_ready()
    yield running
    running.stop()


@pytest.mark.parametrize("scores", [True, False])
def test_answers_have_the_shape_of_dense(service: Running, scores: bool) -> None:
    by_backend = {
        backend: service.retrieve(query(7), query(8), backend=backend, topk=2, return_scores=scores).json()["result"]
        for backend in ("bm25", "dense")
    }
    shapes = [[[set(item) for item in items] for items in result] for result in by_backend.values()]
    assert shapes[0] == shapes[1]
    firsts = [[items[0]["document"] if scores else items[0] for items in result] for result in by_backend.values()]
    assert firsts[0] == firsts[1] == [passage(7), passage(8)]


def test_the_default_is_the_first_backend(service: Running) -> None:
    asked = {name: service.retrieve("harbour", return_scores=True, **named).json() for name, named in BACKENDS.items()}
    assert asked["default"] == asked["bm25"] != asked["dense"]


BACKENDS = {"default": {}, "bm25": {"backend": "bm25"}, "dense": {"backend": "dense"}}


def test_no_match_is_200_with_an_empty_list(service: Running) -> None:
    answer = service.retrieve("zzz", query(4), backend="bm25", topk=1)
    assert (answer.status_code, answer.json()["result"]) == (200, [[], [passage(4)]])


def test_hybrid_fuses_the_two_rankings(service: Running, built: Config) -> None:
    text, depth, k = "harbour violin m0", built.retriever.hybrid.depth, built.retriever.hybrid.k
    wanted: dict[int, float] = defaultdict(float)
    for backend in ("dense", "bm25"):
        for rank, item in enumerate(service.retrieve(text, backend=backend, topk=depth).json()["result"][0], 1):
            wanted[item["extra"]] += 1 / (k + rank)
    (fused,) = service.retrieve(text, backend="hybrid", topk=10, return_scores=True).json()["result"]
    assert [item["score"] for item in fused] == pytest.approx(sorted(wanted.values(), reverse=True)[:10])
    assert all(item["score"] == pytest.approx(wanted[item["document"]["extra"]]) for item in fused)
    assert fused[0]["score"] == pytest.approx(2 / (k + 1))


def test_info_says_what_is_served(service: Running) -> None:
    info = service.client.get("/info").json()["bm25"]
    assert {key: info[key] for key in ("index", "docids", "passages", "k1", "b", "analyzer")} == {
        "index": "built",
        "docids": "rows of the corpus",
        "passages": 100,
        "k1": 0.9,
        "b": 0.4,
        "analyzer": "DefaultEnglishAnalyzer",
    }
