"""The web backend through the real service: answers and failures of the provider. The provider is a local stand-in."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from services.contract.config import Config
from services.retriever.dense import load_dense
from tests.retriever.conftest import query, until
from tests.retriever.web_internet import (
    KEY,
    Gate,
    Handler,
    Internet,
    ask,  # noqa: F401 - a fixture
    cut,
    internet,  # noqa: F401 - a fixture
    json_answer,
    redirect,
    result,
    serper,
    slow,
    text_answer,
    web_config,
)


def test_the_answer_has_search_r1s_shape(internet: Internet, ask: Any) -> None:  # noqa: F811
    internet.answer(serper(result(1), result(2, title='Say "x"'), result(3), result(4)))
    answer = ask().retrieve("who", topk=2, return_scores=True)
    assert answer.json() == {
        "result": [
            [
                {
                    "document": {
                        "id": "https://example.org/1",
                        "contents": '"Title 1"\nSnippet 1.',
                        "url": "https://example.org/1",
                    },
                    "score": 1.0,
                },
                {
                    "document": {
                        "id": "https://example.org/2",
                        "contents": '"Say "x""\nSnippet 2.',
                        "url": "https://example.org/2",
                    },
                    "score": 0.5,
                },
            ]
        ]
    }


def test_queries_are_answered_in_order(internet: Internet, ask: Any) -> None:  # noqa: F811
    async def echo(request: Any) -> Any:
        return await serper(result(1, title=(await request.json())["q"]))(request)

    internet.answer(echo)
    found = ask().retrieve("one", "two", " one  ", "three").json()["result"]
    assert [passages[0]["contents"].split("\n")[0] for passages in found] == ['"one"', '"two"', '"one"', '"three"']
    assert sorted(asked.json["q"] for asked in internet.asked) == ["one", "three", "two"]


def test_missing_title_and_snippet_have_search_r1s_words(internet: Internet, ask: Any) -> None:  # noqa: F811
    internet.answer(serper({"link": "https://example.org/"}))
    assert ask().retrieve("who").json()["result"][0][0]["contents"] == '"No title."\nNo snippet available.'


def test_nothing_found_is_an_empty_list(internet: Internet, ask: Any) -> None:  # noqa: F811
    internet.answer(serper())
    answer = ask().retrieve("who", "what")
    assert (answer.status_code, answer.json()) == (200, {"result": [[], []]})


def test_more_than_ten_come_from_several_pages(internet: Internet, ask: Any) -> None:  # noqa: F811
    internet.answer(*[serper(*[result(number) for number in range(start, start + 10)]) for start in (0, 8, 18)])
    found = ask().retrieve("who", topk=23).json()["result"][0]
    assert [passage["id"].split("/")[-1] for passage in found] == [str(number) for number in range(23)]
    assert [asked.json["page"] for asked in internet.asked] == [1, 2, 3]


def test_no_page_is_asked_after_the_last(internet: Internet, ask: Any) -> None:  # noqa: F811
    internet.answer(serper(*[result(number) for number in range(7)]), serper())
    running = ask()
    assert len(running.retrieve("who", topk=30).json()["result"][0]) == 7
    assert len(internet.asked) == 2


@pytest.mark.parametrize(("provider", "field"), [("google", "items"), ("serpapi", "organic_results")])
def test_the_other_providers_are_asked_by_get(internet: Internet, ask: Any, provider: str, field: str) -> None:  # noqa: F811
    internet.answer(json_answer({field: [result(1)]}))
    found = ask(provider=provider, engine_id="cx").retrieve("who é & what").json()["result"]
    assert found[0][0]["id"] == "https://example.org/1"
    (asked,) = internet.asked
    assert (asked.method, asked.query["q"]) == ("GET", "who é & what")
    assert KEY in (asked.query.get("key"), asked.query.get("api_key"))


def test_half_a_surrogate_pair_is_answered(internet: Internet, ask: Any) -> None:  # noqa: F811
    internet.answer(text_answer(b'{"organic": [{"link": "https://example.org", "title": "a\\ud83d", "snippet": "b"}]}'))
    assert ask().retrieve("who").json()["result"][0][0]["contents"] == '"a"\nb'


def test_the_same_query_is_paid_for_once(internet: Internet, ask: Any) -> None:  # noqa: F811
    internet.answer(slow(0.3, serper(result(1))))
    running = ask()
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: running.retrieve("who", "who").json(), range(8)))
    assert all(len(answer["result"]) == 2 for answer in answers)
    assert running.retrieve("who", topk=1).status_code == 200
    assert len(internet.asked) == 1
    assert running.metric("cache_hits_total") == 16


def test_kept_answers_expire(internet: Internet, ask: Any) -> None:  # noqa: F811
    internet.answer(serper(result(1)))
    running = ask(cache_ttl_s=0.000001)
    running.retrieve("who")
    running.retrieve("who")
    assert len(internet.asked) == 2


# -- failures ----------------------------------------------------------------------------------------------------------

FAILURES: dict[str, tuple[Handler, int, str, str]] = {
    "bad key": (json_answer({"message": "Unauthorized."}, 401), 1, "serper answered 401: Unauthorized.", "401"),
    "forbidden": (json_answer({"error": {"message": "No."}}, 403), 1, "serper answered 403: No.", "403"),
    "rate": (json_answer({"message": "Too many."}, 429), 3, "serper answered 429: Too many.", "429"),
    "broken": (text_answer("<h1>Oops</h1>", 500), 3, "serper answered 500: <h1>Oops</h1>", "500"),
    "gateway": (text_answer("", 503), 3, "serper answered 503: Service Unavailable", "503"),
    "html": (text_answer("<html>log in</html>"), 1, "serper answered 200, but it is no JSON: <html>log in</html>", "unreadable"),
    "empty": (text_answer(""), 1, "it is no JSON", "unreadable"),
    "list": (json_answer([1]), 1, "its answer is no JSON object but list", "unreadable"),
    "deep": (text_answer("[" * 100_000), 1, "it is no JSON", "unreadable"),
    "reason": (json_answer({"message": "Not enough credits"}), 1, "but Not enough credits", "unreadable"),
    "moved": (redirect("https://example.org/"), 1, "serper answered 302", "302"),
    "cut": (cut, 3, "serper could not be asked: ClientPayloadError", "connection"),
    "slow": (slow(5, serper()), 3, "serper did not answer within 0.2 s", "timeout"),
    "huge": (text_answer("x" * 5_000_000), 3, "an answer of more than 4000000 bytes", "connection"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_a_502_with_its_reason(internet: Internet, ask: Any, name: str) -> None:  # noqa: F811
    handler, attempts, reason, status = FAILURES[name]
    internet.answer(handler)
    running = ask(timeout_s=60, attempt_timeout_s=0.2 if name == "slow" else 30)
    answer = running.retrieve("who")
    assert answer.status_code == 502
    assert answer.json()["detail"].startswith("web: serper")
    assert reason in answer.json()["detail"]
    assert running.retrieve("who").status_code == 502
    counted = running.server.service.metrics.registry.get_sample_value(
        "forage_retriever_web_requests_total", {"provider": "serper", "status": status}
    )
    assert counted == 2 * attempts
    assert len(internet.asked) == 2 * attempts  # the failure was not kept


def test_nobody_there_is_a_502(internet: Internet, ask: Any) -> None:  # noqa: F811
    answer = ask(url="http://127.0.0.1:9/search").retrieve("who")
    assert answer.status_code == 502
    assert "could not be asked: ClientConnectorError" in answer.json()["detail"]


@pytest.mark.parametrize("bad", [json_answer({}, 429), text_answer("", 500), cut], ids=["429", "500", "cut"])
def test_what_passes_is_asked_again(internet: Internet, ask: Any, bad: Handler) -> None:  # noqa: F811
    internet.answer(bad, bad, serper(result(1)))
    assert len(ask().retrieve("who").json()["result"][0]) == 1
    assert len(internet.asked) == 3


def test_retry_after_is_kept(internet: Internet, ask: Any) -> None:  # noqa: F811
    internet.answer(json_answer({}, 429, {"Retry-After": "1"}), serper(result(1)))
    answer = ask().retrieve("who")
    assert answer.status_code == 200
    assert answer.elapsed.total_seconds() >= 1


def test_a_retry_after_beyond_our_time_ends_it_at_once(internet: Internet, ask: Any) -> None:  # noqa: F811
    internet.answer(json_answer({"message": "Quota."}, 429, {"Retry-After": "3600"}))
    answer = ask().retrieve("who")
    assert (answer.status_code, len(internet.asked)) == (502, 1)
    assert answer.elapsed.total_seconds() < 2


def test_one_failed_query_fails_the_request_and_the_others_are_kept(internet: Internet, ask: Any) -> None:  # noqa: F811
    async def only_good(request: Any) -> Any:
        bad = (await request.json())["q"] == "bad"
        return await (slow(0.2, json_answer({"message": "No."}, 400)) if bad else serper(result(1)))(request)

    internet.answer(only_good)
    running = ask()
    assert running.retrieve("good", "bad").status_code == 502
    assert running.retrieve("good").status_code == 200
    assert [asked.json["q"] for asked in internet.asked].count("good") == 1


def test_a_deadline_is_a_504_and_the_paid_answer_is_kept(internet: Internet, ask: Any) -> None:  # noqa: F811
    gate = Gate(serper(result(1)))
    internet.answer(gate)
    running = ask(attempt_timeout_s=60, timeout_s=60)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(running.retrieve, "who", deadline_ms=1500)
        until(lambda: gate.waiting == 1)
        assert waiting.result().status_code == 504
    gate.open()
    assert running.retrieve("who").status_code == 200
    assert len(internet.asked) == 1


def test_what_still_waits_when_its_deadline_passes_is_not_asked(internet: Internet, ask: Any) -> None:  # noqa: F811
    gate = Gate(serper(result(1)))
    internet.answer(gate)
    running = ask(concurrency=1, attempt_timeout_s=60, timeout_s=60)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(running.retrieve, "one")
        until(lambda: gate.waiting == 1)
        assert running.retrieve("two", "three", deadline_ms=100).status_code == 504
        gate.open()
        assert first.result().status_code == running.retrieve("four").status_code == 200
    assert [asked.json["q"] for asked in internet.asked] == ["one", "four"]


def test_more_than_can_wait_is_a_503(internet: Internet, ask: Any) -> None:  # noqa: F811
    gate = Gate(serper(result(1)))
    internet.answer(gate)
    running = ask(queue_size=4, attempt_timeout_s=60, timeout_s=60)
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(running.retrieve, f"{n}a", f"{n}b") for n in range(2)]
        until(lambda: gate.waiting == 4)
        refused = running.retrieve("2a")
        assert refused.status_code == 503
        assert "4 queries are under way to serper, 4 at most" in refused.json()["detail"]
        assert refused.headers["Retry-After"] == "1"
        gate.open()
        assert [answer.result().status_code for answer in waiting] == [200, 200]
    assert running.retrieve("c", "d", "e", "f", "0a", "1b").status_code == 200  # four new ones and two that are kept


def test_info_says_who_is_asked(internet: Internet, ask: Any) -> None:  # noqa: F811
    info = ask().client.get("/info").json()
    assert info["backends"] == ["web"]
    assert info["web"] == {"provider": "serper", "country": "us", "language": "en", "pages": False, "page_chars": 2000}


# -- beside an index, and at the end -----------------------------------------------------------------------------------


def test_web_is_served_beside_an_index(internet: Internet, serve: Any, indexed: Config) -> None:  # noqa: F811
    internet.answer(serper(result(1)))
    web = web_config(internet, ["dense", "web"])
    config = indexed.retriever.model_copy(update={"backends": ["dense", "web"], "web": web.web})
    running = serve(config, lambda say: load_dense(indexed, "REBUILD", say)).wait_ready()
    assert running.retrieve(query(7)).json()["result"][0][0]["id"] == "1007"
    assert running.retrieve(query(7), backend="web").json()["result"][0][0]["id"] == "https://example.org/1"
    internet.answer(json_answer({}, 401))
    assert running.retrieve("other", backend="web").status_code == 502
    assert running.retrieve(query(8)).status_code == 200


def test_who_waits_at_the_stop_is_told(internet: Internet, ask: Any) -> None:  # noqa: F811
    internet.answer(slow(30, serper(result(1))))
    running = ask(attempt_timeout_s=60, timeout_s=60)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(running.retrieve, "who")
        until(lambda: len(internet.asked) == 1)
        running.server.should_exit = True
        answer: httpx.Response = waiting.result(15)
    assert answer.status_code == 503
    assert "shutting down" in answer.json()["detail"]
