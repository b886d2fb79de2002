"""A model under training: rows in, one optimizer step at a time. The policy's learner and the critic are both one.

Every rank calls every method with the same arguments, in the same order; the rows are split over data-parallel ranks here,
and all ranks get the same answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from services.contract.config import Config
from services.trainer.megatron import cpu

cpu.install()

from megatron.core import parallel_state  # noqa: E402

from services.trainer.megatron.architecture import Architecture  # noqa: E402
from services.trainer.megatron.batching import MicroBatch, Row, filler, micro_batch  # noqa: E402
from services.trainer.megatron.model import TokenModel  # noqa: E402
from services.trainer.megatron.optimizer import (  # noqa: E402
    make_optimizer,
    set_learning_rate,
    state_to,
    wrap,
)
from services.trainer.megatron.packing import imbalance, plan  # noqa: E402
from services.trainer.megatron.schedule import run_schedule  # noqa: E402

Share = Callable[[Tensor, MicroBatch], tuple[Tensor, dict[str, Tensor]]]
"""(the model's answer [k, n], micro-batch) -> (share of the loss, sums of figures over the n tokens)."""


class Trainable:
    def __init__(self, config: Config, model: TokenModel) -> None:
        self.trainer = config.trainer
        self.device = device_of(config)
        self.architecture: Architecture = model.architecture
        self.bare = model
        self.model = wrap(model, trainable=True)
        self.optimizer = make_optimizer(self.model, self.trainer)

    def step(self, rows: Sequence[Row], contributing: Sequence[Row], share: Share, learning_rate: float) -> dict[str, float]:
        """One optimizer step on `contributing`, which are some of `rows`. Returns the same metrics on every rank:

        loss, grad_norm (before clipping), rows, rows_trained, tokens (read by the model), trained_tokens (the model's own),
        padding (share of what was computed that is no row's), imbalance (estimated work of the busiest data-parallel rank over
        the mean), microbatches (of each rank), seconds, and the share's figures as means over the trained tokens (absent if
        there are none).
        Raises FloatingPointError when the loss or the gradient is not finite.
        """
        started = time.perf_counter()
        self.model.train()
        self.model.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        planned = self._plan(contributing)
        sums = self._accumulate(self._own(contributing, planned), share)
        counts = {"rows": float(len(rows)), "rows_trained": float(len(contributing)), "microbatches": float(len(planned[0]))}
        counts["imbalance"] = imbalance(self._work(contributing), [list(chain(*batches)) for batches in planned])
        grad_norm = self._apply(sums["loss"], learning_rate)
        return _metrics(sums) | counts | {"grad_norm": grad_norm, "seconds": time.perf_counter() - started}

    def answers(self, model: torch.nn.Module, rows: Sequence[Row]) -> list[Tensor]:
        """What `model` answers at every response token, first answer of each: [response length] float32, 0 where the mask is 0."""
        indices = [i for i, row in enumerate(rows) if row.targets]
        asked = [rows[i] for i in indices]
        batches = self._own(asked, self._plan(asked))
        with torch.no_grad():
            results = run_schedule(model, batches, lambda answer, _: (answer.sum(), answer[0].cpu()), forward_only=True)
        found: list[tuple[int, Tensor]] = []
        for batch, values in zip(batches, results, strict=False):
            if batch.rows:
                found += zip((indices[i] for i in batch.rows), values.split(batch.counts), strict=True)
        filled = [torch.zeros(len(row.loss_mask)) for row in rows]
        for part in _all_gather(found if _speaks_for_its_rows() else []):
            for i, values in part:
                filled[i][torch.tensor(rows[i].targets) - rows[i].prompt_length] = values
        return filled

    def _work(self, rows: Sequence[Row]) -> list[float]:
        return [self.architecture.forward_flops(row.input_length, len(row.targets)) for row in rows]

    def _plan(self, rows: Sequence[Row]) -> list[list[list[int]]]:
        """For every data-parallel rank its micro-batches. Raises ValueError for a token that the model does not have."""
        used, vocab = {token for row in rows for token in (min(row.token_ids), max(row.token_ids))}, self.architecture.vocab
        if foreign := [token for token in used if not 0 <= token < vocab]:
            raise ValueError(f"a row has token {foreign[0]}, but the model knows 0 to {vocab - 1}: use the model's own tokenizer")
        ranks = parallel_state.get_data_parallel_world_size()
        return plan([row.input_length for row in rows], self._work(rows), ranks, self.trainer.max_tokens_per_microbatch)

    def _own(self, rows: Sequence[Row], planned: list[list[list[int]]]) -> list[MicroBatch]:
        own = planned[parallel_state.get_data_parallel_rank()]
        return [micro_batch(rows, indices, self.device) if indices else filler(self.device) for indices in own]

    def _accumulate(self, batches: list[MicroBatch], share: Share) -> dict[str, float]:
        """Leaves the batch's gradient in the model's buffers. Returns sums over all micro-batches of all ranks."""

        def finish(answer: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
            if not batch.rows:
                return answer.sum() * 0.0, {}
            part, sums = share(answer, batch)
            return part, {"loss": part.detach(), **sums}

        results = run_schedule(self.model, batches, finish, forward_only=False)
        own = [{name: float(value) for name, value in result.items()} for result in results]
        if own:
            own += [_sizes(batch) for batch in batches]
        return {"loss": 0.0} | _add(part for parts in _all_gather(own if _speaks_for_its_rows() else []) for part in parts)

    def _apply(self, loss: float, learning_rate: float) -> float:
        """The gradient's norm before clipping."""
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}; the weights were left as they are: look at the batch's log-probs")
        set_learning_rate(self.optimizer, learning_rate)
        with self.state_here():
            _, norm, _ = self.optimizer.step()  # type: ignore[misc]
        grad_norm = float(norm or 0.0)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient's norm is {grad_norm}; the weights are spoilt: go back to a checkpoint")
        return grad_norm

    @contextmanager
    def state_here(self) -> Iterator[None]:
        """With `trainer.offload_optimizer` Adam's averages are on this rank's device only inside."""
        if not self.trainer.offload_optimizer:
            yield
            return
        state_to(self.optimizer, self.device)
        try:
            yield
        finally:
            state_to(self.optimizer, cpu.CPU)


def device_of(config: Config) -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if config.trainer.device == "cuda" else cpu.CPU


def _speaks_for_its_rows() -> bool:
    """Of the ranks that computed the same rows, the one whose results are gathered."""
    return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0


def _all_gather(value: Any) -> list[Any]:
    if dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _add(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _sizes(batch: MicroBatch) -> dict[str, float]:
    computed = batch.input_ids.numel()
    return {"trained_tokens": sum(batch.counts), "tokens": computed if batch.rows else 0, "computed_tokens": computed}


def _metrics(sums: dict[str, float]) -> dict[str, float]:
    """Sums over tokens become means; sizes stay as they are."""
    plain = {name: float(sums[name]) for name in ("loss", "tokens", "trained_tokens")}
    tokens = max(sums["trained_tokens"], 1)
    means = {name: value / tokens for name, value in sums.items() if name not in (*plain, "computed_tokens")}
    return means | plain | {"padding": 1.0 - sums["tokens"] / sums["computed_tokens"]}
