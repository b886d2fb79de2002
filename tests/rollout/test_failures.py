"""Every row of the table in services/rollout/failures.py, played: the worker's own clients against an engine and a retriever
that really do it, over HTTP."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from services.contract.codec import Codec
from services.contract.config import Config
from services.rollout import failures, retrieval
from services.rollout.episode import Player, play_episode
from services.rollout.failures import InfrastructureError
from services.rollout.retrieval import Retriever
from services.rollout.tokens import prompt_ids
from tests.conftest import free_port
from tests.factories import make_group, make_sampling
from tests.rollout.scripted_engine import ScriptedEngine, turn
from tests.rollout.standins import StandInRetriever

ROWS = [
    (match[1], match[2].strip(), match[3])
    for match in re.finditer(r"^\| (\w+) +\| ([^|]+)\| (infrastructure|data|model) +\|$", failures.__doc__ or "", re.MULTILINE)
]
LONG_S = 30.0
"""The fakes stop waiting when the test is over."""


class World:
    """An engine that plays a search and then an answer, a retriever that finds two passages; until a test changes something."""

    def __init__(self, codec: Codec, engine: ScriptedEngine, retriever: StandInRetriever) -> None:
        self.codec, self.engine, self.retriever = codec, engine, retriever
        self.search, self.answer = (codec.encode(text) for text in ("<search>France</search>", "<answer>Paris</answer>"))
        self.replies = [turn(self.search), turn(self.answer)]
        self.sampling: dict[str, Any] = {}
        self.group: dict[str, Any] = {}
        self.rollout: dict[str, Any] = {"retrieval_retries": 1, "request_timeout_s": 600}
        self.retriever_url = retriever.url
        self.context = 1000

    def first(self, **changes: Any) -> None:
        """Change the engine's first reply."""
        self.replies[0] = turn(self.search, **changes)

    def raw(self, **changes: Any) -> None:
        self.replies[0] = self.replies[0]._replace(**changes)

    def says(self, *texts: str, finish: str = "stop") -> None:
        self.replies = [turn(self.codec.encode(text), finish=finish) for text in texts]

    async def play(self) -> tuple[str, str]:
        """(class, what was told): the message of the error, or the stop reason."""
        self.engine.replies = self.replies
        config = Config.model_validate({"retriever": {"url": self.retriever_url}, "rollout": self.rollout})
        group = make_group(sampling=make_sampling(**({"max_turn_tokens": 60} | self.sampling)), **self.group)
        async with self.engine.client(config) as engine, Retriever(config.retriever.url, config.rollout) as retriever:
            player = Player(engine.generate, retriever.retrieve, self.codec, self.context)
            try:
                trajectory = await play_episode(group, 0, prompt_ids(group, self.codec, self.context), player)
            except InfrastructureError as error:
                return "infrastructure", str(error)
            except Exception as error:
                return "data", str(error)
        # a turn broken off is no error of `play_episode`; the worker makes it one
        return "infrastructure" if trajectory.status == "aborted" else "model", trajectory.stop_reason


class Cell(NamedTuple):
    make: Callable[[World], object]
    tells: str
    """A pattern in the error's message, or the stop reason."""


def versions(*spans: tuple[int, int, int]) -> list[dict[str, Any]]:
    return [{"version": str(version), "start": start, "end": end} for version, start, end in spans]


def late(world: World, slow_below: float) -> None:
    world.raw(delay_s=0.15)
    world.sampling |= {"episode_deadline_s": 0.1, "slow_engine_tokens_per_s": slow_below}


def logprobs(world: World, *values: object) -> list[list[Any]]:
    """Good log-probs for the first turn, but with `values` for its first tokens."""
    good = [[-0.25, token, None] for token in world.search]
    return [[value, token, None] for value, (_, token, _) in zip(values, good, strict=False)] + good[len(values) :]


