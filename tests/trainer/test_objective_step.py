"""The whole loss of a step, put together as the learner does it, against the goldens: value and gradient, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from services.contract.config import ObjectiveConfig
from services.trainer.megatron.batching import Row, TokenBatch
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


def token_batch(inputs: Golden, entropy: Tensor) -> TokenBatch:
    masks = inputs["loss_masks"]
    names = ("advantages", "rollout_log_probs", "ref_log_probs", "old_log_probs")
    advantages, engine, reference, old = (own(inputs[name], masks) for name in names)
    sizes = own_rollout_tokens(masks, inputs["rollout_ids"])
    return TokenBatch(
        advantages=advantages,
        engine_logprobs=engine,
        reference_logprobs=reference,
        weights=torch.ones_like(old),
        rollout_tokens=sizes,
        row_index=own_rollout(masks),
        token_values={"old_logprobs": old},
        entropy=entropy,
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
    tokens = token_batch(inputs, entropy)
    weights = correct(tokens.token_values["old_logprobs"], tokens.engine_logprobs, tokens.row_index, o).weights
    mean = mean_weight(weights, tokens.row_index, o.importance_level) if o.importance_normalize else 1.0
    # The original counts a fully masked row as one token.
    totals = Totals(inputs["global_batch_size"], sum(max(sum(mask), 1) for mask in inputs["loss_masks"]), weight=1.0)
    share, _ = PolicyLoss(o, mean)(logprobs, tokens, totals)
    share.backward()
    assert_equal(share.detach(), case["expected"]["loss"])
    assert_equal(logits.grad.norm(), case["expected"]["grad_norm_logits"])


def two_tokens(rows: list[int], engine: list[float] | None, advantage: float = 1.0, **values: Tensor) -> TokenBatch:
    one = double([1.0, 1.0])
    return TokenBatch(
        advantages=advantage * one,
        engine_logprobs=None if engine is None else double(engine),
        reference_logprobs=None,
        weights=one,
        rollout_tokens=one * (2 - len(set(rows)) + 1),
        row_index=torch.tensor(rows),
        token_values=values,
    )


def test_without_old_log_probs_the_ratio_is_one_and_has_a_gradient() -> None:
    logprobs = double([-1.0, -2.0]).requires_grad_()
    loss = PolicyLoss(ObjectiveConfig(importance="none"))
    share, sums = loss(logprobs, two_tokens([0, 0], None, advantage=2.0), Totals(1, 2, 2.0))
    share.backward()
    assert_equal(share.detach(), -2.0)
    assert_equal(logprobs.grad, [-1.0, -1.0])
    assert float(sums["clip_fraction"]) == 0


def test_advantages_of_the_tokens_go_before_that_of_the_row() -> None:
    tokens = two_tokens([0, 0], None, advantage=9.0, advantages=double([1.0, -3.0]))
    share, _ = PolicyLoss(ObjectiveConfig(importance="none"))(double([-1.0, -2.0]), tokens, Totals(1, 2, 2.0))
    assert_equal(share, 1.0)


def test_a_bonus_without_entropy_is_refused() -> None:
    tokens = two_tokens([0, 0], [-1.0, -1.0])
    with pytest.raises(ValueError, match="entropy_coef is above 0, but the learner gave no entropy"):
        PolicyLoss(ObjectiveConfig(entropy_coef=0.1))(double([-1.0, -1.0]), tokens, Totals(1, 2, 1.0))


def test_what_is_left_out_is_counted() -> None:
    tokens = two_tokens([0, 1], [-1.0, -9.0], old_logprobs=double([-1.0, -1.0]))
    share, sums = PolicyLoss(ObjectiveConfig(importance="mis"))(double([-1.0, -1.0]), tokens, Totals(2, 2, 2.0))
    assert float(sums["rejected_fraction"]) == 1
    assert_equal(share, -0.5)  # one of two rollouts; the other still counts in the denominator


@pytest.mark.parametrize(
    ("options", "row", "computed"),
    [
        ({}, {"advantage": 0.0}, False),
        ({}, {"advantage": 0.5}, True),
        ({}, {"token_values": {"advantages": [0.0, 0.0]}}, False),
        ({}, {"token_values": {"advantages": [0.0, 0.1]}}, True),
        ({"kl_coef": 0.1}, {}, True),
        ({"kl_coef": 0.1, "kl_in": "reward", "advantage": "rloo"}, {}, False),
        ({"entropy_coef": 0.1}, {}, True),
        ({"loss": "mine:own"}, {}, True),
    ],
)
def test_a_row_is_left_out_only_when_its_gradient_is_known_to_be_0(
    options: dict[str, Any], row: dict[str, Any], computed: bool
) -> None:
    given = Row(token_ids=[1, 2, 3], prompt_length=1, loss_mask=[1, 1], **row)
    assert PolicyLoss(ObjectiveConfig(**options)).contributes(given) == computed
