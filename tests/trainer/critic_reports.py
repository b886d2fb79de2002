"""What a rank of the tests does with the critic; each function is called on every rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from services.contract.config import Config
from services.trainer.megatron.batching import Row
from services.trainer.megatron.critic import Critic, squared_error
from services.trainer.megatron.learner import Learner
from services.trainer.megatron.loss import SupervisedLoss
from services.trainer.publish import write_hf_folder
from tests.trainer.learner_reports import fresh_folder, same, weights
from tests.trainer.plain_torch import LEARNING_RATES, returns_of


def critic(config: Config, folder: Path, rows: list[Row], scratch: Path) -> dict[str, Any]:
    """Three steps from a head of zeros; then saved together with the policy, and written as a Hugging Face folder."""
    rows = [replace(row, token_values={"returns": returns_of(vars(row))}) for row in rows]
    critic, learner = Critic(config, folder), Learner(config, folder)
    report: dict[str, Any] = {"start": critic.values(rows)}
    report["steps"] = [critic.train_step(rows, squared_error, rate) for rate in LEARNING_RATES]
    report |= {"values": critic.values(rows), "weights": weights(critic)}
    learner.train_step(rows, SupervisedLoss(), LEARNING_RATES[0])
    return report | _resumed(config, folder, rows, scratch, learner, critic) | _written(config, folder, rows, scratch, critic)


def _resumed(config: Config, folder: Path, rows: list[Row], scratch: Path, learner: Learner, critic: Critic) -> dict[str, Any]:
    checkpoint = fresh_folder(scratch / f"{folder.name}-with-critic")
    learner.save(checkpoint, critic)
    fresh_critic, fresh_learner = Critic(config, folder), Learner(config, folder)
    fresh_learner.load(checkpoint, fresh_critic)
    steps = [[c.train_step(rows, squared_error, rate) for rate in LEARNING_RATES] for c in (critic, fresh_critic)]
    return {
        "resumed_norms": [[step["grad_norm"] for step in each] for each in steps],
        "resumed_equal": same(weights(critic), weights(fresh_critic)) and same(weights(learner), weights(fresh_learner)),
    }


def _written(config: Config, folder: Path, rows: list[Row], scratch: Path, critic: Critic) -> dict[str, Any]:
    """Whether a critic read from what another wrote has its values."""
    written = fresh_folder(scratch / f"{folder.name}-critic-model")
    tensors = weights(critic)
    if dist.get_rank() == 0:
        write_hf_folder(written, folder, iter(tensors.items()), "float32")
    dist.barrier()
    read = Critic(config, written)
    return {"written_equal": all(torch.equal(a, b) for a, b in zip(critic.values(rows), read.values(rows), strict=True))}
