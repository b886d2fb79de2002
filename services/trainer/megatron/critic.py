"""The critic of PPO: a second model that says what each token is worth, with an optimizer and a learning rate of its own.

It starts as the policy's layers with a head of zeros, so that its first value is 0 everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from services.contract.config import Config
from services.trainer.megatron import cpu

cpu.install()

from services.trainer.megatron.architecture import read_checked  # noqa: E402
from services.trainer.megatron.batching import MicroBatch, Row  # noqa: E402
from services.trainer.megatron.export import whole_weights  # noqa: E402
from services.trainer.megatron.model import PolicyModel, ValueModel  # noqa: E402
from services.trainer.megatron.names import VALUE_HEAD, load_weights  # noqa: E402
from services.trainer.megatron.trainable import Trainable, device_of  # noqa: E402
from services.trainer.megatron.weights import WeightFolder  # noqa: E402
from services.trainer.objective.losses import token_mean, value_loss  # noqa: E402


class Critic(Trainable):
    """Needs `distributed.init(config)` first. start: the policy whose layers it begins with, or a folder that `export` was
    written to (a policy's folder gives a head of zeros)."""

    def __init__(self, config: Config, start: Path | PolicyModel) -> None:
        super().__init__(config, _from_policy(config, start) if isinstance(start, PolicyModel) else _from_folder(config, start))

    def values(self, rows: Sequence[Row]) -> list[Tensor]:
        """What the model expects after reading all before each response token: [response length] float32, 0 where the mask is 0."""
        return self.answers(self.model, rows)

    def train_step(self, rows: Sequence[Row], clip: float, learning_rate: float) -> dict[str, float]:
        """One optimizer step of its own on the clipped squared error (`value_loss`), mean over the batch's model tokens.

        Rows bring `old_values` and `returns` in their `token_values`. See `Trainable.step` for the metrics and errors; besides,
        value_clip_fraction is the share of tokens without gradient.
        """
        total = sum(len(row.targets) for row in rows)

        def share(answer: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
            given = batch.tokens.token_values
            loss, clipped = value_loss(answer[0], given["old_values"], given["returns"], clip)
            return token_mean(loss, torch.ones_like(loss), total), {"value_clip_fraction": clipped.sum()}

        return self.step(rows, [row for row in rows if row.targets], share, learning_rate)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """As `Learner.export`; the head is `score.weight`."""
        return ((name, tensor.float().cpu()) for name, tensor in whole_weights(self.bare))


def _from_policy(config: Config, policy: PolicyModel) -> ValueModel:
    model = ValueModel(policy.architecture, config.trainer).to(device_of(config))
    layers = dict(policy.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("output_layer."):
                parameter.zero_()
            else:
                parameter.copy_(layers[name])
    return model


def _from_folder(config: Config, hf_folder: Path) -> ValueModel:
    architecture, folder = read_checked(config.trainer, hf_folder), WeightFolder(hf_folder)
    model = ValueModel(architecture, config.trainer).to(device_of(config))
    head = torch.zeros(1, architecture.hidden)
    load_weights(model, architecture, lambda name: folder.read(name) if name != VALUE_HEAD or name in folder.files else head)
    return model
