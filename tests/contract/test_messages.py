"""Every trajectory that keeps the invariants survives the wire unchanged; every one that breaks one is refused."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contract.messages import (
    DeadLetter,
    InvalidMessage,
    PassageRef,
    PromptGroup,
    Question,
    Span,
    Trajectory,
    VersionSpan,
    decode_dead,
    decode_group,
    decode_trajectory,
    encode,
)
from services.contract.transcript import Layout
from tests.factories import make_group, make_sampling, make_trajectory

LOGPROB = st.floats(min_value=-40, max_value=0, allow_nan=False)
COUNTS = st.integers(1, 4)
FEW = settings(max_examples=40, deadline=None)


@st.composite
def model_spans(draw: st.DrawFn, start: int) -> Span:
    end, versions = start, []
    for version, count in draw(st.lists(st.tuples(st.integers(0, 9), COUNTS), min_size=1, max_size=3)):
        versions.append(VersionSpan(version, end, end + count))
        end += count
    return Span("model", start, end, draw(st.text(max_size=20)), versions)


@st.composite
def observation_spans(draw: st.DrawFn, start: int) -> Span:
    passages = draw(st.lists(st.builds(PassageRef, st.text(max_size=5), st.floats(-9, 9)), max_size=3))
    query = draw(st.none() | st.text(max_size=9))
    return Span("observation", start, start + draw(COUNTS), draw(st.text(max_size=20)), [], query, passages, draw(st.floats(0, 9)))


@st.composite
def trajectories(draw: st.DrawFn, first: str | None = None) -> Trajectory:
    """Any valid trajectory; `first` asks for at least one span and names its kind."""
    kinds = draw(st.lists(st.sampled_from(["model", "observation"]), max_size=5))
    spans: list[Span] = []
    for kind in [first, *kinds] if first else kinds:
        start = spans[-1].end if spans else 0
        spans.append(draw(model_spans(start) if kind == "model" else observation_spans(start)))
    length = spans[-1].end if spans else 0
    model = [span.kind == "model" for span in spans for _ in range(span.start, span.end)]
    return Trajectory(
        id=draw(st.text(max_size=9)),
        group_id=draw(st.text(max_size=9)),
        prompt_ids=draw(st.lists(st.integers(0, 200_000), max_size=5)),
        response_ids=draw(st.lists(st.integers(0, 200_000), min_size=length, max_size=length)),
        logprobs=[draw(LOGPROB) if written else 0.0 for written in model],
        spans=spans,
        status=draw(st.sampled_from(["completed", "truncated", "aborted", "failed"])),
        stop_reason=draw(st.text(max_size=9)),
        temperature=draw(st.floats(0.1, 2)),
        question=draw(st.text(max_size=9)),
        golden_answers=draw(st.lists(st.text(max_size=9), max_size=3)),
        answer=draw(st.none() | st.text(max_size=9)),
        reward=draw(st.none() | st.floats(0, 1)),
        reward_parts=draw(st.dictionaries(st.text(max_size=5), st.floats(0, 1), max_size=2)),
    )


@FEW
@given(trajectories())
def test_a_trajectory_survives_the_wire(trajectory: Trajectory) -> None:
    body = encode(trajectory)
    assert decode_trajectory(body) == trajectory
    assert encode(decode_trajectory(body)) == body, "grading compares bytes"


@FEW
@given(trajectories())
def test_the_loss_mask_covers_what_the_model_wrote_and_only_that(trajectory: Trajectory) -> None:
    mask = trajectory.loss_mask
    assert len(mask) == len(trajectory.response_ids)
    assert sum(mask) == sum(v.end - v.start for span in trajectory.spans for v in span.versions)
    assert not any(logprob for logprob, written in zip(trajectory.logprobs, mask, strict=True) if not written)


@FEW
@given(trajectories(first="model"))
def test_the_lowest_version_is_that_of_some_token_and_above_none(trajectory: Trajectory) -> None:
    versions = [v.version for span in trajectory.spans for v in span.versions]
    assert trajectory.lowest_version == min(versions)


def test_without_model_tokens_the_lowest_version_is_minus_one() -> None:
    observed = Span("observation", 0, 2, "x")
    assert make_trajectory(response_ids=[1, 2], logprobs=[0.0, 0.0], spans=[observed]).lowest_version == -1


def test_a_notice_does_not_count_as_a_search() -> None:
    trajectory = make_trajectory()
    spans = [msgspec.structs.replace(span, query=None) for span in trajectory.spans]
    assert (trajectory.searches, msgspec.structs.replace(trajectory, spans=spans).searches) == (1, 0)


def changed(trajectory: Trajectory, index: int, **changes: object) -> dict:
    """The fields of the trajectory with one span changed."""
    spans = list(trajectory.spans)
    spans[index] = msgspec.structs.replace(spans[index], **changes)
    return {"spans": spans}


BREAKS = {
    "a log-prob too few": lambda t: {"logprobs": t.logprobs[:-1]},
    "a log-prob too many": lambda t: {"logprobs": [*t.logprobs, 0.0]},
    "a token more than the spans": lambda t: {"response_ids": [*t.response_ids, 1], "logprobs": [*t.logprobs, 0.0]},
    "no spans": lambda t: {"spans": []},
    "the first span lost": lambda t: {"spans": t.spans[1:]},
    "the last span lost": lambda t: {"spans": t.spans[:-1]},
    "a span twice": lambda t: {"spans": [t.spans[0], *t.spans]},
    "a span beyond the end": lambda t: changed(t, -1, end=t.spans[-1].end + 1),
    "an empty span": lambda t: {"spans": [Span("observation", 0, 0, ""), *t.spans]},
    "a span that runs backwards": lambda t: changed(t, 0, start=t.spans[0].end, end=t.spans[0].start),
    "a kind unknown": lambda t: changed(t, 0, kind="tool", versions=[]) | {"logprobs": [0.0] * len(t.logprobs)},
    "model tokens without a version": lambda t: changed(t, 0, versions=[]),
    "the first version lost": lambda t: changed(t, 0, versions=t.spans[0].versions[1:]),
    "versions twice": lambda t: changed(t, 0, versions=t.spans[0].versions * 2),
    "a version beyond its span": lambda t: changed(t, 0, versions=[VersionSpan(0, 0, t.spans[0].end + 1)]),
    "a version on an observation": lambda t: changed(t, 0, kind="observation") | {"logprobs": [0.0] * len(t.logprobs)},
    "not a number": lambda t: {"logprobs": [math.nan, *t.logprobs[1:]]},
    "minus infinity": lambda t: {"logprobs": [-math.inf, *t.logprobs[1:]]},
}


@pytest.mark.parametrize("name", BREAKS)
@settings(max_examples=12, deadline=None)
@given(trajectory=trajectories(first="model"))
def test_every_broken_invariant_is_refused_when_made_and_when_read(name: str, trajectory: Trajectory) -> None:
    fields = msgspec.structs.asdict(trajectory)
    broken = fields | BREAKS[name](trajectory)
    with pytest.raises(InvalidMessage):
        Trajectory(**broken)
    with pytest.raises(msgspec.ValidationError):
        decode_trajectory(encode(broken))


@FEW
@given(trajectory=trajectories(first="observation"), logprob=st.floats(-9, -1e-6))
def test_a_log_prob_on_an_observed_token_is_refused(trajectory: Trajectory, logprob: float) -> None:
    fields = msgspec.structs.asdict(trajectory) | {"logprobs": [logprob, *trajectory.logprobs[1:]]}
    with pytest.raises(InvalidMessage, match="an observation carries versions or log-probs"):
        Trajectory(**fields)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_raise_one_kind_of_error(body: bytes) -> None:
    for decode in (decode_trajectory, decode_group, decode_dead):
        try:
            decode(body)
        except msgspec.DecodeError:
            continue


@FEW
@given(trajectories(first="model"), st.data())
def test_a_message_cut_short_is_refused(trajectory: Trajectory, data: st.DataObject) -> None:
    body = encode(trajectory)
    with pytest.raises(msgspec.DecodeError):
        decode_trajectory(body[: data.draw(st.integers(0, len(body) - 1))])


@pytest.mark.parametrize("prompt", ["plain text", [{"role": "user", "content": "q"}]])
@pytest.mark.parametrize("purpose", ["train", "eval"])
def test_a_group_survives_the_wire(prompt: str | list, purpose: str) -> None:
    group = make_group(prompt=prompt, purpose=purpose, sampling=make_sampling(temperature=0.7), attempt=3)
    assert decode_group(encode(group)) == group
    assert isinstance(decode_group(encode(group)), PromptGroup)


def test_a_groups_trajectories_are_named_after_it() -> None:
    assert make_group("t7", 3).trajectory_ids() == ["t7/0", "t7/1", "t7/2"]


def test_a_dead_letter_survives_the_wire() -> None:
    letter = DeadLetter("t0", "train", "the retriever answers 500", 3)
    assert decode_dead(encode(letter)) == letter


def test_a_group_written_before_episodes_had_limits_and_layouts_is_still_read() -> None:
    body = msgspec.msgpack.decode(encode(make_group()))
    old = {"temperature", "top_p", "max_turn_tokens", "max_response_tokens", "max_observation_tokens", "max_searches", "topk"}
    body["sampling"] = {name: value for name, value in body["sampling"].items() if name in old}
    assert decode_group(encode(body)) == make_group()


def test_a_group_survives_the_wire_with_its_layout() -> None:
    group = make_group(sampling=make_sampling(layout=Layout("{text}", "({passages})"), max_invalid_actions=2))
    assert decode_group(encode(group)).sampling == group.sampling


SEARCH_R1_ROW = {
    "id": "train_0",
    "question": "who wrote it",
    "golden_answers": ["Ann"],
    "source": "nq",  # theirs is called data_source
    "prompt": [{"role": "user", "content": "Answer the given question. Question: who wrote it?\n"}],
    "ability": "fact-reasoning",
    "reward_model": {"style": "rule", "ground_truth": {"target": ["Ann"]}},
    "extra_info": {"split": "train", "index": 0},
    "metadata": None,
}


def test_a_row_of_search_r1_keeps_its_prompt() -> None:
    question = msgspec.json.decode(msgspec.json.encode(SEARCH_R1_ROW), type=Question)
    assert (question.example_id, question.prompt) == ("nq:train_0", SEARCH_R1_ROW["prompt"])


def test_a_question_without_a_prompt_of_its_own_is_written_without_one() -> None:
    assert b"prompt" not in msgspec.json.encode(Question("1", "nq", "who?", ["Ann"]))


def test_a_prompt_whose_message_lacks_a_role_is_refused() -> None:
    row = msgspec.json.encode(SEARCH_R1_ROW | {"prompt": [{"content": "who?"}]})
    with pytest.raises(msgspec.ValidationError, match="nq:train_0: a message of its prompt has no role"):
        msgspec.json.decode(row, type=Question)
