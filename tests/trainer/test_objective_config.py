"""Options that contradict each other stop the start, with the key and the mend; so does a function that cannot be used."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from services.contract.config import Config, ConfigError, ObjectiveConfig
from services.trainer.objective.functions import advantages_of, check_functions
from tests.trainer.test_objective_advantages import batch_of

REFUSED = [
    ({"advantage": "ppo"}, '"ppo" is unknown: use one of grpo'),
    ({"loss": "dpo"}, "module:function"),
    ({"gamma": 0.9}, "gamma is read by"),
    ({"loss": "cispo", "dual_clip": 3.0}, "dual_clip does nothing"),
    ({"dual_clip": 1.0}, "greater than 1"),
    ({"aggregate": "fixed_length"}, "set both or neither"),
    ({"fixed_length": 100}, "set both or neither"),
    ({"old_policy": "engine"}, 'set importance = "none"'),
    ({"old_policy": "engine", "importance": "none", "veto": 1e-4}, "reject_level and veto need"),
    ({"kl_in": "reward"}, "set kl_coef above 0"),
    ({"kl_unbiased": True}, "set kl_coef above 0"),
    ({"reference_every": 5}, "set kl_coef above 0"),
    ({"kl_coef": 0.1, "kl_estimator": "k1"}, "no gradient on average"),
    ({"kl_coef": 0.1, "kl_in": "reward"}, 'set kl_in = "loss"'),
    ({"kl_coef": 0.1, "kl_in": "reward", "advantage": "rloo", "kl_unbiased": True}, 'kl_unbiased belongs to kl_in = "loss"'),
    ({"importance_low": 3.0}, "importance_low is above importance_high"),
    ({"importance": "none", "importance_level": "sequence"}, "set importance"),
    ({"importance": "none", "importance_normalize": True}, "set importance"),
    ({"reject_level": "token"}, "set it and reject_low or reject_high"),
    ({"reject_high": 2.0}, "set it and reject_low or reject_high"),
    ({"reject_level": "token", "reject_low": 2.0, "reject_high": 1.0}, "reject_low is above reject_high"),
    ({"veto": 1.5}, "less than 1"),
    ({"dynamic_sampling": True, "advantage": "reinforce_plus_plus"}, "dynamic_sampling would drop"),
    ({"dynamic_sampling": True, "advantage": "gae"}, "dynamic_sampling would drop"),
    ({"advantage": "gae", "gamma": 0.9}, "set gae_gamma instead"),
    ({"gae_gamma": 0.9}, 'gae_gamma: there is a critic with advantage = "gae" only'),
    ({"advantage": "rloo", "gae_lambda": 0.9, "gae_whiten": False}, "gae_lambda, gae_whiten: there is a critic"),
    (
        {"value_clip": 0.5, "critic_learning_rate": 1e-4, "critic_warmup_steps": 2},
        "value_clip, critic_learning_rate, critic_warmup",
    ),
    ({"advantage": "gae", "value_clip": 0.0}, "greater than 0"),
    ({"overlong_tokens": 100}, "overlong_buffer go together"),
    ({"overlong_tokens": 100, "overlong_buffer": 200}, "at most as large"),
]


@pytest.mark.parametrize(("options", "told"), REFUSED)
def test_contradictions_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ObjectiveConfig.model_validate(options)
    assert told in str(caught.value)


def test_all_contradictions_are_told_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        ObjectiveConfig.model_validate({"fixed_length": 9, "kl_in": "reward", "reject_high": 2.0, "overlong_tokens": 9})
    assert all(key in str(caught.value) for key in ("fixed_length", "kl_in", "reject_level", "overlong_buffer"))


@pytest.mark.parametrize(
    ("trainer", "told"),
    [
        ({"objective": {"minibatches": 3}, "groups_per_step": 8}, "objective.minibatches 3"),
        ({"min_learning_rate": 1e-7}, "min_learning_rate does nothing"),
        ({"schedule": "linear", "learning_rate": 1e-6, "min_learning_rate": 1e-5}, "above learning_rate"),
        ({"objective": {"overlong_tokens": 5000, "overlong_buffer": 100}}, "out of reach"),
        ({"samples_per_prompt": 1}, 'samples_per_prompt 1 leaves objective.advantage = "grpo" nothing to compare'),
        (
            {"objective": {"advantage": "gae", "critic_warmup_steps": 20}, "steps": 20},
            "leaves no step of `steps` to train the policy",
        ),
    ],
)
def test_contradictions_with_the_trainer_are_refused(trainer: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"trainer": trainer})
    assert told in str(caught.value)


@pytest.mark.parametrize("advantage", ["gae", "reinforce_plus_plus", "mine:halves"])
def test_an_advantage_without_a_group_takes_single_samples(advantage: str) -> None:
    config = Config.model_validate({"trainer": {"samples_per_prompt": 1, "objective": {"advantage": advantage}}})
    assert config.trainer.samples_per_prompt == 1


def test_sampling_from_less_than_the_distribution_is_refused_where_it_is_trained_on() -> None:
    with pytest.raises(ValidationError, match="top_p 0.9 draws from less than the distribution that log-probs are of"):
        Config.model_validate({"rollout": {"top_p": 0.9}})
    assert Config.model_validate({"rollout": {"top_p": 0.9}, "trainer": {"steps": 0}}).rollout.top_p == 0.9


@pytest.mark.parametrize(
    ("options", "recomputed"),
    [
        ({}, False),
        ({"epochs": 2}, True),
        ({"minibatches": 2}, True),
        ({"importance_normalize": True}, True),
        ({"advantage": "rloo", "kl_coef": 0.1, "kl_in": "reward"}, True),
        ({"epochs": 2, "old_policy": "engine", "importance": "none"}, False),
    ],
)
def test_log_probs_are_recomputed_only_where_they_are_needed(options: dict[str, object], recomputed: bool) -> None:
    assert ObjectiveConfig.model_validate(options).recomputes_logprobs == recomputed


def documented() -> dict[str, str]:
    """{key: default} of the table of every key."""
    text = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
    rows = [line.split("|")[1:3] for line in text.partition("## Every key")[2].partition("\n## ")[0].splitlines()]
    return {cells[0].strip(" `"): cells[1].strip(" `") for cells in rows if len(cells) == 2 and "`" in cells[0]}


def test_the_documentation_has_every_key_and_its_default() -> None:
    shown = {None: "–", True: "true", False: "false"}
    defaults = {name: field.default for name, field in ObjectiveConfig.model_fields.items()}
    wanted = {name: shown[d] if d is None or isinstance(d, bool) else json.dumps(d) for name, d in defaults.items()}
    assert documented() == wanted


def recipes() -> dict[str, dict[str, object]]:
    """{recipe: keys} of the documentation's table; a length that depends on the run is 100."""
    text = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text().partition("## Recipes")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("|")][2:]
    found = {name.strip(): tomllib.loads("\n".join(re.findall(r"`(\w+ = [^`]+)`", keys))) for name, keys in rows}
    return {name: keys | ({"fixed_length": 100} if "fixed_length" in keys.values() else {}) for name, keys in found.items()}


