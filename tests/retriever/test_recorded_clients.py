"""Our retriever and the clients of slime and Search-R1: what their own code sent, what it was answered, what it made of that.

`recorded/*-client.json` were written down while the files that `origin` names ran as they are (what they import for training left
out) against a retriever of ours over the passages of `conftest.py`. Each exchange has the request as it came over the wire, our
reply, and the text that the client made of it. While the reply to the same bytes is the same, those clients work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.contract.transcript import observation, passages_text
from tests.retriever.conftest import Running

RECORDED = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "recorded").glob("*.json"))}
EXCHANGES = [(name, number) for name, file in RECORDED.items() for number in range(len(file["exchanges"]))]


def exchange(name: str, number: int) -> dict[str, Any]:
    return RECORDED[name]["exchanges"][number]


def contents(reply: dict[str, Any]) -> list[list[str]]:
    """Of either shape."""
    return [[item.get("document", item)["contents"] for item in found] for found in reply["result"]]


@pytest.mark.parametrize(("name", "number"), EXCHANGES)
def test_their_request_gets_the_reply_that_they_understood(service: Running, name: str, number: int) -> None:
    recorded = exchange(name, number)
    request = recorded["request"]
    answer = service.client.request(
        request["method"], request["path"], content=request["body"].encode(), headers=request["headers"]
    )
    assert answer.status_code == recorded["reply"]["status"] == 200
    expected = recorded["reply"]["body"]["result"]
    for found, wanted in zip(answer.json()["result"], expected, strict=True):
        assert [item.get("document", item) for item in found] == [item.get("document", item) for item in wanted]
        assert [item.keys() for item in found] == [item.keys() for item in wanted]
        assert [item.get("score") for item in found] == pytest.approx([item.get("score") for item in wanted], abs=1e-5)


@pytest.mark.parametrize("number", range(len(RECORDED["slime-client"]["exchanges"])))
def test_slime_showed_its_policy_what_we_would_show_ours(number: int) -> None:
    recorded = exchange("slime-client", number)
    (passages,) = contents(recorded["reply"]["body"])
    assert observation(passages) == recorded["client_made"]


@pytest.mark.parametrize("number", range(len(RECORDED["search-r1-client"]["exchanges"])))
def test_search_r1_lists_the_passages_as_we_do(number: int) -> None:
    recorded = exchange("search-r1-client", number)
    assert [passages_text(passages) for passages in contents(recorded["reply"]["body"])] == recorded["client_made"]


def test_the_recordings_are_of_both_shapes_of_one_query_and_of_several() -> None:
    bodies = [json.loads(exchange(name, number)["request"]["body"]) for name, number in EXCHANGES]
    assert {body["return_scores"] for body in bodies} == {True, False}
    assert {len(body["queries"]) for body in bodies} == {1, 2, 3}
