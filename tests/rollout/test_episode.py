"""One episode, with a scripted model and a scripted retriever: every ending, every budget, and what the spans say."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.contract import transcript
from services.contract.codec import Codec
from services.contract.messages import Trajectory, VersionSpan
from services.rollout.engine import Generation
from services.rollout.episode import STATUS, Player, play_episode
from services.rollout.failures import EngineError, RetrieverError
from services.rollout.tokens import fit_observation, prompt_ids
from tests.factories import make_group, make_sampling
from tests.rollout.standins import ScriptedModel, ScriptedRetriever
from tests.rollout.tiny_model import ANSWER, PASSAGES, QUERY, TURNS

SEARCH, FINAL = TURNS
IDLE = "I think of Paris"
LONG_PASSAGE = ['"France"\n' + "The capital is Paris. " * 60]


def play(
    codec: Codec, turns: list[str], retriever: ScriptedRetriever | None = None, context: int = 1000, **sampling: object
) -> tuple[Trajectory, ScriptedModel]:
    model, group = (
        ScriptedModel(codec, turns),
        make_group(sampling=make_sampling(**({"max_turn_tokens": 100, "max_response_tokens": 900} | sampling))),
    )
    player = Player(model.generate, (retriever or ScriptedRetriever()).retrieve, codec, context)
    return asyncio.run(play_episode(group, 0, prompt_ids(group, codec, context), player)), model


def texts(trajectory: Trajectory) -> list[tuple[str, str]]:
    return [(span.kind, span.text) for span in trajectory.spans]


def test_a_search_and_an_answer(codec: Codec) -> None:
    trajectory, _ = play(codec, [SEARCH, FINAL])
    assert texts(trajectory) == [("model", SEARCH), ("observation", transcript.observation(PASSAGES)), ("model", FINAL)]
    assert (trajectory.stop_reason, trajectory.status, trajectory.answer) == ("answered", "completed", ANSWER)
    assert trajectory.spans[1].query == QUERY and trajectory.searches == 1
    assert [passage.id for passage in trajectory.spans[1].passages] == ["p0", "p1"]
    assert trajectory.golden_answers == ["Paris"] and trajectory.source == "capital"
    assert set(trajectory.timings) == {"generate_s", "retrieve_s", "total_s"}


def test_each_turn_is_sampled_from_the_very_ids_of_the_turns_before(codec: Codec) -> None:
    trajectory, model = play(codec, [SEARCH, FINAL])
    observed = trajectory.spans[1].end
    assert model.inputs[0] == trajectory.prompt_ids
    assert model.inputs[1] == trajectory.prompt_ids + trajectory.response_ids[:observed]


def test_spans_decode_to_their_text(codec: Codec) -> None:
    trajectory, _ = play(codec, [IDLE, SEARCH, FINAL])
    for span in trajectory.spans:
        assert codec.decode(trajectory.response_ids[span.start : span.end]) == span.text


def test_a_turn_without_an_action_gets_a_notice_and_counts(codec: Codec) -> None:
    trajectory, model = play(codec, [IDLE] * 4, max_searches=2)
    assert texts(trajectory)[:3] == [("model", IDLE), ("observation", transcript.NOTICE), ("model", IDLE)]
    assert len(model.inputs) == 4
    assert (trajectory.stop_reason, trajectory.status, trajectory.answer) == ("no_answer", "completed", None)
    assert trajectory.spans[-1].kind == "model"


def test_after_the_last_search_only_an_answer_counts(codec: Codec) -> None:
    retriever = ScriptedRetriever()
    trajectory, model = play(codec, [SEARCH] * 4, retriever, max_searches=2)
    assert retriever.queries == [QUERY] * 2
    assert trajectory.spans[5].text == transcript.ANSWER_ONLY_NOTICE
    assert (trajectory.stop_reason, trajectory.searches, len(model.inputs)) == ("no_answer", 2, 4)


def test_the_answer_after_the_notice_is_taken(codec: Codec) -> None:
    trajectory, _ = play(codec, [SEARCH, SEARCH, FINAL], max_searches=1)
    assert (trajectory.stop_reason, trajectory.answer) == ("answered", ANSWER)


def test_without_searches_the_first_turn_must_answer(codec: Codec) -> None:
    trajectory, _ = play(codec, [SEARCH, FINAL], max_searches=0)
    assert trajectory.spans[1].text == transcript.ANSWER_ONLY_NOTICE and trajectory.searches == 0


def test_a_turn_over_its_budget_ends_the_episode(codec: Codec) -> None:
    trajectory, model = play(codec, [IDLE * 20], max_turn_tokens=10)
    assert model.limits == [10] and len(trajectory.response_ids) == 10
    assert (trajectory.stop_reason, trajectory.status) == ("length", "truncated")


def test_an_action_that_closes_with_the_last_allowed_token_counts(codec: Codec) -> None:
    trajectory, _ = play(codec, [SEARCH, FINAL + " and more"], max_turn_tokens=len(codec.encode(FINAL)))
    assert trajectory.stop_reason == "length"  # the search is longer than the answer
    trajectory, _ = play(codec, [FINAL + " and more"], max_turn_tokens=len(codec.encode(FINAL)))
    assert trajectory.stop_reason == "answered"


def test_a_full_response_ends_with_length_and_a_full_context_with_context(codec: Codec) -> None:
    prompt = len(prompt_ids(make_group(), codec, 1000))
    for context, limit, reason in ((1000, 40, "length"), (prompt + 40, 200, "context")):
        trajectory, _ = play(codec, [IDLE] * 4, context=context, max_response_tokens=limit)
        assert (trajectory.stop_reason, trajectory.status) == (reason, "truncated")
        assert len(trajectory.response_ids) <= 40


def test_an_observation_that_finds_no_room_ends_the_episode_before_it(codec: Codec) -> None:
    trajectory, _ = play(codec, [SEARCH], max_response_tokens=len(codec.encode(SEARCH)) + 5)
    assert [span.kind for span in trajectory.spans] == ["model"]
    assert trajectory.stop_reason == "length"


def test_a_turn_never_gets_more_than_the_room_that_is_left(codec: Codec) -> None:
    _, model = play(codec, [SEARCH, IDLE * 50], max_response_tokens=120, max_observation_tokens=60)
    assert model.limits[1] < 100


def test_an_aborted_turn_ends_the_episode_as_aborted(codec: Codec) -> None:
    async def abort(input_ids: list[int], sampling: object, limit: int) -> Generation:
        return Generation([5, 6], [-1.0, -1.0], "abort", [VersionSpan(3, 0, 2)])

    group = make_group()
    player = Player(abort, ScriptedRetriever().retrieve, codec, 1000)
    trajectory = asyncio.run(play_episode(group, 0, prompt_ids(group, codec, 1000), player))
    assert (trajectory.stop_reason, trajectory.status) == ("aborted", "aborted")


@pytest.mark.parametrize("broken", ["generate", "retrieve"])
def test_a_failing_part_raises_and_leaves_no_trajectory(codec: Codec, broken: str) -> None:
    async def fail(*_: object) -> None:
        raise {"generate": EngineError, "retrieve": RetrieverError}[broken]("gone")

    parts = {"generate": ScriptedModel(codec, [SEARCH]).generate, "retrieve": ScriptedRetriever().retrieve} | {broken: fail}
    group = make_group()
    with pytest.raises((EngineError, RetrieverError), match="gone"):
        asyncio.run(play_episode(group, 0, [1, 2], Player(**parts, codec=codec, context=1000)))  # type: ignore[arg-type]


def test_a_blank_query_is_not_asked_and_finds_nothing(codec: Codec) -> None:
    retriever = ScriptedRetriever()
    trajectory, _ = play(codec, ["<search> </search>", FINAL], retriever)
    assert retriever.queries == [] and trajectory.searches == 0
    assert trajectory.spans[1].text == transcript.observation([])


def test_a_query_the_retriever_cannot_use_finds_nothing(codec: Codec) -> None:
    retriever = ScriptedRetriever()
    retriever.found = None
    trajectory, _ = play(codec, [SEARCH, FINAL], retriever)
    assert trajectory.searches == 0 and trajectory.spans[1].text == transcript.observation([])


def test_an_observation_is_cut_at_a_passage_and_keeps_its_closing_tag(codec: Codec) -> None:
    whole = codec.encode(transcript.observation(PASSAGES))
    ids, shown = fit_observation(PASSAGES, codec.encode, len(whole) - 1)
    assert shown == 1 and codec.decode(ids) == transcript.observation(PASSAGES[:1])
    assert fit_observation(PASSAGES, codec.encode, len(whole)) == (whole, 2)


def test_one_passage_that_is_too_long_is_cut_between_words(codec: Codec) -> None:
    ids, shown = fit_observation(LONG_PASSAGE, codec.encode, 60)
    text = codec.decode(ids)
    assert shown == 1 and 50 < len(ids) <= 60
    assert text.endswith(transcript.INFORMATION_CLOSE) and "The capital is Paris." in text


def test_when_not_a_word_fits_the_empty_observation_stands(codec: Codec) -> None:
    assert fit_observation(LONG_PASSAGE, codec.encode, 1) == (codec.encode(transcript.observation([])), 0)


def test_passages_that_were_cut_are_not_listed(codec: Codec) -> None:
    trajectory, _ = play(codec, [SEARCH, FINAL], max_observation_tokens=len(codec.encode(transcript.observation(PASSAGES))) - 1)
    assert [passage.id for passage in trajectory.spans[1].passages] == ["p0"]


def test_a_prompt_as_long_as_the_context_is_refused(codec: Codec) -> None:
    group = make_group()
    length = len(prompt_ids(group, codec, 1000))
    with pytest.raises(ValueError, match=f"capital:1 has {length} tokens"):
        prompt_ids(group, codec, length)


def test_a_plain_prompt_is_encoded_as_it_is(codec: Codec) -> None:
    assert codec.decode(prompt_ids(make_group(prompt="What is the capital"), codec, 100)) == "What is the capital"


PIECES = [SEARCH, FINAL, IDLE, "<search></search>", "<answer>", "</search>", "<search>a</answer>", "é €", "<|end|>"]


@given(
    turns=st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join), min_size=6, max_size=6),
    limits=st.tuples(st.integers(1, 60), st.integers(1, 300), st.integers(1, 120), st.integers(0, 4), st.integers(24, 330)),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_model_writes_the_episode_ends_within_its_budgets(
    codec: Codec, turns: list[str], limits: tuple[int, int, int, int, int]
) -> None:
    turn_tokens, response_tokens, observation_tokens, searches, context = limits
    trajectory, model = play(
        codec,
        turns,
        context=context,
        max_turn_tokens=turn_tokens,
        max_response_tokens=response_tokens,
        max_observation_tokens=observation_tokens,
        max_searches=searches,
    )
    assert trajectory.stop_reason in STATUS
    assert len(trajectory.response_ids) <= response_tokens
    assert len(trajectory.prompt_ids) + len(trajectory.response_ids) <= context
    assert trajectory.searches <= searches and len(model.inputs) <= searches + 2
    assert all(codec.decode(trajectory.response_ids[s.start : s.end]) == s.text for s in trajectory.spans)
    assert (trajectory.stop_reason == "answered") == (trajectory.answer is not None)
