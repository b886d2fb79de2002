"""Policy losses, KL and averages against the goldens and against the plain formula, values and gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.contract.config import ObjectiveConfig
from services.trainer.objective.kl import kl_estimate
from services.trainer.objective.losses import LOSSES, PolicyTokens, fixed_length_mean, rollout_mean, token_mean, value_loss
from services.trainer.objective.packed import rollout_index, rollout_means, rollout_sums
from tests.trainer.goldens import Golden, assert_equal, cases, double, flat, own, own_rollout, own_rollout_tokens


def golden_loss(case: Golden, name: str, tokens: PolicyTokens) -> tuple[Tensor, Tensor]:
    i = case["inputs"]
    options = {"dual_clip": i["eps_clip_c"]} if i.get("eps_clip_c") else {}
    return LOSSES[name](tokens, ObjectiveConfig(loss=name, clip_low=i["eps_clip"], clip_high=i["eps_clip_high"], **options))


@pytest.mark.parametrize("case", cases("policy_loss.json", lambda c: c["kind"] in ("ppo_clip", "cispo")))
def test_token_losses_and_their_gradients(case: Golden) -> None:
    new, old, advantages = (double(case["inputs"][name]) for name in ("log_probs", "old_log_probs", "advantages"))
    tokens = PolicyTokens(new.requires_grad_(), old, advantages, torch.zeros(len(new), dtype=torch.long))
    loss, clipped = golden_loss(case, "clipped" if case["kind"] == "ppo_clip" else "cispo", tokens)
    loss.sum().backward()
    assert_equal(loss.detach(), case["expected"]["token_loss"])
    assert_equal(clipped, case["expected"]["clipped"])
    assert_equal(new.grad, case["expected"]["grad_log_probs"])


@pytest.mark.parametrize("case", cases("policy_loss.json", lambda c: c["kind"] == "gspo"))
def test_gspo_and_its_gradient(case: Golden) -> None:
    i, expected = case["inputs"], case["expected"]
    masks = i["loss_masks"]
    new, old, advantages = (own(i[name], masks) for name in ("log_probs", "old_log_probs", "advantages"))
    loss, clipped = golden_loss(case, "gspo", PolicyTokens(new.requires_grad_(), old, advantages, own_rollout(masks)))
    loss.sum().backward()
    assert_equal(loss.detach(), own(expected["token_loss"], masks))
    assert_equal(clipped, own(expected["clipped"], masks))
    assert_equal(new.grad, own(expected["grad_log_probs_of_masked_sum"], masks))


ROLLOUTS = [0, 0, 0, 1, 2, 2]
ADVANTAGES = [1.5, 1.5, 1.5, -0.5, 0.7, 0.7]


def by_hand(name: str, new: list[Tensor], old: list[float], low: float, high: float) -> Tensor:
    """The papers' formulas over lists of numbers, one rollout at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for n, (rollout, advantage) in enumerate(zip(ROLLOUTS, ADVANTAGES, strict=True)):
        mates = [k for k, other in enumerate(ROLLOUTS) if other == rollout]
        gap = sum((new[k] - old[k] for k in mates), torch.zeros(())) / len(mates) if name == "gspo" else new[n] - old[n]
        ratio = torch.exp(gap)
        bounded = min(max(float(ratio.detach()), 1 - low), 1 + high)
        if name == "cispo":
            total = total - bounded * advantage * new[n]
        else:
            inner = bounded if bounded != float(ratio.detach()) else ratio
            total = total - torch.minimum(ratio * advantage, inner * torch.tensor(advantage, dtype=torch.float64))
    return total


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("spread", [0.02, 0.6])
def test_gradients_are_those_of_the_plain_formula(name: str, spread: float) -> None:
    draw = torch.Generator().manual_seed(3)
    old = -torch.rand(len(ROLLOUTS), generator=draw, dtype=torch.float64) * 3
    start = old + spread * torch.randn(len(ROLLOUTS), generator=draw, dtype=torch.float64)
    vector, numbers = start.clone().requires_grad_(), [value.clone().requires_grad_() for value in start]
    o = ObjectiveConfig(loss=name, clip_low=0.1, clip_high=0.15)
    loss, _ = LOSSES[name](PolicyTokens(vector, old, double(ADVANTAGES), torch.tensor(ROLLOUTS)), o)
    loss.sum().backward()
    plain = by_hand(name, numbers, old.tolist(), 0.1, 0.15)
    plain.backward()
    assert_equal(loss.sum().detach(), plain.detach())
    assert_equal(vector.grad, [0.0 if n.grad is None else n.grad.item() for n in numbers])


def test_dual_clip_by_hand() -> None:
    new, old = double([-1.0, -1.0]), double([-3.0, -3.0])
    tokens = PolicyTokens(new, old, double([-1.0, 1.0]), torch.tensor([0, 1]))
    assert_equal(LOSSES["clipped"](tokens, ObjectiveConfig(dual_clip=3.0))[0], [3.0, -1.28])
    assert_equal(LOSSES["clipped"](tokens, ObjectiveConfig())[0], [float(torch.exp(double(2.0))), -1.28])


