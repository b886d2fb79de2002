"""What two services must do alike, since neither may import the other: prompts, demonstrations, grades."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.contract.codec import Codec
from services.contract.config import load_config
from services.contract.messages import Demonstration, Question, Segment, Span, Trajectory, VersionSpan
from services.contract.transcript import observation
from services.reward.grade import grade
from services.rollout.tokens import prompt_ids
from services.trainer.demonstrations import demonstration_row
from services.trainer.feeding.questions import make_group

CONFIGS = sorted(Path("configs").glob("*.toml"))
DEMONSTRATION = Demonstration(
    "capital:france",
    "What is the capital of France?",
    [
        Segment("model", "<search>France capital</search>"),
        Segment("observation", observation(['"France: Capital"\nThe capital of France is Paris.'])),
        Segment("model", "<answer>Paris</answer>"),
    ],
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_warm_start_shows_the_prompt_that_the_rollout_plays(path: Path, smollm2_codec: Codec) -> None:
    config = load_config(path, environment={})
    question = Question("france", "capital", DEMONSTRATION.question, ["Paris"])
    group = make_group(config, "t0", question, version=0, evaluate=False)
    played = prompt_ids(group, smollm2_codec, config.model.max_context)
    row = demonstration_row(config, smollm2_codec, DEMONSTRATION)
    assert list(row.token_ids[: row.prompt_length]) == played


def test_a_demonstration_is_tokenized_in_the_pieces_that_an_episode_would_have(smollm2_codec: Codec) -> None:
    config = load_config(CONFIGS[0], environment={})
    row = demonstration_row(config, smollm2_codec, DEMONSTRATION)
    pieces = [smollm2_codec.encode(segment.text) for segment in DEMONSTRATION.segments]
    assert list(row.token_ids[row.prompt_length :]) == [token for piece in pieces for token in piece]
    assert list(row.loss_mask) == [1] * len(pieces[0]) + [0] * len(pieces[1]) + [1] * len(pieces[2])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_demonstration_played_by_the_policy_would_earn_the_full_reward(path: Path, smollm2_codec: Codec) -> None:
    config = load_config(path, environment={})
    ids: list[int] = []
    spans: list[Span] = []
    for segment in DEMONSTRATION.segments:
        start, piece = len(ids), smollm2_codec.encode(segment.text)
        ids += piece
        versions = [VersionSpan(0, start, len(ids))] if segment.kind == "model" else []
        spans.append(Span(segment.kind, start, len(ids), segment.text, versions))
    played = Trajectory("t0/0", "t0", [1], ids, [0.0] * len(ids), spans, "completed", "answered", 1.0, golden_answers=["Paris"])
    result = grade(played, config.reward)
    assert result.reward == config.reward.correct
    assert result.parts["exact_match"] == result.parts["format"] == 1.0
