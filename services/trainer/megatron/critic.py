"""The critic of PPO: a second model that says what each token is worth, with an optimizer and a learning rate of its own.

It starts as the policy's layers with a head of zeros, so that its first value is 0 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from services.contract.config import Config
from services.trainer.megatron import cpu

cpu.install()

from services.trainer.megatron.architecture import read_checked  # noqa: E402
from services.trainer.megatron.batching import MicroBatch, Row, TokenBatch  # noqa: E402
from services.trainer.megatron.export import whole_weights  # noqa: E402
from services.trainer.megatron.model import ValueModel  # noqa: E402
from services.trainer.megatron.names import VALUE_HEAD, load_weights  # noqa: E402
from services.trainer.megatron.trainable import Trainable, device_of  # noqa: E402
from services.trainer.megatron.weights import WeightFolder  # noqa: E402

ValueLoss = Callable[[Tensor, TokenBatch, int], tuple[Tensor, dict[str, Tensor]]]
"""(values [n] with gradient, the micro-batch's model tokens, model tokens of the whole batch) ->
(this micro-batch's share of the loss, sums of figures over the n tokens)."""


def squared_error(values: Tensor, tokens: TokenBatch, total_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """½ (value - return)², mean over the batch's model tokens. Needs `returns` in every row's `token_values`."""
    gap = values - tokens.token_values["returns"]
    sums = {"value_mean": values.detach().sum(), "value_error": gap.detach().abs().sum()}
    return 0.5 * gap.square().sum() / max(total_tokens, 1), sums


class Critic(Trainable):
    """Needs `distributed.init(config)` first. `hf_folder`: the policy's, or one that `export` was written to."""

    def __init__(self, config: Config, hf_folder: Path) -> None:
        architecture = read_checked(config.trainer, hf_folder)
        folder = WeightFolder(hf_folder)
        model = ValueModel(architecture, config.trainer).to(device_of(config))
        head = torch.zeros(1, architecture.hidden)
        load_weights(model, architecture, lambda name: folder.read(name) if name != VALUE_HEAD or name in folder.files else head)
        super().__init__(config, model)

    def values(self, rows: Sequence[Row]) -> list[Tensor]:
        """What the model expects after reading all before each response token: [response length] float32, 0 where the mask is 0."""
        return self.answers(self.model, rows)

    def train_step(self, rows: Sequence[Row], loss: ValueLoss, learning_rate: float) -> dict[str, float]:
        """One optimizer step of its own on the whole batch; see `Trainable.step` for the metrics and errors."""
        total = sum(len(row.targets) for row in rows)

        def share(answer: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
            return loss(answer[0], batch.tokens, total)

        return self.step(rows, [row for row in rows if row.targets], share, learning_rate)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """As `Learner.export`; the head is `score.weight`."""
        return ((name, tensor.float().cpu()) for name, tensor in whole_weights(self.bare))