CELLS: dict[tuple[str, str], Cell] = {
    ("engine", "cannot be reached"): Cell(
        lambda w: setattr(w.engine, "url", f"http://127.0.0.1:{free_port()}"), "cannot be reached"
    ),
    ("engine", "hangs up in the middle of an answer"): Cell(lambda w: w.raw(hang_up=True), "ClientPayloadError"),
    ("engine", "answers 500"): Cell(lambda w: w.raw(status=500), "answered 500"),
    ("engine", "takes longer than rollout.request_timeout_s"): Cell(
        lambda w: (w.raw(delay_s=LONG_S), w.rollout.update(request_timeout_s=0.2)), "TimeoutError"
    ),
    ("engine", "breaks the turn off"): Cell(lambda w: w.first(finish="abort"), "^aborted$"),
    ("engine", "is slow, and the episode is late"): Cell(lambda w: late(w, 1e6), "the engine is slow"),
    ("engine", "answers what is no JSON"): Cell(lambda w: w.raw(body=b"<html>busy</html>"), "cannot be read"),
    ("engine", "gives no log-probs"): Cell(lambda w: w.first(output_token_logprobs=None), "output_token_logprobs"),
    ("engine", "gives a log-prob that is no number"): Cell(
        lambda w: w.first(output_token_logprobs=logprobs(w, None)), "cannot be read.*Expected `float`, got `null`"
    ),
    ("engine", "gives fewer log-probs than tokens"): Cell(
        lambda w: w.first(output_token_logprobs=logprobs(w)[:-1]), "log-probs that do not belong"
    ),
    ("engine", "gives log-probs of other tokens"): Cell(
        lambda w: w.first(output_token_logprobs=[[-1.0, 9, None]] * len(w.search)), "log-probs that do not belong"
    ),
    ("engine", "samples more tokens than it may"): Cell(lambda w: w.sampling.update(max_turn_tokens=2), "where 1 to 2 were asked"),
    ("engine", "samples no token"): Cell(lambda w: w.replies.insert(0, turn([])), "sampled 0 tokens"),
    ("engine", "reports no version"): Cell(lambda w: w.first(weight_version=None, weight_versions=None), "weight_version"),
    ("engine", "reports versions that leave tokens out"): Cell(
        lambda w: w.first(weight_versions=versions((0, 0, 2))), "does not cover its"
    ),
    ("engine", "goes back to an older version within a turn"): Cell(
        lambda w: w.first(weight_versions=versions((4, 0, 2), (3, 2, len(w.search)))), "went back from policy version 4 to 3"
    ),
    ("engine", "goes back to an older version between turns"): Cell(
        lambda w: w.first(version=7), "went back from policy version 7 to 0"
    ),
    ("engine", "serves an older version than the group was issued for"): Cell(
        lambda w: w.group.update(issued_version=5), "went back from policy version 5 to 0"
    ),
    ("engine", "refuses the request (400)"): Cell(lambda w: w.raw(status=400), "refused the request"),
    ("retriever", "cannot be reached"): Cell(
        lambda w: setattr(w, "retriever_url", f"http://127.0.0.1:{free_port()}"), "failed 2 times, last with: ClientConnectorError"
    ),
    ("retriever", "takes longer than rollout.retrieval_timeout_s"): Cell(
        lambda w: (setattr(w.retriever, "delay_s", 1.0), w.rollout.update(retrieval_timeout_s=0.1)), "TimeoutError"
    ),
    ("retriever", "keeps answering 500"): Cell(lambda w: setattr(w.retriever, "always", 500), "failed 2 times.*status 500"),
    ("retriever", "keeps answering 429"): Cell(lambda w: setattr(w.retriever, "always", 429), "failed 2 times.*status 429"),
    ("retriever", "answers 404"): Cell(lambda w: setattr(w.retriever, "always", 404), "is retriever.url right"),
    ("retriever", "answers what cannot be read"): Cell(lambda w: setattr(w.retriever, "body", b"<html>"), "cannot be read"),
    ("retriever", "refuses the query (422)"): Cell(lambda w: setattr(w.retriever, "always", 422), "^answered$"),
    ("retriever", "finds nothing"): Cell(lambda w: setattr(w.retriever, "body", b'{"result": [[]]}'), "^answered$"),
    ("prompt", "is as long as the context"): Cell(lambda w: setattr(w, "context", 10), "raise model.max_context"),
    ("prompt", "is refused by the chat template"): Cell(lambda w: w.group.update(prompt=[{"role": "user"}]), "content"),
    ("prompt", "leaves an observation no room for a passage"): Cell(
        lambda w: w.sampling.update(max_observation_tokens=5), "raise rollout.max_observation_tokens"
    ),
    ("model", "writes no action"): Cell(lambda w: w.says("Paris", "Paris", "Paris"), "^no_answer$"),
    ("model", "writes a blank query"): Cell(lambda w: w.says("<search> </search>", "<answer>Paris</answer>"), "^answered$"),
    ("model", "writes without end"): Cell(lambda w: w.says("Paris and", finish="length"), "^length$"),
    ("model", "is late at a fast engine"): Cell(lambda w: late(w, 1e-9), "^deadline$"),
}


@pytest.fixture
def world(smollm2_codec: Codec, retriever: StandInRetriever, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(retrieval, "FIRST_PAUSE_S", 0.01)
    engine = ScriptedEngine()
    yield World(smollm2_codec, engine, retriever)
    engine.close()


@pytest.mark.parametrize(("part", "happens", "expected"), ROWS, ids=lambda value: str(value).replace(" ", "-"))
def test_a_failure_is_of_the_class_that_the_table_says(world: World, part: str, happens: str, expected: str) -> None:
    cell = CELLS[part, happens]
    cell.make(world)
    found, told = asyncio.run(world.play())
    assert (found, bool(re.search(cell.tells, told))) == (expected, True), told


def test_the_table_has_no_row_that_is_not_played_and_none_is_played_that_it_has_not() -> None:
    assert len(ROWS) == len(CELLS) and {(part, happens) for part, happens, _ in ROWS} == set(CELLS)


def test_without_a_failure_the_world_plays_to_an_answer(world: World) -> None:
    assert asyncio.run(world.play()) == ("model", "answered")
    assert len(world.engine.requests) == 2 and world.retriever.requests[0]["queries"] == ["France"]
