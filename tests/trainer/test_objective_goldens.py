"""The objective against values that two public projects return for the same inputs (tests/goldens), in float64.

Covered: per-group normalisation, the clipped surrogate, KL estimators, both averages, TIS and IcePop, whole steps with those.
Not built yet: GAE, whitening, REINFORCE++, dual clip, GSPO, CISPO, entropy bonus, ratio-weighted KL, MIS.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.trainer.objective.advantages import advantages_by_group, group_advantages
from services.trainer.objective.corrections import icepop, mismatch, truncated_importance
from services.trainer.objective.kl import kl_estimate
from services.trainer.objective.losses import clipped_surrogate, rollout_mean, token_mean

GOLDENS = Path(__file__).parents[1] / "goldens"
Golden = dict[str, Any]


def cases(file: str, wanted: Callable[[Golden], bool]) -> list[Any]:
    every = json.loads((GOLDENS / file).read_text())["cases"]
    return [pytest.param(case, id=case["id"]) for case in every if "expected" in case and wanted(case)]


def flat(lists: Any) -> Tensor:
    return torch.tensor([value for values in lists for value in values], dtype=torch.float64)


def rollout_tokens(masks: list[list[int]], rollout_ids: list[int]) -> Tensor:
    """Per token: model tokens of its rollout, over all samples that share the rollout's id."""
    totals: dict[int, int] = {}
    for mask, rollout in zip(masks, rollout_ids, strict=True):
        totals[rollout] = totals.get(rollout, 0) + sum(mask)
    return flat([[totals[rollout]] * len(mask) for mask, rollout in zip(masks, rollout_ids, strict=True)])


def assert_equal(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    cases(
        "advantages.json",
        lambda c: c["kind"] == "reward_normalization" and c["inputs"]["subtract_mean"] and min(c["inputs"]["group_sizes"]) > 1,
    ),
)
def test_group_normalised_rewards(case: Golden) -> None:
    inputs = case["inputs"]
    start, found = 0, []
    for size in inputs["group_sizes"]:
        rewards = torch.tensor(inputs["rewards"][start : start + size], dtype=torch.float64)
        found.append(group_advantages(rewards[None], "grpo" if inputs["divide_by_std"] else "dr_grpo")[0])
        start += size
    assert_equal(torch.cat(found), case["expected"]["normalized"])


@pytest.mark.parametrize("case", cases("policy_loss.json", lambda c: c["kind"] == "ppo_clip" and c["inputs"]["eps_clip_c"] is None))
def test_clipped_surrogate_and_its_gradient(case: Golden) -> None:
    i = {name: torch.tensor(v, dtype=torch.float64) for name, v in case["inputs"].items() if isinstance(v, list)}
    logprobs = i["log_probs"].requires_grad_()
    low, high = case["inputs"]["eps_clip"], case["inputs"]["eps_clip_high"]
    loss, clipped = clipped_surrogate(logprobs, i["old_log_probs"], i["advantages"], low, high)
    loss.sum().backward()
    assert_equal(loss.detach(), case["expected"]["token_loss"])
    assert_equal(clipped, case["expected"]["clipped"])
    assert logprobs.grad is not None
    assert_equal(logprobs.grad, case["expected"]["grad_log_probs"])


@pytest.mark.parametrize("case", cases("policy_loss.json", lambda c: c["kind"] == "approx_kl" and not c["inputs"]["old_log_probs"]))
def test_kl_estimators(case: Golden) -> None:
    inputs = case["inputs"]
    new, reference = (torch.tensor(inputs[name], dtype=torch.float64) for name in ("log_probs", "ref_log_probs"))
    assert_equal(kl_estimate(new, reference, inputs["estimator"].removesuffix("_kl")), case["expected"]["kl"])


@pytest.mark.parametrize("case", cases("policy_loss.json", lambda c: c["kind"] == "aggregate"))
def test_both_averages(case: Golden) -> None:
    inputs, expected = case["inputs"], case["expected"]
    values, masks = flat(inputs["values"]), inputs["loss_masks"]
    tokens = rollout_tokens(masks, inputs["rollout_ids"])
    found = rollout_mean(values, flat(masks), tokens, inputs["global_batch_size"])
    assert_equal(found, expected["per_rollout"]["value"])
    assert_equal(token_mean(values, flat(masks), expected["per_token"]["num_tokens"]), expected["per_token"]["value"])


