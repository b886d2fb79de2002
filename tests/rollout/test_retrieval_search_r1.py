"""Our client against the shapes of Search-R1's and slime's own retrieval servers, quirks included; and its requests against theirs.

The server here is a fake of theirs: it keeps to what is known of their wire (rows passed through whole, ids that are numbers or
missing, places that FAISS could not fill, 500 where scores are not asked for), over real HTTP.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from services.contract.codec import Codec
from services.contract.config import RolloutConfig
from services.contract.messages import PassageRef
from services.contract.transcript import observation
from services.rollout import retrieval
from services.rollout.episode import Player, play_episode
from services.rollout.failures import RetrieverError
from services.rollout.retrieval import Passages, Retriever
from services.rollout.tokens import prompt_ids
from tests.factories import make_group
from tests.rollout.standins import ScriptedModel

GOLDENS = Path(__file__).parents[1] / "goldens" / "observation_text.json"
CASES = json.loads(GOLDENS.read_text())["cases"]
CLIENT_REQUESTS = [c for c in CASES if c["kind"] == "client_request" and c["client"] == "Search-R1" and len(c["queries"]) == 1]
REPLIES = [c for c in CASES if c["kind"] == "retrieve" and len(c["request"]["queries"]) == 1]
CORPUS: list[dict[str, Any]] = [
    {"id": "0", "contents": '"Peru"\nThe capital of Peru is Lima.'},
    {"id": "1", "contents": '"Lima"\nLima lies on the coast.', "lang": "en"},
    {"id": "2", "contents": '"Chile"\nA country beside Peru.'},
]
UNFILLED = -3.4028234663852886e38
Reply = tuple[int, Any]


def scored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"document": row, "score": 0.9 - place / 10} for place, row in enumerate(rows)]


def dense(request: dict[str, Any]) -> Reply:
    """Search-R1's server over FAISS: 500 unless scores are asked for; a place that cannot be filled shows the last passage."""
    if not isinstance(request.get("queries"), list):
        return 422, {"detail": [{"msg": "Input should be a valid list"}]}
    if not request.get("return_scores"):
        return 500, "Internal Server Error"
    topk = request.get("topk") or 3
    filling = [{"document": CORPUS[-1], "score": UNFILLED}] * (topk - len(CORPUS))
    return 200, {"result": [scored(CORPUS[:topk]) + filling for _ in request["queries"]]}


def bm25(request: dict[str, Any]) -> Reply:
    """Over an index that stores the documents: title without its quotes, the text, the contents, and no id."""
    rows = [{"title": "Peru", "text": "The capital of Peru is Lima.", "contents": CORPUS[0]["contents"]}]
    return 200, {"result": [scored(rows) for _ in request["queries"]]}


def bm25_without_hits(request: dict[str, Any]) -> Reply:
    return 200, {"result": [[] for _ in request["queries"]]}


def web_search(request: dict[str, Any]) -> Reply:
    """Knows only `queries`: as many results as it was started with, wrapped and without scores."""
    return 200, {"result": [[{"document": {"contents": row["contents"]}} for row in CORPUS] for _ in request["queries"]]}


def slime_without_scores(request: dict[str, Any]) -> Reply:
    return 200, {"result": [CORPUS for _ in request["queries"]]}


def numbered(request: dict[str, Any]) -> Reply:
    return 200, {"result": [[{"document": row | {"id": int(row["id"])}, "score": 1} for row in CORPUS] for _ in request["queries"]]}


def reranker(request: dict[str, Any]) -> Reply:
    """Its documents are strings, which no client of theirs can read either."""
    return 200, {"result": [[{"document": '(Title: "Peru") The capital', "score": 0.5}] for _ in request["queries"]]}


class Theirs:
    def __init__(self, answer: Callable[[dict[str, Any]], Reply]) -> None:
        self.answer, self.requests = answer, list[dict[str, Any]]()
        theirs = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                theirs.requests.append(request)
                status, body = theirs.answer(request) if self.path == "/retrieve" else (404, {"detail": "Not Found"})
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Theirs]:
    monkeypatch.setattr(retrieval, "FIRST_PAUSE_S", 0.01)
    server = Theirs(dense)
    yield server
    server.close()