@pytest.mark.parametrize("recipe", recipes())
def test_the_documented_recipes_are_accepted(recipe: str) -> None:
    check_functions(ObjectiveConfig.model_validate(recipes()[recipe]))


MODULE = """
import torch

HUGE = "not a function"

def halves(batch, o):
    return [torch.tensor(0.5) for _ in batch.masks]

def too_few(batch, o):
    return [torch.tensor(0.5)]

def wrong_shape(batch, o):
    return [torch.zeros(99) for _ in batch.masks]

def not_finite(batch, o):
    return [torch.tensor(float("nan")) for _ in batch.masks]

def three_arguments(batch, o, more):
    return []

def plain(tokens, o):
    return -tokens.advantages * tokens.logprobs, torch.zeros_like(tokens.logprobs)

def only_the_loss(tokens, o):
    return -tokens.advantages * tokens.logprobs

def a_scalar(tokens, o):
    return -(tokens.advantages * tokens.logprobs).sum(), torch.zeros_like(tokens.logprobs)

def no_gradient(tokens, o):
    return tokens.advantages, torch.zeros_like(tokens.logprobs)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import torch\nraise RuntimeError('half written')\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("mine")
def test_functions_of_ones_own_are_used() -> None:
    o = ObjectiveConfig(advantage="mine:halves", loss="mine:plain")
    check_functions(o)
    assert [float(a) for a in advantages_of(batch_of([[1.0, 0.0]]), o)] == [0.5, 0.5]


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("key", "name", "told"),
    [
        ("advantage", "nowhere:f", "No module named 'nowhere'"),
        ("advantage", "mine:f", "module mine has no f"),
        ("advantage", "mine:HUGE", "is not a function"),
        ("advantage", "mine:three_arguments", "missing 1 required positional argument"),
        ("advantage", "mine:too_few", "1 tensors for 4 rollouts"),
        ("advantage", "mine:wrong_shape", "shape (99,) for a response of 3 tokens"),
        ("advantage", "mine:not_finite", "not finite"),
        ("advantage", "broken:f", "half written"),
        ("loss", "mine:only_the_loss", "fails on a small example"),
        ("loss", "mine:a_scalar", "two tensors with one value a token"),
        ("loss", "mine:no_gradient", "does not require grad"),
        ("loss", "broken:f", "half written"),
    ],
)
def test_functions_that_cannot_be_used_stop_the_start(key: str, name: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_functions(ObjectiveConfig.model_validate({key: name}))
    assert told in str(caught.value) and f'trainer.objective.{key} = "{name}"' in str(caught.value)


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae"])
@pytest.mark.parametrize("loss", ["clipped", "gspo", "cispo"])
def test_ours_pass_the_same_trial(advantage: str, loss: str) -> None:
    check_functions(ObjectiveConfig(advantage=advantage, loss=loss))
