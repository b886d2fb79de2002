"""Advantages against the goldens, against values worked out by hand, and where they must refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.contract.config import ObjectiveConfig
from services.trainer.objective import advantages
from services.trainer.objective.advantages import (
    ADVANTAGES,
    RolloutBatch,
    baseline_returns,
    discounted_returns,
    gae,
    gae_advantages,
    gae_returns,
    group_advantages,
    reinforce_returns,
    token_rewards,
    whiten,
    zero_variance,
)
from services.trainer.objective.kl import kl_estimate
from tests.trainer.goldens import Golden, assert_equal, cases, double


@pytest.mark.parametrize(
    "case",
    cases(
        "advantages.json",
        lambda c: c["kind"] == "reward_normalization" and c["inputs"]["subtract_mean"] and min(c["inputs"]["group_sizes"]) > 1,
    ),
)
def test_group_normalised_rewards(case: Golden) -> None:
    inputs = case["inputs"]
    groups = double(inputs["rewards"]).split(inputs["group_sizes"])
    baseline = "grpo" if inputs["divide_by_std"] else "dr_grpo"
    assert_equal(torch.cat([group_advantages(group[None], baseline)[0] for group in groups]), case["expected"]["normalized"])


def golden_batch(case: Golden, rewards: list[float]) -> RolloutBatch:
    """Every sample is a group of its own, next to a copy of itself: the golden's rewards are normalised already."""
    i = case["inputs"]
    masks = [torch.tensor(mask).bool() for mask in i["loss_masks"] for _ in range(2)]
    both = zip(i["log_probs"], i["ref_log_probs"], strict=True)
    name = i["kl_estimator"].removesuffix("_kl")
    kl = [kl_estimate(double(new), double(old), name) for new, old in both for _ in range(2)]
    return RolloutBatch(double(rewards).repeat_interleave(2).reshape(-1, 2), masks, kl)


def golden_objective(case: Golden) -> ObjectiveConfig:
    i = case["inputs"]
    kl = {"kl_coef": i["kl_coef"], "kl_in": "reward"} if i["kl_coef"] else {}
    return ObjectiveConfig(advantage=i["estimator"], gamma=i["gamma"], **kl)


def estimator(*names: str):
    return lambda c: c["kind"] == "token_advantages" and c["inputs"]["estimator"] in names and "expected" in c


@pytest.mark.parametrize("case", cases("advantages.json", estimator("reinforce_plus_plus")))
def test_reinforce_plus_plus(case: Golden) -> None:
    inputs, expected = case["inputs"], case["expected"]
    batch = golden_batch(case, inputs["rewards"])
    returns = reinforce_returns(batch, golden_objective(case))[::2]
    for found, wanted in zip(returns, expected["returns"], strict=True):
        assert_equal(found, wanted)
    found = whiten(returns, batch.masks[::2]) if inputs["whiten"] else returns
    for values, wanted in zip(found, expected["advantages"], strict=True):
        assert_equal(values, wanted)