@pytest.mark.parametrize("case", cases("mismatch_correction.json", lambda c: c["kind"] in ("tis", "icepop")))
def test_importance_correction(case: Golden) -> None:
    inputs, expected = case["inputs"], case["expected"]
    train, engine, mask = (flat(inputs[name]) for name in ("train_log_probs", "rollout_log_probs", "loss_masks"))
    weigh = truncated_importance if case["kind"] == "tis" else icepop
    weights = weigh(train, engine, mask, inputs["lower"], inputs["upper"])
    assert_equal(weights, flat(expected["weights"]) * mask)
    loss = flat(inputs["pg_loss"]) * weights
    samples = len(inputs["loss_masks"])
    tokens = rollout_tokens(inputs["loss_masks"], list(range(samples)))
    assert_equal(rollout_mean(loss, mask, tokens, samples), expected["mean_pg_loss"])


@pytest.mark.parametrize("case", cases("mismatch_correction.json", lambda c: c["kind"] == "tis"))
def test_mismatch_metrics(case: Golden) -> None:
    """The golden's `tis` is the mean ratio and `tis_clipfrac` the share outside the range, per sample, then over samples."""
    inputs, expected = case["inputs"], case["expected"]["metrics"]
    train, engine, mask = (flat(inputs[name]) for name in ("train_log_probs", "rollout_log_probs", "loss_masks"))
    gap = mismatch(train, engine, mask, inputs["lower"], inputs["upper"])
    samples = len(inputs["loss_masks"])
    tokens = rollout_tokens(inputs["loss_masks"], list(range(samples)))
    assert_equal(rollout_mean(gap.ratio, mask, tokens, samples), expected["tis"])
    # The original counts in float32.
    outside = rollout_mean(gap.outside, mask, tokens, samples)
    assert float(outside) == pytest.approx(expected["tis_clipfrac"], abs=1e-6)


def built_step(case: Golden) -> bool:
    config = case["inputs"].get("config", {})
    return (
        case["kind"] == "step_loss"
        and config["estimator"] == "grpo"
        and config["eps_clip_c"] is None
        and config["entropy_coef"] == 0
        and not config["unbiased_kl"]
        and config["correction"] in ("none", "tis", "icepop")
    )


def step_logprobs(inputs: Golden, logits: Tensor) -> Tensor:
    """Of the response tokens, one sample after another."""
    found, start = [], 0
    for tokens, length in zip(inputs["tokens"], inputs["response_lengths"], strict=True):
        rows = torch.log_softmax(logits[start : start + len(tokens)] / inputs["config"]["temperature"], -1)
        targets = torch.tensor(tokens[-length:])
        found.append(rows[-length - 1 : -1].gather(1, targets[:, None])[:, 0])
        start += len(tokens)
    return torch.cat(found)


@pytest.mark.parametrize("case", cases("policy_loss.json", built_step))
def test_whole_step_loss_and_gradient(case: Golden) -> None:
    inputs, config = case["inputs"], case["inputs"]["config"]
    logits = torch.tensor(inputs["logits"], dtype=torch.float64, requires_grad=True)
    logprobs, mask, old = step_logprobs(inputs, logits), flat(inputs["loss_masks"]), flat(inputs["old_log_probs"])
    loss, _ = clipped_surrogate(logprobs, old, flat(inputs["advantages"]), config["eps_clip"], config["eps_clip_high"])
    if config["correction"] != "none":
        weigh = truncated_importance if config["correction"] == "tis" else icepop
        loss = loss * weigh(old, flat(inputs["rollout_log_probs"]), mask, config["tis_clip_low"], config["tis_clip"])
    estimator = config["kl_estimator"].removesuffix("_kl")
    loss = loss + config["kl_coef"] * kl_estimate(logprobs, flat(inputs["ref_log_probs"]), estimator)
    if config["per_token_loss"]:
        # The original counts a fully masked row as one token.
        step = token_mean(loss, mask, sum(max(sum(row), 1) for row in inputs["loss_masks"]))
    else:
        tokens = rollout_tokens(inputs["loss_masks"], inputs["rollout_ids"])
        step = rollout_mean(loss, mask, tokens, inputs["global_batch_size"])
    step.backward()
    assert_equal(step.detach(), case["expected"]["loss"])
    assert logits.grad is not None
    assert_equal(logits.grad.norm(), case["expected"]["grad_norm_logits"])


def test_advantages_by_group_keep_the_order_of_the_rollouts() -> None:
    found = advantages_by_group([1.0, 0.0, 0.0, 0.0, 3.0, 1.0], ["b", "a", "b", "a", "b", "a"], 3, "dr_grpo")
    assert_equal(found, [-1 / 3, -1 / 3, -4 / 3, -1 / 3, 5 / 3, 2 / 3])


def test_equal_rewards_have_no_advantage() -> None:
    assert_equal(advantages_by_group([0.25] * 6, ["a"] * 6, 6), [0.0] * 6)
