"""What a rank of the tests does with the policy's learner; each function is called on every rank."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from services.contract.config import Config, ObjectiveConfig
from services.trainer.megatron.batching import Row, TokenBatch
from services.trainer.megatron.learner import Learner
from services.trainer.megatron.loss import Loss, PolicyLoss, SupervisedLoss, Totals
from tests.trainer.plain_torch import ENTROPY_BONUS, LEARNING_RATES

Weights = dict[str, torch.Tensor]


class EntropyBonus:
    """Supervised loss minus a share of the entropy: a loss that asks for the entropies."""

    wants_entropy = True

    def contributes(self, row: Row) -> bool:
        return True

    def __call__(self, logprobs: torch.Tensor, tokens: TokenBatch, totals: Totals) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert tokens.entropy is not None
        share = -(logprobs + ENTROPY_BONUS * tokens.entropy).sum() / totals.tokens
        return share, {"entropy": tokens.entropy.detach().sum()}


def weights(model: Any) -> Weights:
    return {name: tensor.clone() for name, tensor in model.export()}


def train(learner: Learner, rows: list[Row], loss: Loss) -> list[dict[str, float]]:
    return [learner.train_step(rows, loss, rate) for rate in LEARNING_RATES]


def same(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def fresh_folder(folder: Path) -> Path:
    """Made by rank 0, seen by all."""
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    return folder


def model(config: Config, folder: Path, rows: list[Row]) -> dict[str, Any]:
    """What is compared with plain torch."""
    learner = Learner(config, folder)
    report: dict[str, Any] = {"loaded": weights(learner), "logprobs": learner.logprobs(rows)}
    report["grpo"] = train(learner, rows, PolicyLoss(ObjectiveConfig(kl_coef=0.3, kl_estimator="k3")))
    report["grpo_weights"] = weights(learner)
    report["trained_logprobs"] = learner.logprobs(rows)
    learner.set_reference(folder)
    report["reference_logprobs"] = learner.reference_logprobs(rows)
    for name, loss in (("supervised", SupervisedLoss()), ("entropy", EntropyBonus())):
        learner = Learner(config, folder)
        report[name] = train(learner, rows, loss)
        report[f"{name}_weights"] = weights(learner)
    return report


def draws() -> list[float]:
    """The next number of every random state that a checkpoint keeps."""
    return [float(torch.rand(1)), random.random(), float(np.random.rand())]


def resume(config: Config, folder: Path, rows: list[Row], scratch: Path) -> dict[str, Any]:
    """Save in the middle, go on; load into a fresh learner (and into a used one), go on: must be the same to the bit."""
    checkpoint = fresh_folder(scratch / f"{folder.name}-checkpoint")
    first, loss = Learner(config, folder), SupervisedLoss()
    for rate in LEARNING_RATES[:2]:
        first.train_step(rows, loss, rate)
    first.save(checkpoint)
    drawn = draws()
    ahead = train(first, rows, loss)
    went_on = weights(first)
    fresh = Learner(config, folder)
    fresh.load(checkpoint)
    drawn_again = draws()
    again = train(fresh, rows, loss)
    first.load(checkpoint)
    rewound = train(first, rows, loss)
    return {
        "norms": [[m["grad_norm"] for m in steps] for steps in (ahead, again, rewound)],
        "weights": went_on,
        "equal": same(went_on, weights(fresh)) and same(went_on, weights(first)),
        "random_equal": drawn == drawn_again,
        "checkpoint": checkpoint,
    }


def crossed(config: Config, folder: Path, rows: list[Row], checkpoint: Path) -> dict[str, Any]:
    """Load what another layout saved, and go on from there."""
    learner = Learner(config, folder)
    learner.load(checkpoint)
    return {"norms": [step["grad_norm"] for step in train(learner, rows, SupervisedLoss())], "weights": weights(learner)}