@pytest.mark.parametrize("case", cases("policy_loss.json", lambda c: c["kind"] == "approx_kl"))
def test_kl_estimators(case: Golden) -> None:
    inputs = case["inputs"]
    new, reference = (double(inputs[name]) for name in ("log_probs", "ref_log_probs"))
    old = double(inputs["old_log_probs"]) if inputs["old_log_probs"] else None
    assert_equal(kl_estimate(new, reference, inputs["estimator"].removesuffix("_kl"), old), case["expected"]["kl"])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_unbiased_kl_has_the_gradient_of_the_kl(estimator: str) -> None:
    """Over all tokens of a small vocabulary, weighed by how often an older policy samples each."""
    draw = torch.Generator().manual_seed(0)
    logits, older, reference = torch.randn(3, 5, generator=draw, dtype=torch.float64)
    logits.requires_grad_()
    logprobs = torch.log_softmax(logits, -1)
    old, fixed = torch.log_softmax(older, -1), torch.log_softmax(reference, -1)
    exact = (logprobs.exp() * (logprobs - fixed)).sum()
    sampled = (old.exp() * kl_estimate(logprobs, fixed, estimator, old)).sum()
    assert_equal(sampled.detach(), exact.detach())
    wanted, found = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (exact, sampled))
    assert_equal(found, wanted)


@pytest.mark.parametrize(("estimator", "follows"), [("k1", "nothing"), ("k2", "kl"), ("k3", "reverse")])
def test_what_the_estimators_follow_without_the_weight(estimator: str, follows: str) -> None:
    draw = torch.Generator().manual_seed(1)
    logits, reference = torch.randn(2, 5, generator=draw, dtype=torch.float64)
    logits.requires_grad_()
    logprobs, fixed = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
    wanted = {
        "nothing": 0.0 * logits.sum(),
        "kl": (logprobs.exp() * (logprobs - fixed)).sum(),
        "reverse": (fixed.exp() * (fixed - logprobs)).sum(),
    }[follows]
    sampled = (logprobs.exp().detach() * kl_estimate(logprobs, fixed, estimator)).sum()
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (sampled, wanted)]
    assert_equal(*gradients)


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


def test_the_value_loss_by_hand() -> None:
    values = double([1.0, 0.0, 0.4]).requires_grad_()
    old, returns = double([0.5, 0.5, 0.5]), double([0.0, 1.0, 1.0])
    loss, clipped = value_loss(values, old, returns, 0.2)
    loss.sum().backward()
    # near = .7, .3, .4: the plain error is the larger one twice; the third lies inside.
    assert_equal(loss.detach(), [1.0, 1.0, 0.36])
    assert_equal(clipped, [0.0, 0.0, 0.0])
    assert_equal(values.grad, [2.0, -2.0, -1.2])


def test_the_value_loss_stops_where_the_critic_went_far_towards_the_return() -> None:
    values = double([0.9]).requires_grad_()
    loss, clipped = value_loss(values, double([0.5]), double([1.0]), 0.2)
    loss.sum().backward()
    assert_equal(loss.detach(), [0.09])
    assert_equal(clipped, [1.0])
    assert_equal(values.grad, [0.0])


@pytest.mark.parametrize("case", cases("policy_loss.json", lambda c: c["kind"] == "aggregate"))
def test_both_averages(case: Golden) -> None:
    inputs, expected = case["inputs"], case["expected"]
    values, masks = flat(inputs["values"])[flat(inputs["loss_masks"]).bool()], inputs["loss_masks"]
    ones = torch.ones_like(values)
    found = rollout_mean(values, ones, own_rollout_tokens(masks, inputs["rollout_ids"]), inputs["global_batch_size"])
    assert_equal(found, expected["per_rollout"]["value"])
    assert_equal(token_mean(values, ones, expected["per_token"]["num_tokens"]), expected["per_token"]["value"])


def test_a_fixed_length_weighs_all_tokens_alike() -> None:
    values, keep = double([2.0, 4.0, 6.0]), torch.tensor([1.0, 0.0, 1.0])
    assert_equal(fixed_length_mean(values, keep, rollouts=2, length=10), 0.4)


def test_an_infinity_at_a_token_left_out_does_not_matter() -> None:
    values, keep, sizes = double([2.0, float("inf")]), torch.tensor([1.0, 0.0]), double([2.0, 2.0])
    assert [float(mean) for mean in (rollout_mean(values, keep, sizes, 1), token_mean(values, keep, 2))] == [1.0, 1.0]


def test_rollouts_without_model_tokens_count_in_the_mean() -> None:
    assert rollout_mean(double([4.0]), torch.ones(1), double([1.0]), 2) == 2


def shares(part: list[Tensor], rollouts: int, tokens: int) -> Tensor:
    if not part:
        return torch.zeros(3, dtype=torch.float64)
    values, sizes = torch.cat(part), torch.cat([torch.full((len(r),), len(r)) for r in part])
    ones = torch.ones_like(values)
    means: list[Callable[[], Tensor]] = [
        lambda: rollout_mean(values, ones, sizes, rollouts),
        lambda: token_mean(values, ones, tokens),
        lambda: fixed_length_mean(values, ones, rollouts, 7),
    ]
    return torch.stack([mean() for mean in means])


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 5), min_size=2, max_size=6), cut=st.integers(0, 6), seed=st.integers(0, 1000))
def test_shares_of_a_cut_batch_add_up_to_its_loss(counts: list[int], cut: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, generator=generator, dtype=torch.float64) for n in counts]
    whole = shares(rows, len(rows), sum(counts))
    parts = [shares(part, len(rows), sum(counts)) for part in (rows[:cut], rows[cut:])]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_sums_and_means_over_each_rollout() -> None:
    rollout, values = rollout_index([2, 0, 1]), double([1.0, 2.0, 5.0]).requires_grad_()
    assert rollout.tolist() == [0, 0, 2]
    assert_equal(rollout_sums(values, rollout).detach(), [3.0, 3.0, 5.0])
    means = rollout_means(values, rollout)
    assert_equal(means.detach(), [1.5, 1.5, 5.0])
    means.sum().backward()
    assert_equal(values.grad, [1.0, 1.0, 1.0])
    assert rollout_sums(double([]), rollout_index([])).shape == (0,)
