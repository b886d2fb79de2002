"""The retriever's client against real HTTP: each row of the table in services/rollout/retrieval.py."""

from __future__ import annotations

import asyncio

import pytest

from services.contract.config import RolloutConfig
from services.rollout import retrieval
from services.rollout.failures import RetrieverError
from services.rollout.retrieval import Passages, Retriever, pause_before_retry
from tests.conftest import free_port
from tests.rollout.standins import StandInRetriever
from tests.rollout.tiny_model import PASSAGES


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "FIRST_PAUSE_S", 0.01)


def ask(url: str, query: str = "capital", topk: int = 2, **rollout: object) -> Passages | None:
    async def run() -> Passages | None:
        async with Retriever(url, RolloutConfig.model_validate({"retrieval_retries": 2} | rollout)) as client:
            return await client.retrieve(query, topk)

    return asyncio.run(run())


def test_asks_as_search_r1_does_and_keeps_ids_and_scores(retriever: StandInRetriever) -> None:
    found = ask(retriever.url + "/")
    assert retriever.requests == [{"queries": ["capital"], "topk": 2, "return_scores": True}]
    assert found and found.contents == PASSAGES
    assert [(ref.id, ref.score) for ref in found.refs] == [("p0", 0.9), ("p1", 0.8)]
    assert found.latency_s > 0


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_passing_failure_is_asked_again(retriever: StandInRetriever, status: int) -> None:
    retriever.statuses = [status, status]
    assert ask(retriever.url)
    assert len(retriever.requests) == 3


def test_a_lasting_failure_is_told_with_address_and_reason(retriever: StandInRetriever) -> None:
    retriever.always = 500
    with pytest.raises(RetrieverError, match=f"{retriever.url}/retrieve failed 3 times, last with: status 500.*the test says so"):
        ask(retriever.url)
    assert len(retriever.requests) == 3


def test_a_retriever_that_is_away_is_told() -> None:
    with pytest.raises(RetrieverError, match="failed 3 times, last with: ClientConnectorError"):
        ask(f"http://127.0.0.1:{free_port()}")


def test_a_retriever_that_hangs_is_left_after_the_timeout(retriever: StandInRetriever) -> None:
    retriever.delay_s = 1.0
    with pytest.raises(RetrieverError, match="TimeoutError"):
        ask(retriever.url, retrieval_timeout_s=0.2, retrieval_retries=0)


def test_a_query_it_refuses_is_the_models_doing(retriever: StandInRetriever) -> None:
    retriever.always = 422
    assert ask(retriever.url) is None
    assert len(retriever.requests) == 1


@pytest.mark.parametrize("status", [400, 404])
def test_a_wrong_address_fails_at_once(retriever: StandInRetriever, status: int) -> None:
    retriever.always = status
    with pytest.raises(RetrieverError, match=f"status {status}.*retriever.url"):
        ask(retriever.url)
    assert len(retriever.requests) == 1


@pytest.mark.parametrize("body", [b"<html>", b'{"result": []}', b'{"result": [[{"id": "1", "text": "no contents"}]]}'])
def test_an_answer_that_cannot_be_read_fails_at_once(retriever: StandInRetriever, body: bytes) -> None:
    retriever.body = body
    with pytest.raises(RetrieverError, match="cannot be read"):
        ask(retriever.url)


def test_documents_without_an_id_are_taken(retriever: StandInRetriever) -> None:
    retriever.body = b'{"result": [[{"document": {"contents": "T\\ntext", "title": "T"}, "score": 1}]]}'
    found = ask(retriever.url)
    assert found and found.refs[0].id == ""


def test_pauses_grow_and_keep_to_what_the_retriever_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "FIRST_PAUSE_S", 0.5)
    assert 0.3 < pause_before_retry(1, 0) < 0.7 < 1.4 < pause_before_retry(3, 0) < 2.6
    assert pause_before_retry(1, 4.0) == 4.0
    assert pause_before_retry(30, 3600) < 20


def test_requests_under_way_are_bounded(retriever: StandInRetriever) -> None:
    retriever.delay_s = 0.2

    async def run() -> float:
        async with Retriever(retriever.url, RolloutConfig(retrieval_concurrency=2)) as client:
            started = asyncio.get_running_loop().time()
            await asyncio.gather(*[client.retrieve(f"q{i}", 1) for i in range(6)])
            return asyncio.get_running_loop().time() - started

    assert asyncio.run(run()) >= 0.6
