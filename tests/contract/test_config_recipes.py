"""The configurations that nobody runs here: each loads, agrees with itself, and says what it claims to say."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.contract.config import Config, load_config
from services.prepare.catalogue import CATALOGUE
from services.prepare.fetch import named_entries
from services.prepare.question_rows import locate

FILES = sorted(Path("configs").glob("*.toml"))
RECIPES = ["configs/qwen2.5-3b.toml", "configs/search-r1-paper.toml"]
SLIME = {
    "trainer.steps": 3000,
    "trainer.groups_per_step": 32,
    "trainer.samples_per_prompt": 8,
    "rollout.max_turn_tokens": 512,
    "rollout.temperature": 1.0,
    "rollout.max_turns": 2,
    "rollout.searches": 1,
    "rollout.topk": 3,
    "trainer.learning_rate": 1e-6,
    "trainer.weight_decay": 0.01,
    "trainer.beta2": 0.98,
    "trainer.tensor_parallel": 2,
    "trainer.max_tokens_per_microbatch": 9216,
    "trainer.objective.kl_coef": 0.001,
    "trainer.objective.kl_estimator": "low_var",
    "trainer.objective.clip_low": 0.2,
    "trainer.objective.clip_high": 0.28,
    "trainer.objective.entropy_coef": 0.0,
    "trainer.objective.importance": "none",
    "rollout.engine.tensor_parallel": 2,
    "reward.structure_format_score": 0.0,
}
PAPER = {
    "trainer.steps": 500,
    "trainer.groups_per_step": 512,
    "trainer.samples_per_prompt": 5,
    "rollout.searches": 4,
    "rollout.max_turn_tokens": 500,
    "rollout.max_observation_tokens": 500,
    "model.max_context": 4096,
    "trainer.learning_rate": 1e-6,
    "trainer.objective.clip_high": 0.2,
    "trainer.objective.kl_coef": 0.001,
}


def value(config: Config, key: str) -> object:
    found: object = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_configuration_of_ours_loads(path: Path) -> None:
    assert load_config(path, {}).run.name == path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_trial_of_two_steps_needs_no_other_change(path: Path) -> None:
    assert load_config(path, {"FORAGE_TRAINER__STEPS": "2"}).trainer.steps == 2


@pytest.mark.parametrize(("path", "facts"), [(RECIPES[0], SLIME), (RECIPES[1], PAPER)])
def test_a_recipe_says_what_its_origin_says(path: str, facts: dict[str, object]) -> None:
    config = load_config(path, {})
    assert {key: value(config, key) for key in facts} == facts


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_names_what_the_catalogue_has(path: str) -> None:
    config = load_config(path, {})
    assert set(named_entries(config)) == {"qwen2.5-3b", "e5-base-v2", "wiki-18", "wiki-18-e5", "nq-hotpotqa"}
    train, held_out = (locate(config, key)[0].path for key in ("train_questions", "eval_questions"))
    assert (train.name, held_out.name) == ("train.parquet", "test.parquet")


@pytest.mark.parametrize("path", RECIPES)
def test_the_longest_episode_fits(path: str) -> None:
    config = load_config(path, {})
    rollout = config.rollout
    generations = rollout.searches + 1
    longest = generations * rollout.max_turn_tokens + rollout.searches * rollout.max_observation_tokens
    assert min(longest, rollout.max_response_tokens) + 256 <= config.model.max_context
    assert config.trainer.max_tokens_per_microbatch >= config.model.max_context


def test_slimes_steps_are_0_57_of_an_epoch() -> None:
    config = load_config(RECIPES[0], {})
    assert round(config.trainer.steps * config.trainer.groups_per_step / 169_615, 2) == 0.57


def test_the_index_of_wiki_18_is_its_vectors_and_a_header() -> None:
    assert CATALOGUE["wiki-18-e5"].size == 21_015_324 * 768 * 4 + 45


def test_squad_asks_the_trained_policy_as_it_was_trained() -> None:
    trained, asked = (load_config(f"configs/{name}.toml", {}) for name in ("quickstart", "squad-open"))
    same = {"concurrency": 0, "engine": None}
    assert asked.rollout.model_dump() | same == trained.rollout.model_dump() | same
    assert (asked.data.system, asked.data.instruction) == (trained.data.system, trained.data.instruction)
    assert asked.retriever.encoder_family == trained.retriever.encoder_family
