"""What a rank of the tests does with PPO's critic; each function is called on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from services.contract.config import Config, ObjectiveConfig
from services.trainer.feeding.collect import CompleteGroup
from services.trainer.learning_rate import Rates
from services.trainer.megatron.batching import Row
from services.trainer.megatron.critic import Critic
from services.trainer.megatron.learner import Learner
from services.trainer.publishing.hf_folder import write_hf_folder
from services.trainer.rows import policy_rows
from services.trainer.update import update
from tests.trainer.learner_reports import Weights, fresh_folder, same, weights
from tests.trainer.option_reports import refusal
from tests.trainer.plain_ppo import PPO, RATES, SEED


@dataclass
class Both:
    """Policy and critic, begun with a folder's model, which is the reference too."""

    config: Config
    folder: Path

    def __post_init__(self) -> None:
        self.learner = Learner(self.config, self.folder)
        self.learner.set_reference(self.folder)
        self.critic = Critic(self.config, self.learner.policy)

    def learn(self, groups: list[CompleteGroup], rates: tuple[float | None, float]) -> dict[str, float]:
        return update(self.learner, groups, ObjectiveConfig.model_validate(PPO), Rates(*rates), SEED, self.critic)

    @property
    def weights(self) -> dict[str, Weights]:
        return {"policy": weights(self.learner), "critic": weights(self.critic)}


def critic(config: Config, folder: Path, groups: list[CompleteGroup], scratch: Path) -> dict[str, Any]:
    """A batch that only the critic learns from; two batches of PPO from the start, the second after a checkpoint too."""
    checkpoint, rows = fresh_folder(scratch / f"{folder.name}-with-critic"), policy_rows(groups)
    report = {"alone": _alone(Both(config, folder), groups)}
    both = Both(config, folder)
    report |= {"start": both.critic.values(rows), "figures": [both.learn(groups, RATES[0])]}
    both.learner.save(checkpoint, both.critic)
    fresh = Both(config, folder)
    fresh.learner.load(checkpoint, fresh.critic)
    report["figures"].append(both.learn(groups, RATES[1]))
    fresh.learn(groups, RATES[1])
    report |= {"weights": both.weights, "values": both.critic.values(rows), "checkpoint": checkpoint}
    report["resumed_equal"] = all(same(both.weights[name], fresh.weights[name]) for name in both.weights)
    report["served_without"] = _served_without(Learner(config, folder), checkpoint, fresh)
    return report | _written(config, folder, rows, scratch, both.critic) | _refused(both, scratch)


def crossed(config: Config, folder: Path, groups: list[CompleteGroup], checkpoint: Path) -> dict[str, Weights]:
    """Load what another layout saved after the first batch, and learn from the second."""
    both = Both(config, folder)
    both.learner.load(checkpoint, both.critic)
    both.learn(groups, RATES[1])
    return both.weights


def _alone(both: Both, groups: list[CompleteGroup]) -> dict[str, Any]:
    before = both.weights
    figures = both.learn(groups, (None, RATES[0][1]))
    return {"figures": figures, "moved": [name for name, tensors in both.weights.items() if not same(tensors, before[name])]}


def _served_without(learner: Learner, checkpoint: Path, fresh: Both) -> bool:
    """Whether a learner without a critic finds the same policy in a checkpoint as one with it."""
    learner.load(checkpoint)
    fresh.learner.load(checkpoint, fresh.critic)
    return same(weights(learner), weights(fresh.learner))


def _written(config: Config, folder: Path, rows: list[Row], scratch: Path, critic: Critic) -> dict[str, Any]:
    """Whether a critic read from what another wrote has its values."""
    written = fresh_folder(scratch / f"{folder.name}-critic-model")
    tensors = weights(critic)
    if dist.get_rank() == 0:
        write_hf_folder(written, folder, iter(tensors.items()), "float32")
    dist.barrier()
    read = Critic(config, written)
    return {"written_equal": all(torch.equal(a, b) for a, b in zip(critic.values(rows), read.values(rows), strict=True))}


def _refused(both: Both, scratch: Path) -> dict[str, Any]:
    """What is said to a critic that a checkpoint lacks."""
    without = fresh_folder(scratch / f"{both.folder.name}-without-critic")
    both.learner.save(without)
    return {"refused": refusal(lambda: both.learner.load(without, both.critic))}
