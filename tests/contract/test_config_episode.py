"""The keys of `[rollout]` that shape an episode: what they resolve to, and what stops the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.contract.config import Config, ConfigError, load_config
from services.contract.messages import Question
from services.contract.transcript import SEARCH_R1, Layout
from services.trainer.feeding.questions import make_group


def load(folder: Path, rollout: str) -> Config:
    path = folder / "run.toml"
    path.write_text(f"[rollout]\n{rollout}\n")
    return load_config(path, {})


def test_the_defaults_are_search_r1s(tmp_path: Path) -> None:
    rollout = load(tmp_path, "max_searches = 4").rollout
    assert (rollout.searches, rollout.layout) == (4, SEARCH_R1)


def test_slimes_max_turns_counts_the_turn_whose_search_nobody_reads(tmp_path: Path) -> None:
    assert load(tmp_path, 'turn_semantics = "slime"\nmax_turns = 2').rollout.searches == 1


def test_a_group_carries_how_it_is_to_be_played(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        'turn_semantics = "slime"\nmax_turns = 3\nmax_invalid_actions = 2\nepisode_deadline_s = 60\n'
        'slow_engine_tokens_per_s = 2.5\npassage_template = "{text}"',
    )
    sampling = make_group(config, "t0", Question("1", "nq", "Who?", ["x"]), 0, evaluate=False).sampling
    assert (sampling.max_searches, sampling.max_invalid_actions) == (2, 2)
    assert (sampling.episode_deadline_s, sampling.slow_engine_tokens_per_s) == (60.0, 2.5)
    assert sampling.layout == Layout("{text}", SEARCH_R1.whole)


@pytest.mark.parametrize(
    ("rollout", "mend"),
    [
        ('turn_semantics = "slime"', "needs rollout.max_turns: set it"),
        ("max_turns = 2", "set that, or set max_searches"),
        ('turn_semantics = "slime"\nmax_turns = 2\nmax_searches = 1', "take it out"),
        ('turn_semantics = "both"', "search-r1"),
        ("max_turns = 0", "greater than or equal to 1"),
        ("max_invalid_actions = -1", "greater than or equal to 0"),
        ("episode_deadline_s = 1800", "must be below rollout.group_deadline_s"),
        ("episode_deadline_s = 600\nslow_engine_tokens_per_s = 2", "lower one of the two"),
        ("slow_engine_tokens_per_s = 0", "greater than 0"),
        ('passage_template = "{title}"', "no {text}"),
        ('passage_template = "{text} {score}"', "not {score}"),
        ('passage_template = "<information>{text}</information>"', "put it into the observation template"),
        ('observation_template = "<information></information>"', "needs {passages} once"),
        ('observation_template = "{passages} {passages}"', "needs {passages} once"),
        ('observation_template = "{passages} <answer>"', "only the model may write"),
        ('observation_template = "<info {passages}>"', "inside angle brackets"),
    ],
)
def test_what_cannot_be_played_stops_the_start(tmp_path: Path, rollout: str, mend: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, rollout)
    assert mend in str(refused.value) and "rollout" in str(refused.value)
