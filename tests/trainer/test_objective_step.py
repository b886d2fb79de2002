"""The whole loss of a step, put together as the learner does it, against the goldens: value and gradient, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from services.contract.config import ObjectiveConfig
from services.trainer.megatron.batching import TokenBatch
from services.trainer.megatron.loss import PolicyLoss, Totals
from services.trainer.objective.corrections import correct, mean_weight
from tests.trainer.goldens import Golden, assert_equal, cases, double, own, own_rollout, own_rollout_tokens
from tests.trainer.test_objective_corrections import mis_objective


def step_objective(config: dict[str, Any]) -> ObjectiveConfig:
    o: dict[str, Any] = {"importance": config["correction"], "entropy_coef": config["entropy_coef"]}
    if config["correction"] == "mis":
        o |= mis_objective({"use_tis": True, **config["mis"]}).model_dump(exclude_unset=True)
    elif config["correction"] != "none":
        o |= {"importance_low": config["tis_clip_low"], "importance_high": config["tis_clip"]}
    o["loss"] = "clipped" if config["estimator"] == "grpo" else config["estimator"]
    o |= {"clip_low": config["eps_clip"], "clip_high": config["eps_clip_high"], "dual_clip": config["eps_clip_c"]}
    o |= {"kl_coef": config["kl_coef"], "kl_estimator": config["kl_estimator"].removesuffix("_kl")}
    o["kl_unbiased"] = config["unbiased_kl"]
    return ObjectiveConfig(**o, aggregate="token_mean" if config["per_token_loss"] else "rollout_mean")


def own_logprobs(inputs: Golden, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy) at the model tokens, one sample after another."""
    logprobs, entropies, start = [], [], 0
    for tokens, mask in zip(inputs["tokens"], inputs["loss_masks"], strict=True):
        rows = torch.log_softmax(logits[start : start + len(tokens)] / inputs["config"]["temperature"], -1)[-len(mask) - 1 : -1]
        kept = torch.tensor(mask).bool()
        logprobs.append(rows.gather(1, torch.tensor(tokens[-len(mask) :])[:, None])[:, 0][kept])
        entropies.append(-(rows.exp() * rows).sum(-1)[kept])
        start += len(tokens)
    return torch.cat(logprobs), torch.cat(entropies)


def token_batch(inputs: Golden) -> TokenBatch:
    masks = inputs["loss_masks"]
    names = ("advantages", "rollout_log_probs", "ref_log_probs", "old_log_probs")
    advantages, engine, reference, old = (own(inputs[name], masks) for name in names)
    sizes = own_rollout_tokens(masks, inputs["rollout_ids"])
    return TokenBatch(
        rollout=own_rollout(masks),
        advantages=advantages,
        engine_logprobs=engine,
        reference_logprobs=reference,
        old_logprobs=old,
        weights=torch.ones_like(old),
        rollout_tokens=sizes,
    )


def built(case: Golden) -> bool:
    """All but k1 in the loss, which has no gradient on average and is refused at the start."""
    if case["kind"] != "step_loss":
        return False
    config = case["inputs"]["config"]
    return config["kl_coef"] == 0 or config["kl_estimator"] != "k1"


@pytest.mark.parametrize("case", cases("policy_loss.json", built))
def test_whole_step_loss_and_gradient(case: Golden) -> None:
    inputs, o = case["inputs"], step_objective(case["inputs"]["config"])
    logits = double(inputs["logits"]).requires_grad_()
    logprobs, entropy = own_logprobs(inputs, logits)
    tokens = token_batch(inputs)
    weights = correct(tokens.old_logprobs, tokens.engine_logprobs, tokens.rollout, o).weights
    mean = mean_weight(weights, tokens.rollout, o.importance_level) if o.importance_normalize else 1.0
    # The original counts a fully masked row as one token.
    totals = Totals(inputs["global_batch_size"], sum(max(sum(mask), 1) for mask in inputs["loss_masks"]), weight=1.0)
    share, _ = PolicyLoss(o, mean)(logprobs, tokens, totals, entropy)
    share.backward()
    assert_equal(share.detach(), case["expected"]["loss"])
    assert_equal(logits.grad.norm(), case["expected"]["grad_norm_logits"])


def test_without_old_log_probs_the_ratio_is_one_and_has_a_gradient() -> None:
    logprobs = double([-1.0, -2.0]).requires_grad_()
    one = double([1.0, 1.0])
    tokens = TokenBatch(torch.tensor([0, 0]), double([2.0, 2.0]), None, None, None, one, 2 * one)
    share, sums = PolicyLoss(ObjectiveConfig(importance="none"))(logprobs, tokens, Totals(1, 2, 2.0))
    share.backward()
    assert_equal(share.detach(), -2.0)
    assert_equal(logprobs.grad, [-1.0, -1.0])
    assert float(sums["clip_fraction"]) == 0


def test_a_bonus_without_entropy_is_refused() -> None:
    one = double([1.0])
    tokens = TokenBatch(torch.tensor([0]), one, one, None, None, one, one)
    with pytest.raises(ValueError, match="entropy_coef is above 0, but the learner gave no entropy"):
        PolicyLoss(ObjectiveConfig(entropy_coef=0.1))(one, tokens, Totals(1, 1, 1.0))


def test_what_is_left_out_is_counted() -> None:
    one = double([1.0, 1.0])
    tokens = TokenBatch(torch.tensor([0, 1]), one, double([-1.0, -9.0]), None, double([-1.0, -1.0]), one, one)
    o = ObjectiveConfig(importance="mis", importance_high=2.0)
    share, sums = PolicyLoss(o)(double([-1.0, -1.0]), tokens, Totals(2, 2, 2.0))
    assert float(sums["rejected_fraction"]) == 1
    assert_equal(share, -0.5)  # one of two rollouts; the other still counts in the denominator