def ask(theirs: Theirs, query: str = "capital of Peru", topk: int = 2) -> Passages:
    async def run() -> Passages | None:
        async with Retriever(theirs.url, RolloutConfig(retrieval_retries=1)) as client:
            return await client.retrieve(query, topk)

    found = asyncio.run(run())
    assert found is not None
    return found


def test_their_dense_server_answers_us(theirs: Theirs) -> None:
    found = ask(theirs)
    assert found.contents == [row["contents"] for row in CORPUS[:2]]
    assert found.refs == [PassageRef("0", 0.9), PassageRef("1", 0.8)]


def test_places_that_faiss_could_not_fill_are_left_out(theirs: Theirs) -> None:
    assert [ref.id for ref in ask(theirs, topk=5).refs] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("answer", "refs"),
    [
        (bm25, [PassageRef("", 0.9)]),
        (bm25_without_hits, []),
        (web_search, [PassageRef("", 0.0)] * 3),
        (slime_without_scores, [PassageRef("0", 0.0), PassageRef("1", 0.0), PassageRef("2", 0.0)]),
        (numbered, [PassageRef("0", 1.0), PassageRef("1", 1.0), PassageRef("2", 1.0)]),
    ],
)
def test_each_of_their_shapes_is_read(theirs: Theirs, answer: Callable[[dict[str, Any]], Reply], refs: list[PassageRef]) -> None:
    theirs.answer = answer
    found = ask(theirs)
    assert found.refs == refs and found.contents == [row["contents"] for row in CORPUS][: len(refs)]


def test_documents_that_are_strings_are_refused_at_once(theirs: Theirs) -> None:
    theirs.answer = reranker
    with pytest.raises(RetrieverError, match="cannot be read"):
        ask(theirs)
    assert len(theirs.requests) == 1


def test_their_500_is_asked_again_and_then_told(theirs: Theirs) -> None:
    theirs.answer = lambda request: (500, "Internal Server Error")
    with pytest.raises(RetrieverError, match="failed 2 times, last with: status 500"):
        ask(theirs)
    assert len(theirs.requests) == 2


@pytest.mark.parametrize("case", CLIENT_REQUESTS, ids=lambda case: case["id"])
def test_our_request_is_the_one_that_their_client_sends(theirs: Theirs, case: dict[str, Any]) -> None:
    ask(theirs, case["queries"][0], case["topk"])
    assert theirs.requests == [case["expected"]["request"]]


@pytest.mark.parametrize("case", REPLIES, ids=lambda case: case["id"])
def test_replies_of_the_goldens_are_read(theirs: Theirs, case: dict[str, Any]) -> None:
    (hits,) = case["expected"]["response"]["result"]
    theirs.answer = lambda request: (200, case["expected"]["response"])
    found = ask(theirs)
    assert found.contents == [hit.get("document", hit)["contents"] for hit in hits]
    assert [ref.score for ref in found.refs] == [hit.get("score", 0.0) for hit in hits]


def test_the_goldens_have_replies_with_and_without_scores() -> None:
    assert {bool(case["request"].get("return_scores")) for case in REPLIES} == {True, False} and CLIENT_REQUESTS


def test_an_episode_is_played_with_their_server(theirs: Theirs, smollm2_codec: Codec) -> None:
    model, group = ScriptedModel(smollm2_codec, ["<search>capital of Peru</search>", "<answer>Lima</answer>"]), make_group()

    async def run() -> Any:
        async with Retriever(theirs.url, RolloutConfig()) as client:
            player = Player(model.generate, client.retrieve, smollm2_codec, 1000)
            return await play_episode(group, 0, prompt_ids(group, smollm2_codec, 1000), player)

    trajectory = asyncio.run(run())
    assert (trajectory.answer, trajectory.searches) == ("Lima", 1)
    assert trajectory.spans[1].text == observation([row["contents"] for row in CORPUS[:2]])
    assert trajectory.spans[1].passages == [PassageRef("0", 0.9), PassageRef("1", 0.8)]
