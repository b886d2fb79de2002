"""/retrieve over real HTTP: Search-R1's bodies and answers, its defects mended, and errors instead of empty lists."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.contract.config import Config, RetrieverConfig
from services.retriever.corpus import Corpus
from services.retriever.dense import DenseIndex, load_dense
from services.retriever.index import fill_index
from services.retriever.sources import Lookup
from tests.retriever.conftest import GatedIndex, Running, load, passage, query, until, with_settings, write_corpus

GOLDENS = json.loads((Path(__file__).parent.parent / "goldens" / "observation_text.json").read_text())["cases"]
RETRIEVE = [case for case in GOLDENS if case["kind"] == "retrieve"]
CLIENTS = [case for case in GOLDENS if case["kind"] == "client_request"]
Serve = Callable[..., Running]


class FakeEncoder:
    """Not an encoder: gives query i the i-th unit vector, so that a column of a score matrix can stand for a passage; and
    the canary, which is no query, the first one."""

    def __init__(self, queries: list[str]) -> None:
        self.places, self.dimension = {query: place for place, query in enumerate(queries)}, max(len(queries), 1)

    def encode(self, texts: Sequence[str], role: str) -> np.ndarray:
        return np.eye(self.dimension, dtype=np.float32)[[self.places.get(text, 0) for text in texts]]


def golden_backend(case: dict[str, Any], folder: Path) -> DenseIndex:
    corpus = Corpus.open(write_corpus(folder / "corpus.jsonl", case["corpus"]))
    queries = case["request"]["queries"]
    scores = np.array(case["score_matrix"], np.float32).reshape(len(queries), len(corpus))
    vectors = scores.T if queries else np.zeros((len(corpus), 1), np.float32)
    return DenseIndex(FakeEncoder(queries), fill_index("Flat", np.ascontiguousarray(vectors)), corpus, {})


def refused_by_us(case: dict[str, Any]) -> bool:
    """Where the peers guess, we answer 422: a topk of 0 and an empty list of queries."""
    return case["request"].get("topk") == 0 or not case["request"]["queries"]


@pytest.mark.parametrize("case", RETRIEVE, ids=[case["id"] for case in RETRIEVE])
def test_golden_bodies_get_the_golden_answers(case: dict[str, Any], serve: Serve, tmp_path: Path) -> None:
    config = RetrieverConfig(port=0, topk=case["default_topk"])
    running = serve(config, lambda say: golden_backend(case, tmp_path)).wait_ready()
    answer = running.client.post("/retrieve", json=case["request"])
    if refused_by_us(case):
        assert answer.status_code == 422
    else:
        assert (answer.status_code, answer.json()) == (200, case["expected"]["response"])


@pytest.mark.parametrize("case", CLIENTS, ids=[case["id"] for case in CLIENTS])
def test_both_clients_bodies_get_the_shape_they_read(case: dict[str, Any], service: Running) -> None:
    answer = service.client.post("/retrieve", json=case["expected"]["request"]).json()["result"]
    assert [len(found) for found in answer] == [case["topk"]] * len(case["queries"])
    for item in (item for found in answer for item in found):
        document = item["document"] if case["client"] == "Search-R1" else item
        assert {"id", "contents"} <= document.keys()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shape_depends_on_return_scores_alone(service: Running, count: int) -> None:
    queries = [query(n) for n in range(count)]
    bare = service.retrieve(*queries, topk=2).json()["result"]
    scored = service.retrieve(*queries, topk=2, return_scores=True).json()["result"]
    assert [found[0] for found in bare] == [passage(n) for n in range(count)]
    assert [[item["document"] for item in found] for found in scored] == bare
    assert all(item.keys() == {"document", "score"} and isinstance(item["score"], float) for found in scored for item in found)
    assert all(found[0]["score"] >= found[1]["score"] for found in scored)


def test_topk_beyond_the_corpus_gives_every_passage_once(serve: Serve, indexed: Config) -> None:
    running = serve(with_settings(indexed, max_topk=500).retriever, lambda say: load(indexed)).wait_ready()
    found = running.retrieve(query(1), topk=500, return_scores=True).json()["result"][0]
    assert sorted(int(item["document"]["id"]) for item in found) == list(range(1000, 1100))
    assert min(item["score"] for item in found) > -1.01


def test_default_topk_and_extra_fields(service: Running) -> None:
    assert len(service.retrieve(query(1), topk=None, backend="dense", anything=[1]).json()["result"][0]) == 3


def test_json_has_one_kind_of_number(service: Running) -> None:
    assert len(service.retrieve(query(1), topk=2.0).json()["result"][0]) == 2


def test_body_is_read_whatever_curl_calls_it(service: Running) -> None:
    body = json.dumps({"queries": [query(4)]})
    answer = service.client.post("/retrieve", content=body, headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert answer.json()["result"][0][0] == passage(4)


@pytest.mark.parametrize(
    ("body", "place", "reason"),
    [
        ({}, ["body", "queries"], "Field required"),
        ({"queries": "a"}, ["body", "queries"], "array"),
        ({"queries": None}, ["body", "queries"], "array"),
        ({"queries": []}, ["body", "queries"], "at least 1"),
        ({"queries": ["a"] * 513}, ["body", "queries"], "at most 512"),
        ({"queries": ["a", 5]}, ["body", "queries", 1], "string"),
        ({"queries": ["a", None]}, ["body", "queries", 1], "string"),
        ({"queries": ["a", "b", ""]}, ["body", "queries", 2], "empty or blank"),
        ({"queries": [" \n\t", "b"]}, ["body", "queries", 0], "empty or blank"),
        ({"queries": ["a" * 4001]}, ["body", "queries", 0], "at most 4000"),
        ({"queries": ["a"], "topk": 0}, ["body", "topk"], "greater than or equal to 1"),
        ({"queries": ["a"], "topk": -1}, ["body", "topk"], "greater than or equal to 1"),
        ({"queries": ["a"], "topk": 101}, ["body", "topk"], "less than or equal to 100"),
        ({"queries": ["a"], "topk": "3"}, ["body", "topk"], "integer"),
        ({"queries": ["a"], "topk": 2.5}, ["body", "topk"], "integer"),
        ({"queries": ["a"], "topk": True}, ["body", "topk"], "integer"),
        ({"queries": ["a"], "return_scores": "yes"}, ["body", "return_scores"], "boolean"),
        ({"queries": ["a"], "return_scores": None}, ["body", "return_scores"], "boolean"),
        ([], ["body"], "object"),
        ("text", ["body"], "object"),
    ],
)
def test_bad_body_is_422_with_place_and_reason(service: Running, body: object, place: list[Any], reason: str) -> None:
    answer = service.client.post("/retrieve", json=body)
    assert answer.status_code == 422
    problem = answer.json()["detail"][0]
    assert problem["loc"] == place
    assert reason in problem["msg"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b'{"queries": ["\\ud800"]}', b'{"queries": ["a"], "topk": NaN}', b"[" * 10_000]
)
def test_what_is_not_json_is_422(service: Running, body: bytes) -> None:
    assert service.client.post("/retrieve", content=body).status_code == 422


def test_huge_body_is_422_before_it_is_parsed(serve: Serve, indexed: Config) -> None:
    config = with_settings(indexed, max_queries=2, max_query_chars=100).retriever
    running = serve(config, lambda say: load(indexed)).wait_ready()
    answer = running.client.post("/retrieve", content=b'{"queries": ["' + b"a" * 1_000_000 + b'"]}')
    assert answer.status_code == 422
    assert "larger than" in answer.json()["detail"][0]["msg"]


def test_any_text_of_allowed_length_is_answered(service: Running) -> None:
    for text in ("\x00", "🔥" * 4000, "<search>", "ÿ\u2028", "???"):
        assert service.retrieve(text).status_code == 200


def test_64_clients_at_once_get_what_each_gets_alone(serve: Serve, indexed: Config) -> None:
    config = with_settings(indexed, cache_size=0).retriever
    running = serve(config, lambda say: load(indexed)).wait_ready()

    def ask(number: int) -> list[tuple[str, Any]]:
        found = running.retrieve(query(number), topk=1 + number % 2, return_scores=True).json()["result"][0]
        return [(item["document"]["id"], pytest.approx(item["score"], abs=1e-5)) for item in found]

    alone = [ask(number) for number in range(64)]
    with ThreadPoolExecutor(64) as clients:
        together = list(clients.map(ask, range(64)))
    assert together == alone
    assert running.metric("batch_size_count") < 129


class BrokenIndex:
    """The real backend until `broken` is set; then it raises, as a GPU that has gone would."""

    def __init__(self, config: Config) -> None:
        self.real = load(config)
        self.info, self.canary, self.seconds = self.real.info, self.real.canary, {}
        self.broken = False

    def answer(self, keys: Sequence[Lookup]) -> Any:
        if self.broken:
            raise RuntimeError("device lost")
        return self.real.answer(keys)


def test_backend_failure_is_an_error_and_readiness_tells_until_it_works_again(serve: Serve, indexed: Config) -> None:
    backend = BrokenIndex(indexed)
    running = serve(indexed.retriever, lambda say: backend).wait_ready()
    backend.broken = True
    answer = running.retrieve(query(1))
    assert answer.status_code == 502
    assert "device lost" in answer.json()["detail"]
    assert "result" not in answer.json()
    assert running.client.get("/ready").status_code == 503
    assert running.client.get("/health").status_code == 200
    backend.broken = False
    assert running.client.get("/ready").status_code == 200
    assert running.retrieve(query(1)).json()["result"][0][0] == passage(1)
    assert running.metric("errors_total") == 1


def test_full_queue_is_503_with_retry_after(serve: Serve, indexed: Config) -> None:
    config = with_settings(indexed, queue_size=2, max_queries=2, cache_size=0).retriever
    backend = GatedIndex(indexed)
    running = serve(config, lambda say: backend).wait_ready()
    with ThreadPoolExecutor(2) as clients:
        busy = clients.submit(running.retrieve, query(0))
        assert backend.entered.wait(20)
        waiting = clients.submit(running.retrieve, query(1), query(2))
        until(lambda: running.server.service.owners["dense"].depth == 2)
        refused = running.retrieve(query(3))
        backend.gate.set()
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert "waiting" in refused.json()["detail"]
        assert [busy.result().status_code, waiting.result().status_code] == [200, 200]


def test_stopping_answers_the_batch_in_hand_and_tells_the_rest_503(
    serve: Serve, indexed: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = GatedIndex(indexed)
    running = serve(indexed.retriever, lambda say: backend).wait_ready()
    monkeypatch.setattr("services.retriever.serve.CLOSE_GRACE_S", 0)
    with ThreadPoolExecutor(2) as clients:
        in_hand = clients.submit(running.retrieve, query(0))
        assert backend.entered.wait(20)
        waiting = clients.submit(running.retrieve, query(1))
        until(lambda: running.server.service.owners["dense"].depth == 1)
        running.server.should_exit = True
        time.sleep(0.5)  # uvicorn looks every 0.1 s whether it shall stop
        backend.gate.set()
        assert (in_hand.result().status_code, waiting.result().status_code) == (200, 503)
        assert "shutting down" in waiting.result().json()["detail"]


def test_ready_is_503_with_progress_and_then_200(serve: Serve, indexed: Config) -> None:
    gate = threading.Event()

    def slow(say: Callable[[str], None]) -> DenseIndex:
        say("reading the index ███··· ETA 5s")
        assert gate.wait(20)
        return load_dense(indexed, "REBUILD", say)

    running = serve(indexed.retriever, slow)
    loading = running.client.get("/ready")
    while "starting" in loading.json()["detail"]:
        loading = running.client.get("/ready")
    assert loading.status_code == 503
    assert loading.json() == {"status": "loading", "detail": "dense: reading the index ███··· ETA 5s"}
    assert running.client.get("/health").status_code == 200
    assert running.client.get("/info").status_code == 503
    refused = running.retrieve(query(1))
    assert (refused.status_code, "ETA 5s" in refused.json()["detail"]) == (503, True)
    gate.set()
    running.wait_ready()
    assert running.client.get("/ready").json() == {"status": "ready", "detail": "dense ready"}
    assert running.retrieve(query(1)).status_code == 200


def test_info_says_what_is_served(service: Running) -> None:
    answer = service.client.get("/info").json()
    assert (answer["backends"], answer["default_backend"], answer["max_queries"]) == (["dense"], "dense", 512)
    info = answer["dense"]
    assert info["encoder"] == "hashing-1024-v1"
    assert (info["family"], info["index"], info["passages"], info["dimension"]) == ("hashing", "Flat", 100, 1024)
    assert len(info["index_digest"]) == 64


def test_metrics_count_what_happens(serve: Serve, indexed: Config) -> None:
    running = serve(indexed.retriever, lambda say: load(indexed)).wait_ready()
    for _ in range(2):
        running.retrieve(query(1), query(2))
    running.retrieve("")
    names = ["requests_total", "errors_total", "queries_total", "cache_hits_total", "cache_misses_total", "queue_depth", "passages"]
    assert {name: running.metric(name) for name in names} == dict(zip(names, [3, 1, 4, 2, 2, 0, 100], strict=True))
    for name in ("batch_size_count", "stage_seconds_count"):
        assert running.metric(name) == (1 if name.startswith("batch") else 2)
    assert running.metric("request_seconds_count") == 3


def test_openapi_tells_the_limits(service: Running) -> None:
    body = service.client.get("/openapi.json").json()["paths"]["/retrieve"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["properties"]["queries"]["maxItems"] == 512


def test_app_imports_neither_torch_nor_faiss() -> None:
    code = "import sys, services.retriever.serve; print(sorted({'torch', 'faiss', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
