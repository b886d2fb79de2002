"""What each provider is asked, and what is made of its answers."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr

from services.contract.config import ConfigError
from services.contract.config.retriever import WebConfig
from services.retriever.metrics import Metrics
from services.retriever.web.providers import PROVIDERS, Hit, Unreadable, clean, distinct, hits, pages_for
from services.retriever.web.source import Web
from tests.retriever.web_internet import result


def test_serper_is_asked_by_post_with_the_key_in_a_header() -> None:
    ask = PROVIDERS["serper"].ask(WebConfig(country="de", language="fr"), "K", "who is it", 1)
    assert (ask.method, ask.headers, ask.query) == ("POST", {"X-API-KEY": "K"}, {})
    assert ask.json == {"q": "who is it", "num": 10, "page": 2, "gl": "de", "hl": "fr"}


def test_google_is_asked_for_ten_from_start() -> None:
    ask = PROVIDERS["google"].ask(WebConfig(provider="google", engine_id="cx1"), "K", "who", 2)
    assert ask.query == {"key": "K", "cx": "cx1", "q": "who", "num": "10", "start": "21", "gl": "us", "hl": "en"}


def test_serpapi_is_asked_with_its_engine() -> None:
    ask = PROVIDERS["serpapi"].ask(WebConfig(provider="serpapi"), "K", "who", 1)
    assert ask.query == {"api_key": "K", "engine": "google", "q": "who", "start": "10", "gl": "us", "hl": "en"}


def test_serpapi_with_another_engine_gets_no_parameters_of_googles() -> None:
    ask = PROVIDERS["serpapi"].ask(WebConfig(provider="serpapi", engine="duckduckgo"), "K", "who", 0)
    assert ask.query == {"api_key": "K", "engine": "duckduckgo", "q": "who"}


@pytest.mark.parametrize(
    ("provider", "answer"),
    [
        ("serper", {"organic": []}),
        ("serper", {"searchParameters": {"q": "x"}, "credits": 1}),
        ("google", {"kind": "customsearch#search", "searchInformation": {"totalResults": "0"}}),
        ("google", {"queries": {"request": []}}),
        ("serpapi", {"search_metadata": {"status": "Success"}, "error": "Google hasn't returned any results for this query."}),
        ("serpapi", {"search_metadata": {"status": "Success"}, "organic_results": []}),
    ],
)
def test_nothing_found_is_an_empty_list(provider: str, answer: dict[str, Any]) -> None:
    assert PROVIDERS[provider].read(answer) == []


@pytest.mark.parametrize(
    ("provider", "answer", "reason"),
    [
        ("serper", {"message": "Not enough credits", "statusCode": 400}, "Not enough credits"),
        ("serper", {"organic": {"title": "no list"}}, "its results are no list but dict"),
        ("serper", {"organic": None}, "its results are no list but NoneType"),
        (
            "google",
            {"error": {"code": 400, "message": "Request contains an invalid argument."}},
            "Request contains an invalid argument.",
        ),
        ("google", {"surprise": 1}, "none of the fields that results come in, but surprise"),
        ("serpapi", {"search_metadata": {"status": "Error"}, "error": "We could not search."}, "We could not search."),
        ("serpapi", {"search_metadata": {"status": "Processing"}}, "but search_metadata"),
        ("serpapi", {}, "but nothing"),
    ],
)
def test_what_is_no_answer_is_never_an_empty_list(provider: str, answer: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unreadable, match=reason.replace(".", r"\.")):
        PROVIDERS[provider].read(answer)


@pytest.mark.parametrize(("provider", "field"), [("serper", "organic"), ("google", "items"), ("serpapi", "organic_results")])
def test_results_keep_their_order(provider: str, field: str) -> None:
    found = PROVIDERS[provider].read({field: [result(1), result(2)]})
    assert found == [Hit(f"https://example.org/{n}", f"Title {n}", f"Snippet {n}.") for n in (1, 2)]


def test_the_answer_box_comes_first() -> None:
    box = {"title": "Box", "link": "https://example.org/box", "answer": "42", "snippet": "It is 42."}
    found = PROVIDERS["serpapi"].read({"answer_box": box, "organic_results": [result(1)]})
    assert found[0] == Hit("https://example.org/box", "Box", "42 It is 42.")
    assert found[1].title == "Title 1"


@pytest.mark.parametrize("box", [None, [], "42", {}, {"answer": "42"}, {"link": "https://example.org/box"}])
def test_an_answer_box_without_text_or_page_is_no_passage(box: Any) -> None:
    assert len(PROVIDERS["serpapi"].read({"answer_box": box, "organic_results": [result(1)]})) == 1


def test_a_result_without_an_address_does_not_shift_the_others() -> None:
    found = hits([result(1), {"title": "t", "snippet": "s"}, None, "text", result(3, link="javascript:alert(1)"), result(4)])
    assert [hit.title for hit in found] == ["Title 1", "Title 4"]


def test_missing_fields_are_empty() -> None:
    assert hits([{"link": "https://example.org"}, {"link": "https://example.org/2", "title": None, "snippet": ["x"]}]) == [
        Hit("https://example.org", "", ""),
        Hit("https://example.org/2", "", ""),
    ]


def test_an_address_comes_once_where_it_stood_first() -> None:
    urls = ["https://Example.org/a/", "https://example.org/b", "http://example.org/a#part", "https://example.org/A"]
    assert [hit.url for hit in distinct([Hit(url, "", "") for url in urls])] == [urls[0], urls[1], urls[3]]


@pytest.mark.parametrize(("topk", "pages"), [(1, 1), (10, 1), (11, 2), (100, 10), (1000, 10)])
def test_no_more_pages_than_topk_takes(topk: int, pages: int) -> None:
    assert pages_for(topk, WebConfig()) == pages
    assert pages_for(topk, WebConfig(provider="serpapi", engine="duckduckgo")) == 1


def test_half_a_surrogate_pair_and_line_breaks_are_cleaned() -> None:
    assert clean("a\ud83d\n b\u00a0c ") == "a b c"


def test_a_missing_key_names_the_variable() -> None:
    for key in (None, SecretStr("  ")):
        with pytest.raises(ConfigError, match="FORAGE_RETRIEVER__WEB__API_KEY"):
            Web(WebConfig(api_key=key), Metrics())


def test_google_without_an_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"retriever\.web\.engine_id"):
        Web(WebConfig(provider="google", api_key=SecretStr("k")), Metrics())