@pytest.mark.parametrize("case", cases("advantages.json", estimator("reinforce_plus_plus_baseline")))
def test_reinforce_plus_plus_with_baseline(case: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case["inputs"]
    # The golden's rewards have lost their group's mean already.
    monkeypatch.setattr(advantages, "group_advantages", lambda rewards, _: rewards)
    batch = golden_batch(case, inputs["rewards"])
    returns, masks = baseline_returns(batch, golden_objective(case))[::2], batch.masks[::2]
    found = whiten(returns, masks) if inputs["whiten"] else returns
    for values, mask, wanted in zip(found, masks, case["expected"]["advantages"], strict=True):
        assert_equal(values[mask], double(wanted)[mask])


@pytest.mark.parametrize("case", cases("advantages.json", lambda c: c["kind"] == "gae"))
def test_gae(case: Golden) -> None:
    inputs, expected = case["inputs"], case["expected"]
    for rewards, values, wanted, returns in zip(
        inputs["token_rewards"], inputs["values"], expected["advantages"], expected["returns"], strict=True
    ):
        mask = torch.ones(len(values), dtype=torch.bool)
        found = gae(double(rewards), double(values), mask, inputs["gamma"], inputs["lambda"])
        assert_equal(found[0], wanted)
        assert_equal(found[1], returns)


def unobserved(case: Golden) -> list[int]:
    """The rollouts in which nothing was observed."""
    return [n for n, mask in enumerate(case["inputs"]["loss_masks"]) if all(mask)]


def some_unobserved(c: Golden) -> bool:
    return estimator("ppo")(c) and not c["inputs"]["whiten"] and bool(unobserved(c))


def gae_objective(**options: object) -> ObjectiveConfig:
    kl = {"kl_in": "reward"} if options.get("kl_coef") else {}
    return ObjectiveConfig.model_validate({"advantage": "gae", **options, **kl})


@pytest.mark.parametrize("case", cases("advantages.json", some_unobserved))
def test_ppo_where_nothing_is_observed(case: Golden) -> None:
    """Where something is, the original lets time and value run on through the observation, which is the policy's doing no more."""
    i, expected = case["inputs"], case["expected"]
    o = gae_objective(gae_gamma=i["gamma"], gae_lambda=i["lambda"], gae_whiten=False, kl_coef=i["kl_coef"])
    for n in unobserved(case):
        own = torch.ones(len(i["loss_masks"][n]), dtype=torch.bool)
        batch = RolloutBatch(double([[i["rewards"][n]]]), [own], [double(expected["kl"][n])], [double(i["values"][n])])
        assert_equal(gae_advantages(batch, o)[0], expected["advantages"][n])
        assert_equal(gae_returns(batch, o)[0], expected["returns"][n])


def two_rollouts() -> RolloutBatch:
    """A search, two tokens observed, an answer; and a single token."""
    masks = [torch.tensor([True, False, False, True]), torch.tensor([True])]
    values = [double([0.5, 9.0, 9.0, 0.25]), double([0.5])]
    return RolloutBatch(double([[1.0], [0.0]]), masks, [double([0.5, 7.0, 7.0, 1.0]), double([0.25])], values)


def test_gae_of_a_batch_by_hand() -> None:
    o = gae_objective(gae_gamma=0.5, gae_lambda=0.5, gae_whiten=False, kl_coef=0.5)
    last, first = (1.0 - 0.5) - 0.25, (0.5 * 0.25 - 0.25) - 0.5
    found = gae_advantages(two_rollouts(), o)
    assert_equal(found[0], [first + 0.25 * last, 0.0, 0.0, last])
    assert_equal(found[1], [-0.125 - 0.5])
    assert_equal(gae_returns(two_rollouts(), o)[0], [first + 0.25 * last + 0.5, 0.0, 0.0, 1.0 - 0.5])


def test_whitening_changes_the_advantages_and_not_what_the_critic_learns() -> None:
    plain, white = gae_objective(gae_whiten=False), gae_objective()
    batch = two_rollouts()
    own = torch.cat([values[mask] for values, mask in zip(gae_advantages(batch, plain), batch.masks, strict=True)])
    found = torch.cat([values[mask] for values, mask in zip(gae_advantages(batch, white), batch.masks, strict=True)])
    assert_equal(found, (own - own.mean()) / (own.var() + 1e-8).sqrt())
    for one, other in zip(gae_returns(batch, plain), gae_returns(batch, white), strict=True):
        assert_equal(one, other)


def test_without_a_critics_values_gae_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the values of a critic"):
        gae_advantages(batch_of([[1.0, 0.0]]), gae_objective())


def test_gae_by_hand() -> None:
    rewards, values, mask = double([0, 0, 0, 1]), double([0.1, 0.2, 0.3, 0.4]), torch.ones(4, dtype=torch.bool)
    assert_equal(gae(rewards, values, mask, 1.0, 0.95)[0], [0.799675, 0.7365, 0.67, 0.6])
    assert_equal(gae(rewards, values, mask, 1.0, 0.95)[1], [0.899675, 0.9365, 0.97, 1.0])


@settings(max_examples=40, deadline=None)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=8), seed=st.integers(0, 99), gamma=st.sampled_from([0.5, 0.9, 1.0]))
def test_gae_goes_past_observations_as_if_they_were_not_there(mask: list[bool], seed: int, gamma: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(mask), generator=draw, dtype=torch.float64)
    own = torch.tensor(mask)
    advantages, returns = gae(rewards, values, own, gamma, 0.9)
    alone = gae(rewards[own], values[own], torch.ones(int(own.sum()), dtype=torch.bool), gamma, 0.9)
    assert_equal(advantages[own], alone[0])
    assert_equal(returns[own], alone[1])
    assert not advantages[~own].any() and not returns[~own].any()


@pytest.mark.parametrize("case", cases("advantages.json", lambda c: c["kind"] == "whiten"))
def test_whitening(case: Golden) -> None:
    values, masks = case["inputs"]["values"], case["inputs"]["masks"]
    found = whiten([double(row) for row in values], [torch.tensor(mask).bool() for mask in masks])
    for row, wanted in zip(found, case["expected"]["whitened"], strict=True):
        assert_equal(row, wanted)


