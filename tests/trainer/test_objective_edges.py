"""Where the objective must refuse, mask, or add up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.objective.advantages import advantages_by_group, group_advantages, zero_variance
from services.trainer.objective.corrections import icepop, mismatch, truncated_importance
from services.trainer.objective.kl import kl_estimate
from services.trainer.objective.losses import rollout_mean, token_mean


def test_an_incomplete_group_is_refused() -> None:
    with pytest.raises(ValueError, match="group 'b' has 1 rollouts, not 2"):
        advantages_by_group([1.0, 0.0, 1.0], ["a", "a", "b"], 2)


def test_a_group_with_too_many_rollouts_is_refused() -> None:
    with pytest.raises(ValueError, match="group 'a' has 3 rollouts, not 2"):
        advantages_by_group([1.0, 0.0, 1.0], ["a", "a", "a"], 2)


def test_rewards_and_groups_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rewards but 1 group ids"):
        advantages_by_group([1.0, 0.0], ["a"], 2)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_groups_of_one_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least two samples"):
        group_advantages(torch.zeros(shape))


def test_zero_variance() -> None:
    assert zero_variance([1.0, 1.0]) and not zero_variance([1.0, 0.0])


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


def test_what_stands_at_observed_tokens_never_matters() -> None:
    mask = torch.tensor([1.0, 0.0])
    train, engine = torch.tensor([-1.0, -1e4]), torch.tensor([-1.25, 1e4])
    for weigh in (truncated_importance, icepop):
        assert weigh(train, engine, mask, 0.0, 2.0)[1] == 0
    gap = mismatch(train, engine, mask, 0.5, 2.0)
    assert gap.ratio[1] == gap.absolute[1] == gap.k3[1] == gap.outside[1] == 0
    values = torch.tensor([2.0, float("inf")])
    assert rollout_mean(values, mask, torch.tensor([1.0, 1.0]), 1) == 2
    assert token_mean(values, mask, 1) == 2


def test_corrections_carry_no_gradient() -> None:
    train = torch.tensor([-1.0], requires_grad=True)
    for weigh in (truncated_importance, icepop):
        assert not weigh(train, torch.tensor([-1.1]), torch.ones(1), 0.0, 2.0).requires_grad


def test_rollouts_without_model_tokens_count_in_the_mean() -> None:
    values, mask = torch.tensor([4.0, 7.0]), torch.tensor([1.0, 0.0])
    assert rollout_mean(values, mask, torch.tensor([1.0, 0.0]), 2) == 2


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 5), min_size=2, max_size=6),
    cut=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
def test_shares_of_a_cut_batch_add_up_to_its_loss(counts: list[int], cut: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, generator=generator, dtype=torch.float64) for n in counts]
    tokens, rollouts = sum(counts), len(counts)

    def shares(part: list[torch.Tensor]) -> torch.Tensor:
        if not part:
            return torch.zeros(2, dtype=torch.float64)
        values, sizes = torch.cat(part), torch.cat([torch.full((len(r),), len(r)) for r in part])
        ones = torch.ones_like(values)
        return torch.stack([rollout_mean(values, ones, sizes, rollouts), token_mean(values, ones, tokens)])

    torch.testing.assert_close(shares(rows[:cut]) + shares(rows[cut:]), shares(rows))
