"""The owner thread by itself: batches, one thread, full queue, failures, shutdown."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any

import pytest

from services.contract.config import Config, RetrieverConfig
from services.retriever.errors import BackendFailure, NotReady, QueueFull
from services.retriever.metrics import Metrics
from services.retriever.owner import Owner
from services.retriever.passages import Passage
from services.retriever.sources import Lookup
from tests.retriever.conftest import load, query, until


class WatchedIndex:
    """The real backend, with a gate before it and a record of who called it and with how much."""

    def __init__(self, config: Config) -> None:
        self.real = load(config)
        self.info, self.canary = self.real.info, self.real.canary
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[str]] = []
        """Queries of each call, the canary's left out."""
        self.threads: set[int] = set()
        self.failure: Exception | None = None
        self._busy = threading.Lock()

    @property
    def seconds(self) -> dict[str, float]:
        return self.real.seconds

    def answer(self, keys: Sequence[Lookup]) -> list[list[Passage]]:
        assert self._busy.acquire(blocking=False), "two threads in the backend"
        try:
            if list(keys) != [self.canary()]:
                self.batches.append([query for query, _ in keys])
            self.threads.add(threading.get_ident())
            assert self.gate.wait(20)
            if self.failure:
                raise self.failure
            return self.real.answer(keys)
        finally:
            self._busy.release()


@pytest.fixture
def backend(indexed: Config) -> WatchedIndex:
    return WatchedIndex(indexed)


@pytest.fixture
def make_owner(backend: WatchedIndex) -> Iterator[Any]:
    owners: list[Owner] = []

    def make(**settings: Any) -> Owner:
        owner = Owner("dense", RetrieverConfig.model_validate(settings), Metrics(), lambda say: backend)
        owners.append(owner)
        owner.start()
        until(lambda: owner.state == "ready")
        return owner

    yield make
    for owner in owners:
        backend.gate.set()
        owner.close(5)
        owner.join(5)


Found = Future[list[list[Passage]]]


def ask(owner: Owner, numbers: Sequence[int], topk: int, **options: Any) -> Found:
    return owner.submit([(query(number), topk) for number in numbers], **options)


def rows(future: Found) -> list[list[int]]:
    return [[json.loads(passage.document)["extra"] for passage in found] for found in future.result(20)]


def hold(owner: Owner, backend: WatchedIndex) -> Found:
    """Keep the owner busy with one query, so that what follows has to wait."""
    backend.gate.clear()
    held = ask(owner, [0], 1)
    until(lambda: backend.batches != [] and owner.depth == 0)
    return held


def test_waiting_queries_of_many_requests_become_one_batch(make_owner: Any, backend: WatchedIndex) -> None:
    owner = make_owner()
    held = hold(owner, backend)
    futures = [ask(owner, [n], 1) for n in range(1, 31)]
    backend.gate.set()
    assert [rows(future) for future in [held, *futures]] == [[[n]] for n in range(31)]
    assert [len(batch) for batch in backend.batches] == [1, 30]


def test_batches_stay_within_the_limit_and_one_request_may_span_them(make_owner: Any, backend: WatchedIndex) -> None:
    owner = make_owner(max_batch=8)
    held = hold(owner, backend)
    future = ask(owner, range(20), 2)
    backend.gate.set()
    wait([held])
    assert [found[0] for found in rows(future)] == list(range(20))
    assert [len(batch) for batch in backend.batches] == [1, 8, 8, 4]


def test_lone_client_does_not_wait_for_company(make_owner: Any) -> None:
    owner = make_owner(batch_wait_ms=5000)
    for n in range(3):
        assert rows(ask(owner, [n], 1)) == [[n]]


def test_equal_queries_in_a_batch_are_searched_once(make_owner: Any, backend: WatchedIndex) -> None:
    owner = make_owner()
    hold(owner, backend)
    futures = [ask(owner, [5], 3) for _ in range(8)]
    backend.gate.set()
    answers = [rows(future) for future in futures]
    assert all(answer == answers[0] for answer in answers)
    assert backend.batches[1] == [query(5)]