@pytest.mark.parametrize("masks", [[[False, False]], [[True, False]], []])
def test_whitening_of_a_token_or_less_is_no_division_by_zero(masks: list[list[bool]]) -> None:
    found = whiten([double([3.0, 4.0]) for _ in masks], [torch.tensor(mask) for mask in masks])
    assert all(row.isfinite().all() for row in found)


def batch_of(rewards: list[list[float]], tokens: int = 2, kl: float | None = None) -> RolloutBatch:
    grid = double(rewards)
    masks = [torch.ones(tokens, dtype=torch.bool)] * grid.numel()
    return RolloutBatch(grid, masks, None if kl is None else [torch.full((tokens,), kl, dtype=torch.float64)] * grid.numel())


def stacked(name: str, batch: RolloutBatch, **options: object) -> Tensor:
    return torch.stack(ADVANTAGES[name](batch, ObjectiveConfig(advantage=name, **options)))


def test_rloo_by_hand() -> None:
    assert_equal(stacked("rloo", batch_of([[1.0, 0.0, 0.0], [3.0, 1.0, 1.0]])), [1.0, -0.5, -0.5, 2.0, -1.0, -1.0])


def test_rloo_is_the_gap_to_the_mean_of_the_others() -> None:
    rewards = [0.25, 1.0, -0.5, 2.0]
    plain = [reward - (sum(rewards) - reward) / 3 for reward in rewards]
    assert_equal(stacked("rloo", batch_of([rewards])), plain)


def test_rloo_takes_the_summed_kl_off_the_reward() -> None:
    batch = batch_of([[1.0, 0.0]], tokens=3)
    kl = [double([0.1, 0.2, 0.3]), double([0.0, 0.0, 0.5])]
    found = stacked("rloo", RolloutBatch(batch.rewards, batch.masks, kl), kl_coef=2.0, kl_in="reward")
    assert_equal(found, [(1.0 - 1.2) - (0.0 - 1.0), (0.0 - 1.0) - (1.0 - 1.2)])


def test_reinforce_plus_plus_has_mean_0_and_variance_1_over_model_tokens() -> None:
    batch = batch_of([[1.0, 0.0], [0.0, 0.5]], kl=0.3)
    for name in ("reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        values = stacked(name, batch, kl_coef=0.1, kl_in="reward").flatten()
        assert_equal(values.mean(), 0.0)
        assert float(values.var()) == pytest.approx(1.0, abs=1e-6)


def test_the_reward_stands_on_the_last_model_token() -> None:
    mask = torch.tensor([True, False, True, False])
    assert_equal(token_rewards(2.0, mask, double([1.0, 9.0, 3.0, 9.0]), 0.5), [-0.5, 0.0, 0.5, 0.0])
    assert_equal(token_rewards(2.0, torch.tensor([False, False]), None, 0.0), [0.0, 0.0])


def test_discounted_returns_by_hand() -> None:
    assert_equal(discounted_returns(double([1.0, 0.0, 4.0]), 0.5), [2.0, 2.0, 4.0])
    assert discounted_returns(double([]), 0.5).shape == (0,)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline"])
def test_equal_rewards_have_no_advantage(name: str) -> None:
    assert_equal(stacked(name, batch_of([[0.25] * 3, [1.0] * 3])).abs().max(), 0.0)


def test_rewards_without_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4,\): give \[groups, samples\]"):
        RolloutBatch(torch.zeros(4), [torch.ones(1, dtype=torch.bool)] * 4)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline"])
def test_a_groups_baseline_needs_two_samples(name: str) -> None:
    with pytest.raises(ValueError, match="two samples or more"):
        stacked(name, batch_of([[1.0], [0.0]]))


def test_reinforce_plus_plus_learns_from_groups_of_one() -> None:
    found = stacked("reinforce_plus_plus", batch_of([[1.0], [0.0]], tokens=1))
    assert_equal(found.flatten(), double([0.5, -0.5]) / (0.5 + 1e-8) ** 0.5)


def test_an_incomplete_group_is_refused() -> None:
    with pytest.raises(ValueError, match="3 rollouts for 4 rewards: train on complete groups only"):
        RolloutBatch(torch.zeros(2, 2), [torch.ones(1, dtype=torch.bool)] * 3)


def test_zero_variance() -> None:
    assert zero_variance([1.0, 1.0]) and not zero_variance([1.0, 0.0])
    assert not zero_variance([1.0]), "a group of one"
