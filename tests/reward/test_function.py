"""A reward of one's own: what is refused at the start, what it sees, what it may return."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from services.contract.config import ConfigError, RewardConfig
from services.contract.messages import Trajectory
from services.reward.episode import Episode, Passage
from services.reward.function import FunctionFailed, checked, load_function
from services.reward.grade import grade
from tests.factories import make_trajectory

MODULE = """
number = 3
async def waits(episode): return 1.0
def generates(episode): yield 1.0
def nothing(): return 1.0
def two(episode, other): return 1.0
def good(episode, strict=False): return 1.0
class Good:
    def __call__(self, episode): return 0.5
instance = Good()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import nowhere_to_be_found")
    return "own_rewards"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_such_module:reward", "cannot import no_such_module: ModuleNotFoundError"),
        ("broken_rewards:reward", "No module named 'nowhere_to_be_found'"),
        ("own_rewards:missing", "own_rewards has no missing"),
        ("own_rewards:number", "number is int, which cannot be called"),
        ("own_rewards:waits", "waits is async"),
        ("own_rewards:generates", "a generator"),
        ("own_rewards:nothing", "nothing cannot be called with one argument"),
        ("own_rewards:two", "two cannot be called with one argument (missing a required argument: 'other')"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(module: str, name: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_function(name)
    assert told in str(caught.value) and f"reward.function {name}" in str(caught.value)


@pytest.mark.parametrize(("name", "reward"), [("good", 1.0), ("instance", 0.5)])
def test_anything_that_takes_an_episode_can_be_used(module: str, name: str, reward: float) -> None:
    assert grade(make_trajectory(), RewardConfig(), load_function(f"{module}:{name}")).reward == reward


def decided_by(function: Any, trajectory: Trajectory | None = None, **config: Any):
    return grade(trajectory or make_trajectory(), RewardConfig(**config), checked("own:reward", function))


def test_it_sees_the_question_the_golds_the_turns_the_passages_and_the_built_in_figures() -> None:
    seen: list[Episode] = []
    decided_by(lambda episode: seen.append(episode) or 0.0, make_trajectory(answer="Rome"), structure_format_score=0.25)
    (episode,) = seen
    assert episode.question == "What is the capital of France?"
    assert (episode.source, episode.golden_answers, episode.answer) == ("capital", ("Paris",), "Rome")
    assert episode.turns == ("<search>capital of France</search>", "<answer>Rome</answer>")
    assert episode.passages == (Passage("x", "y"),)
    assert (episode.searches, episode.status, episode.stop_reason) == (1, "completed", "answered")
    assert episode.reward == 0.25
    assert episode.parts["format"] == 1.0 and episode.parts["exact_match"] == 0.0


def test_its_parts_are_stored_beside_the_built_in_ones() -> None:
    graded = decided_by(lambda episode: {"reward": episode.reward / 2, "brevity": 0.5})
    assert graded.reward == 0.5
    assert graded.parts["brevity"] == 0.5 and graded.parts["exact_match"] == 1.0 and "reward" not in graded.parts


def test_it_cannot_change_what_others_will_read() -> None:
    def meddles(episode: Episode) -> float:
        episode.parts["exact_match"] = 1.0  # type: ignore[index]
        return 1.0

    with pytest.raises(FunctionFailed, match="own:reward raised TypeError"):
        decided_by(meddles)


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (None, "returned None as 'reward', which is not a finite number"),
        ("1.0", "returned '1.0'"),
        (math.nan, "returned nan"),
        (math.inf, "returned inf"),
        ([1.0], r"returned \[1.0\]"),
        ({}, 'returned a dictionary without "reward"'),
        ({"reward": 1.0, "why": "good"}, "returned 'good' as 'why'"),
        ({"reward": 1.0, 3: 1.0}, "returned 1.0 as 3"),
        ({"reward": 1.0, "f1": 1.0}, "returned f1, which are names of built-in parts"),
    ],
)
def test_what_is_no_reward_is_an_error_that_names_the_function(returned: Any, told: str) -> None:
    with pytest.raises(FunctionFailed, match=f"reward.function own:reward {told}"):
        decided_by(lambda episode: returned)


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), MemoryError()])
def test_what_it_raises_is_an_error_that_names_the_function(error: BaseException) -> None:
    def fails(episode: Episode) -> float:
        raise error

    with pytest.raises(FunctionFailed, match=f"own:reward raised {type(error).__name__}"):
        decided_by(fails)


def test_a_time_limit_that_hits_it_is_passed_on() -> None:
    def slow(episode: Episode) -> float:
        raise SoftTimeLimitExceeded

    with pytest.raises(SoftTimeLimitExceeded):
        decided_by(slow)


def test_the_example_in_the_docs_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (section,) = [block for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "function" in block]
    config = RewardConfig.model_validate(tomllib.loads(section)["reward"])
    assert config.function
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{config.function.partition(':')[0]}.py").write_text(example)
    function = load_function(config.function)
    right = grade(make_trajectory(answer="Paris"), config, function)
    assert right.reward == 0.5 + 0.5 * 0.75 and right.parts["brevity"] == 1.0
    assert grade(make_trajectory(answer="Rome"), config, function).reward == 0.0


def test_every_section_in_the_docs_is_a_configuration() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    sections = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert len(sections) == 2
    for section in sections:
        RewardConfig.model_validate(tomllib.loads(section)["reward"])
