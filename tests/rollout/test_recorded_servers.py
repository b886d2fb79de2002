"""Our client and the servers of slime and Search-R1: their own replies, read by the worker.

`recorded/*-server.json` hold what the server that `origin` names replied over HTTP, over four passages and all-MiniLM-L6-v2; it ran
as it is, but that it encoded on a CPU in float32. They are played back here over HTTP.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.rollout.failures import RetrieverError
from services.rollout.retrieval import read_hits
from tests.rollout.test_retrieval_search_r1 import Theirs, ask, theirs  # noqa: F401 - a fixture

RECORDED = {path.stem: json.loads(path.read_text())["exchanges"] for path in (Path(__file__).parent / "recorded").glob("*.json")}
SERVERS = sorted(RECORDED)


def replies(server: str, **request: Any) -> list[dict[str, Any]]:
    """Those to requests with these fields."""
    return [each["reply"] for each in RECORDED[server] if request.items() <= each["request"].items()]


def play(server: Theirs, reply: dict[str, Any]) -> None:
    server.answer = lambda request: (reply["status"], reply["body"])


@pytest.mark.parametrize("server", SERVERS)
def test_their_reply_to_our_request_is_read(server: str, theirs: Theirs) -> None:  # noqa: F811
    (reply,) = replies(server, queries=["capital of Peru"], topk=2, return_scores=True)
    play(theirs, reply)
    found = ask(theirs, "capital of Peru", 2)
    assert theirs.requests == [{"queries": ["capital of Peru"], "topk": 2, "return_scores": True}], "as it was recorded"
    assert found.contents[0] == '"Peru"\nThe capital of Peru is Lima.'
    assert [ref.id for ref in found.refs] == ["0", "2"] and found.refs[0].score == pytest.approx(0.8962, abs=1e-4)


@pytest.mark.parametrize("server", SERVERS)
def test_places_that_their_index_could_not_fill_are_left_out(server: str, theirs: Theirs) -> None:  # noqa: F811
    (reply,) = replies(server, topk=6)
    assert len(reply["body"]["result"][0]) == 6, "four passages, and the last one again for each empty place"
    play(theirs, reply)
    assert sorted(ref.id for ref in ask(theirs, "capital of Peru", 6).refs) == ["0", "1", "2", "3"]


def test_slimes_reply_without_scores_is_read_too() -> None:
    (reply,) = replies("slime-server", return_scores=False)
    assert [hit.document.id for hit in read_hits(json.dumps(reply["body"]).encode())] == ["0", "2"]


def test_search_r1_fails_without_scores_which_is_why_we_ask_for_them(theirs: Theirs) -> None:  # noqa: F811
    (reply,) = replies("search-r1-server", return_scores=False)
    assert reply["status"] == 500
    play(theirs, reply)
    with pytest.raises(RetrieverError, match="status 500"):
        ask(theirs)
