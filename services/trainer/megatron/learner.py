"""The learner: rows in, one optimizer step at a time, weights and checkpoints out.

Every rank calls every method with the same arguments, in the same order; the learner splits the rows over data-parallel
ranks itself, and all ranks get the same answer. It keeps no count of steps and decides nothing: that is the ledger's and
the main loop's part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from services.contract.config import Config
from services.trainer.megatron import cpu

cpu.install()

from megatron.core import parallel_state  # noqa: E402

from services.trainer.megatron import checkpoint  # noqa: E402
from services.trainer.megatron.architecture import check_layout, read_architecture  # noqa: E402
from services.trainer.megatron.batching import MicroBatch, Row, deal, filler, micro_batch, plan  # noqa: E402
from services.trainer.megatron.export import whole_weights  # noqa: E402
from services.trainer.megatron.loss import Loss, Totals  # noqa: E402
from services.trainer.megatron.model import PolicyModel  # noqa: E402
from services.trainer.megatron.names import load_weights  # noqa: E402
from services.trainer.megatron.optimizer import configure, make_optimizer, set_learning_rate, wrap  # noqa: E402
from services.trainer.megatron.schedule import run_schedule  # noqa: E402
from services.trainer.megatron.weights import WeightFolder  # noqa: E402


class Learner:
    """Needs `distributed.init(config)` first. Raises UnsupportedModelError for a model or layout that cannot be trained."""

    def __init__(self, config: Config, hf_folder: Path) -> None:
        self.trainer = config.trainer
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.trainer.device == "cuda" else cpu.CPU
        self.architecture = read_architecture(hf_folder)
        check_layout(self.architecture, dist.get_world_size(), self.trainer.tensor_parallel, self.trainer.pipeline_parallel)
        self.policy = self._build(hf_folder)
        self.model = wrap(self.policy, trainable=True)
        self.optimizer = make_optimizer(self.model, self.trainer)
        self.reference: torch.nn.Module | None = None

    def _build(self, hf_folder: Path) -> PolicyModel:
        model = PolicyModel(self.architecture, getattr(torch, self.trainer.dtype)).to(self.device)
        load_weights(model, self.architecture, WeightFolder(hf_folder).read)
        return model

    def logprobs(self, rows: Sequence[Row]) -> list[Tensor]:
        """Log-prob of every response token under the current weights: [response length] float32, 0 where the mask is 0."""
        return self._logprobs(self.model, rows)

    def set_reference(self, hf_folder: Path) -> None:
        """Freeze the weights of a folder as the reference policy. Takes the memory of one more model."""
        self.reference = wrap(self._build(hf_folder).requires_grad_(False), trainable=False)  # type: ignore[arg-type]

    def reference_logprobs(self, rows: Sequence[Row]) -> list[Tensor]:
        """As `logprobs`, under the reference policy."""
        if self.reference is None:
            raise RuntimeError("no reference policy is set: call set_reference first")
        return self._logprobs(self.reference, rows)

    def train_step(self, rows: Sequence[Row], loss: Loss, learning_rate: float) -> dict[str, float]:
        """One optimizer step on the whole batch. Returns the same metrics on every rank:

        loss, grad_norm (before clipping), rows, rows_trained, tokens (read by the model), trained_tokens (the model's own),
        padding (share of what was computed), seconds, and the loss's figures as means over the trained tokens (absent if
        there are none).
        Raises FloatingPointError when the loss or the gradient is not finite.
        """
        started = time.perf_counter()
        chosen = [row for row in rows if row.targets and loss.contributes(row)]
        self.model.train()
        self.model.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        sums = self._accumulate(self._own_batches(chosen), loss, Totals.of(rows))
        grad_norm = self._step(sums["loss"], learning_rate)
        counts = {"rows": float(len(rows)), "rows_trained": float(len(chosen))}
        return _metrics(sums) | counts | {"grad_norm": grad_norm, "seconds": time.perf_counter() - started}

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full float32 tensor on the CPU), the same on every rank; all ranks iterate together.

        A tensor may be a view of the live weights: write it before the next step, or clone it.
        """
        return ((name, tensor.float().cpu()) for name, tensor in whole_weights(self.policy))

    def save(self, folder: Path) -> None:
        """Write model, optimizer and random state into an existing, empty folder. All ranks together."""
        checkpoint.save(folder, self.model, self.optimizer)

    def load(self, folder: Path) -> None:
        """Go on from a folder that `save` wrote, bit by bit on the same layout. All ranks together."""
        checkpoint.load(folder, self.model, self.optimizer)
        configure(self.optimizer, self.trainer)

    def _own_batches(self, rows: Sequence[Row]) -> list[MicroBatch]:
        """This data-parallel rank's part of the rows, as micro-batches; a filler if it has none."""
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        own = deal([row.input_length for row in rows], ranks)[rank]
        if not own:
            return [filler(self.device)]
        batches = plan([rows[i].input_length for i in own], self.trainer.max_tokens_per_microbatch)
        return [micro_batch(rows, [own[i] for i in batch], self.device) for batch in batches]

    def _accumulate(self, batches: list[MicroBatch], loss: Loss, totals: Totals) -> dict[str, float]:
        """Leaves the batch's gradient in the model's buffers. Returns sums over all micro-batches of all ranks."""

        def finish(logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
            if not batch.rows:
                return logprobs.sum() * 0.0, {}
            share, sums = loss(logprobs, batch.tokens, totals)
            return share, {"loss": share.detach(), **sums}

        results = run_schedule(self.model, batches, finish, forward_only=False)
        own = [{name: float(value) for name, value in result.items()} for result in results]
        if own:
            own += [_sizes(batch) for batch in batches]
        return {"loss": 0.0} | _add(part for parts in _all_gather(own if _speaks_for_its_rows() else []) for part in parts)

    def _step(self, loss: float, learning_rate: float) -> float:
        """The gradient's norm before clipping."""
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}; the weights were left as they are: look at the batch's log-probs")
        set_learning_rate(self.optimizer, learning_rate)
        _, norm, _ = self.optimizer.step()  # type: ignore[misc]
        grad_norm = float(norm or 0.0)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient's norm is {grad_norm}; the weights are spoilt: go back to a checkpoint")
        return grad_norm

    def _logprobs(self, model: torch.nn.Module, rows: Sequence[Row]) -> list[Tensor]:
        indices = [i for i, row in enumerate(rows) if row.targets]
        batches = self._own_batches([rows[i] for i in indices])
        with torch.no_grad():
            results = run_schedule(model, batches, lambda logprobs, _: (logprobs.sum(), logprobs.cpu()), forward_only=True)
        found: list[tuple[int, Tensor]] = []
        for batch, values in zip(batches, results, strict=False):
            if batch.rows:
                found += zip((indices[i] for i in batch.rows), values.split(batch.counts), strict=True)
        filled = [torch.zeros(len(row.loss_mask)) for row in rows]
        for part in _all_gather(found if _speaks_for_its_rows() else []):
            for i, values in part:
                filled[i][torch.tensor(rows[i].targets) - rows[i].prompt_length] = values
        return filled


def _speaks_for_its_rows() -> bool:
    """Of the ranks that computed the same rows, the one whose results are gathered."""
    return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0


def _all_gather(value: Any) -> list[Any]:
    if dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _add(parts: Iterator[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _sizes(batch: MicroBatch) -> dict[str, float]:
    computed = batch.input_ids.numel() if batch.rows else 0
    return {"trained_tokens": sum(batch.counts), "tokens": batch.read_tokens, "computed_tokens": computed}


def _metrics(sums: dict[str, float]) -> dict[str, float]:
    """Sums over tokens become means; sizes stay as they are."""
    plain = {name: float(sums[name]) for name in ("loss", "tokens", "trained_tokens")}
    means = {name: value / sums["trained_tokens"] for name, value in sums.items() if name not in (*plain, "computed_tokens")}
    computed = sums["computed_tokens"]
    return means | plain | {"padding": 1.0 - sums["tokens"] / computed if computed else 0.0}
