"""The learner: the policy under training, its frozen reference, its weights and checkpoints.

Every rank calls every method with the same arguments, in the same order, and gets the same answer. It keeps no count of steps
and decides nothing: that is the ledger's and the main loop's part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from services.contract.config import Config
from services.trainer.megatron import cpu

cpu.install()

from services.trainer.megatron import checkpoint  # noqa: E402
from services.trainer.megatron.architecture import Architecture, read_checked  # noqa: E402
from services.trainer.megatron.batching import MicroBatch, Row  # noqa: E402
from services.trainer.megatron.critic import Critic  # noqa: E402
from services.trainer.megatron.export import whole_weights  # noqa: E402
from services.trainer.megatron.loss import Loss, Totals  # noqa: E402
from services.trainer.megatron.model import PolicyModel  # noqa: E402
from services.trainer.megatron.names import load_weights  # noqa: E402
from services.trainer.megatron.optimizer import wrap  # noqa: E402
from services.trainer.megatron.trainable import Trainable, device_of  # noqa: E402
from services.trainer.megatron.weights import WeightFolder  # noqa: E402


class Learner(Trainable):
    """Needs `distributed.init(config)` first. Raises UnsupportedModelError for a model or layout that cannot be trained."""

    def __init__(self, config: Config, hf_folder: Path) -> None:
        self.config = config
        self.policy = _build(config, read_checked(config.trainer, hf_folder), hf_folder)
        super().__init__(config, self.policy)
        self.reference: torch.nn.Module | None = None

    def logprobs(self, rows: Sequence[Row]) -> list[Tensor]:
        """Log-prob of every response token under the current weights: [response length] float32, 0 where the mask is 0."""
        return self.answers(self.model, rows)

    def set_reference(self, hf_folder: Path) -> None:
        """Freeze the weights of a folder as the reference policy. Takes the memory of one more model: with
        `trainer.offload_reference` the CPU's, and the GPU's only while it computes."""
        frozen = _build(self.config, self.architecture, hf_folder).requires_grad_(False)
        self.reference = wrap(frozen, trainable=False)  # type: ignore[arg-type]
        self._offload_reference()

    def reference_logprobs(self, rows: Sequence[Row]) -> list[Tensor]:
        """As `logprobs`, under the reference policy."""
        if self.reference is None:
            raise RuntimeError("no reference policy is set: call set_reference first")
        try:
            return self.answers(self.reference.to(self.device), rows)
        finally:
            self._offload_reference()

    def train_step(self, rows: Sequence[Row], loss: Loss, learning_rate: float) -> dict[str, float]:
        """One optimizer step on the whole batch; see `Trainable.step` for the metrics and errors. A loss that has a true
        `wants_entropy` finds it in `TokenBatch.entropy`."""
        totals = Totals.of(rows)
        self.policy.wants_entropy = getattr(loss, "wants_entropy", False)

        def share(answer: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
            entropy = answer[1] if self.policy.wants_entropy else None
            return loss(answer[0], replace(batch.tokens, entropy=entropy), totals)

        try:
            return self.step(rows, [row for row in rows if row.targets and loss.contributes(row)], share, learning_rate)
        finally:
            self.policy.wants_entropy = False

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full float32 tensor on the CPU), the same on every rank; all ranks iterate together.

        A tensor may be a view of the live weights: write it before the next step, or clone it.
        """
        return ((name, tensor.float().cpu()) for name, tensor in whole_weights(self.policy))

    def save(self, folder: Path, critic: Critic | None = None) -> None:
        """Write model, optimizer and random state, and the critic's, into an existing, empty folder. All ranks together.

        Raises NoSpace, before anything is written, when the disk has too little room.
        """
        checkpoint.save(folder, self._parts(critic))

    def load(self, folder: Path, critic: Critic | None = None) -> None:
        """Go on from a folder that `save` wrote, bit by bit on the same layout. All ranks together."""
        checkpoint.load(folder, self._parts(critic))

    def _parts(self, critic: Critic | None) -> dict[str, Trainable]:
        parts: dict[str, Trainable] = {"": self}
        return parts | {"critic.": critic} if critic else parts

    def _offload_reference(self) -> None:
        if self.config.trainer.offload_reference and self.reference is not None:
            self.reference.to(cpu.CPU)


def _build(config: Config, architecture: Architecture, hf_folder: Path) -> PolicyModel:
    model = PolicyModel(architecture, config.trainer).to(device_of(config))
    load_weights(model, architecture, WeightFolder(hf_folder).read)
    return model