def test_topks_of_a_batch_do_not_mix(make_owner: Any, backend: WatchedIndex) -> None:
    owner = make_owner()
    hold(owner, backend)
    futures = {topk: ask(owner, [5], topk) for topk in (1, 7, 3)}
    backend.gate.set()
    assert {topk: len(rows(future)[0]) for topk, future in futures.items()} == {1: 1, 7: 7, 3: 3}


def test_cache_answers_by_query_and_topk_and_forgets_the_oldest(make_owner: Any, backend: WatchedIndex) -> None:
    owner = make_owner(cache_size=2)
    for number, topk in [(1, 2), (1, 2), (1, 3), (2, 2), (1, 2)]:
        assert rows(ask(owner, [number], topk))[0][0] == number
    assert backend.batches == [[query(1)], [query(1)], [query(2)], [query(1)]]
    assert owner.metrics.cache_hits.labels("dense")._value.get() == 1


def test_cache_can_be_switched_off(make_owner: Any, backend: WatchedIndex) -> None:
    owner = make_owner(cache_size=0)
    for _ in range(2):
        rows(ask(owner, [1], 1))
    assert len(backend.batches) == 2


def test_full_queue_refuses_the_whole_request_and_keeps_the_others(make_owner: Any, backend: WatchedIndex) -> None:
    owner = make_owner(queue_size=4, max_queries=4)
    held = hold(owner, backend)
    first = ask(owner, [1, 2, 3], 1)
    with pytest.raises(QueueFull, match="3 queries are waiting for dense, 4 at most"):
        ask(owner, [4, 5], 1)
    assert owner.depth == 3
    backend.gate.set()
    assert [rows(held), rows(first)] == [[[0]], [[1], [2], [3]]]


def test_failed_batch_is_an_error_for_its_requests_and_the_next_one_works(make_owner: Any, backend: WatchedIndex) -> None:
    owner = make_owner()
    backend.failure = RuntimeError("out of memory")
    with pytest.raises(BackendFailure, match="RuntimeError: out of memory"):
        rows(ask(owner, [1], 1))
    assert owner.last_error == "RuntimeError: out of memory"
    backend.failure = None
    assert rows(ask(owner, [1], 1)) == [[1]]
    assert owner.last_error is None


def test_abandoned_queries_are_not_searched(make_owner: Any, backend: WatchedIndex) -> None:
    owner = make_owner()
    hold(owner, backend)
    abandoned, wanted = ask(owner, [1], 1), ask(owner, [2], 1)
    assert abandoned.cancel()
    backend.gate.set()
    assert rows(wanted) == [[2]]
    assert backend.batches[1] == [query(2)]


def test_close_answers_what_waits_and_refuses_what_comes(make_owner: Any, backend: WatchedIndex) -> None:
    owner = make_owner()
    held, waiting = hold(owner, backend), ask(owner, [1], 1)
    owner.close(grace_s=20)
    with pytest.raises(NotReady, match="shutting down"):
        ask(owner, [2], 1)
    backend.gate.set()
    assert [rows(held), rows(waiting)] == [[[0]], [[1]]]
    owner.join(5)
    assert owner.state == "closed"


def test_close_tells_those_who_cannot_be_answered_in_time(make_owner: Any, backend: WatchedIndex) -> None:
    owner = make_owner()
    held, waiting = hold(owner, backend), ask(owner, [1], 1)
    owner.close(grace_s=0)
    backend.gate.set()
    assert rows(held) == [[0]]
    with pytest.raises(NotReady, match="shutting down"):
        waiting.result(5)


def test_failed_load_is_told_to_everyone(indexed: Config) -> None:
    def broken(say: Any) -> Any:
        raise RuntimeError("no such index")

    owner = Owner("dense", indexed.retriever, Metrics(), broken)
    owner.start()
    until(lambda: owner.state == "failed")
    with pytest.raises(NotReady, match="no such index"):
        ask(owner, [1], 1)


def test_one_thread_alone_touches_the_backend_under_load(make_owner: Any, backend: WatchedIndex) -> None:
    owner = make_owner(cache_size=0)
    answers: dict[int, list[list[int]]] = {}
    clients = [threading.Thread(target=lambda n=n: answers.update({n: rows(ask(owner, [n], 3))})) for n in range(64)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert {n: found[0][0] for n, found in answers.items()} == {n: n for n in range(64)}
    assert len(backend.threads) == 1
