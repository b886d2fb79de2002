"""One episode, with a scripted model and a scripted retriever: every ending, every budget, and what the spans say."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from services.contract import transcript
from services.contract.codec import Codec
from services.contract.messages import Sampling, Trajectory, VersionSpan
from services.contract.transcript import Layout
from services.rollout import episode
from services.rollout.engine import Generation
from services.rollout.episode import Generate, Player, play_episode
from services.rollout.failures import EngineError, RetrieverError
from services.rollout.tokens import prompt_ids
from tests.factories import make_group, make_sampling
from tests.rollout.standins import ScriptedModel, ScriptedRetriever
from tests.rollout.tiny_model import ANSWER, PASSAGES, QUERY, TURNS

SEARCH, FINAL = TURNS
IDLE = "I think of Paris"


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


def test_the_prompt_is_kept_as_text_with_its_special_tokens(codec: Codec) -> None:
    trajectory, _ = play(codec, [FINAL])
    assert trajectory.prompt_text == "<|start|>user\nWhat is the capital of France?<|end|>\n<|start|>assistant\n"


def test_each_turn_is_sampled_from_the_very_ids_of_the_turns_before(codec: Codec) -> None:
    trajectory, model = play(codec, [SEARCH, FINAL])
    observed = trajectory.spans[1].end
    assert model.inputs[0] == trajectory.prompt_ids
    assert model.inputs[1] == trajectory.prompt_ids + trajectory.response_ids[:observed]


def test_spans_decode_to_their_text(codec: Codec) -> None:
    trajectory, _ = play(codec, [IDLE, SEARCH, FINAL])
    for span in trajectory.spans:
        assert codec.decode(trajectory.response_ids[span.start : span.end]) == span.text


def test_a_turn_without_an_action_gets_a_notice_and_takes_the_place_of_a_search(codec: Codec) -> None:
    retriever = ScriptedRetriever()
    trajectory, model = play(codec, [IDLE, SEARCH, SEARCH], retriever, max_searches=2)
    assert texts(trajectory)[:2] == [("model", IDLE), ("observation", transcript.NOTICE)]
    assert retriever.queries == [QUERY] and len(model.inputs) == 3


def test_after_the_last_search_one_turn_can_only_answer(codec: Codec) -> None:
    retriever = ScriptedRetriever()
    trajectory, model = play(codec, [SEARCH] * 3, retriever, max_searches=2)
    assert retriever.queries == [QUERY] * 2 and len(model.inputs) == 3
    assert (trajectory.stop_reason, trajectory.status, trajectory.answer) == ("no_answer", "completed", None)
    assert trajectory.spans[-1].kind == "model" and trajectory.searches == 2


def test_the_answer_after_the_last_search_is_taken(codec: Codec) -> None:
    trajectory, _ = play(codec, [SEARCH, FINAL], max_searches=1)
    assert (trajectory.stop_reason, trajectory.answer) == ("answered", ANSWER)


def test_an_unusable_step_before_the_last_turn_is_told_that_only_an_answer_counts(codec: Codec) -> None:
    trajectory, _ = play(codec, [IDLE, FINAL], max_searches=1)
    assert trajectory.spans[1].text == transcript.ANSWER_ONLY_NOTICE and trajectory.answer == ANSWER


def test_without_searches_the_first_turn_must_answer(codec: Codec) -> None:
    retriever = ScriptedRetriever()
    trajectory, model = play(codec, [SEARCH], retriever, max_searches=0)
    assert (trajectory.stop_reason, len(model.inputs), retriever.queries) == ("no_answer", 1, [])


def test_too_many_unusable_steps_end_the_episode(codec: Codec) -> None:
    trajectory, model = play(codec, [IDLE, SEARCH, IDLE, FINAL], max_searches=9, max_invalid_actions=2)
    assert (trajectory.stop_reason, trajectory.status, len(model.inputs)) == ("invalid_limit", "completed", 3)
    assert trajectory.spans[-1].kind == "model", "nobody would read another notice"


def slow(codec: Codec, turns: list[str], seconds: list[float], monkeypatch: pytest.MonkeyPatch, **sampling: object) -> Trajectory:
    """An episode on a clock of its own: each turn takes so many seconds."""
    clock, script = [0.0], ScriptedModel(codec, turns)

    async def generate(input_ids: list[int], sampling: Sampling, limit: int) -> Generation:
        clock[0] += seconds[len(script.inputs)]
        return await script.generate(input_ids, sampling, limit)

    monkeypatch.setattr(episode, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    limits: dict = {"max_turn_tokens": 100, "max_response_tokens": 900, "max_searches": 5} | sampling
    group = make_group(sampling=make_sampling(**limits))
    player = Player(generate, ScriptedRetriever().retrieve, codec, 1000)
    return asyncio.run(play_episode(group, 0, prompt_ids(group, codec, 1000), player))


def test_a_late_episode_ends_after_its_turn_when_the_engine_kept_up(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"episode_deadline_s": 10.0, "slow_engine_tokens_per_s": 1.0}
    trajectory = slow(codec, [SEARCH] * 5, [4.0, 4.0, 4.0, 4.0, 4.0], monkeypatch, **limits)
    assert (trajectory.stop_reason, trajectory.status) == ("deadline", "truncated")
    assert trajectory.timings["generate_s"] == 12.0


def test_a_late_episode_of_a_slow_engine_is_the_engines_fault(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"episode_deadline_s": 10.0, "slow_engine_tokens_per_s": 1.0}
    with pytest.raises(EngineError, match=r"sampled \d+ tokens of an episode in 99 s"):
        slow(codec, [SEARCH] * 5, [99.0], monkeypatch, **limits)


def test_an_answer_counts_however_late(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory = slow(codec, [FINAL], [99.0], monkeypatch, episode_deadline_s=10.0, slow_engine_tokens_per_s=1.0)
    assert trajectory.stop_reason == "answered"


def test_without_a_deadline_time_does_not_count(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slow(codec, [SEARCH, FINAL], [9999.0, 1.0], monkeypatch).stop_reason == "answered"


def scripted(*turns: Generation) -> Generate:
    """Gives out the turns, whatever is asked."""
    left = list(turns)

    async def generate(input_ids: list[int], sampling: Sampling, limit: int) -> Generation:
        return left.pop(0)

    return generate


def test_an_episode_goes_on_when_the_policy_changes_and_its_tokens_carry_both_versions(codec: Codec) -> None:
    search, answer = codec.encode(SEARCH), codec.encode(FINAL)
    first = Generation(search, [-0.5] * len(search), "stop", [VersionSpan(3, 0, 2), VersionSpan(4, 2, len(search))])
    second = Generation(answer, [-0.5] * len(answer), "stop", [VersionSpan(6, 0, len(answer))])
    group = make_group(issued_version=3)
    player = Player(scripted(first, second), ScriptedRetriever().retrieve, codec, 1000)
    trajectory = asyncio.run(play_episode(group, 0, prompt_ids(group, codec, 1000), player))
    start = trajectory.spans[2].start
    assert trajectory.spans[0].versions == first.versions
    assert trajectory.spans[2].versions == [VersionSpan(6, start, start + len(answer))]
    assert (trajectory.stop_reason, trajectory.lowest_version) == ("answered", 3)


def test_a_token_that_runs_on_behind_the_closing_tag_stays_and_is_no_part_of_the_query(smollm2_codec: Codec) -> None:
    """SmolLM2 has a token "></": with it the model closes its search and begins something else."""
    run_on = [*smollm2_codec.encode("<search>capital of France</search"), *smollm2_codec.encode("></")]
    assert smollm2_codec.decode(run_on[-1:]) == "></", "one token"
    final = smollm2_codec.encode(FINAL)
    turns = [Generation(ids, [-0.5] * len(ids), "stop", [VersionSpan(0, 0, len(ids))]) for ids in (run_on, final)]
    retriever, group = ScriptedRetriever(), make_group()
    player = Player(scripted(*turns), retriever.retrieve, smollm2_codec, 1000)
    trajectory = asyncio.run(play_episode(group, 0, prompt_ids(group, smollm2_codec, 1000), player))
    assert retriever.queries == ["capital of France"]
    assert trajectory.response_ids[: len(run_on)] == run_on and trajectory.spans[0].text.endswith("</search></")
    observed = smollm2_codec.encode(transcript.observation(PASSAGES))
    assert trajectory.response_ids[len(run_on) : len(run_on) + len(observed)] == observed


def test_passages_are_laid_out_as_the_group_says(codec: Codec) -> None:
    layout = Layout("({number}) {text} [{title}]\n", "\n<information>\n{passages}\n</information>\n")
    trajectory, _ = play(codec, [SEARCH, FINAL], layout=layout)
    assert trajectory.spans[1].text == transcript.observation(PASSAGES, layout)
    assert '(1) The capital is Paris. ["France"]' in trajectory.spans[1].text


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


def test_passages_that_were_cut_are_not_listed(codec: Codec) -> None:
    trajectory, _ = play(codec, [SEARCH, FINAL], max_observation_tokens=len(codec.encode(transcript.observation(PASSAGES))) - 1)
    assert [passage.id for passage in trajectory.spans[1].passages] == ["p0"]
