"""Micro-batches through Megatron's forward-backward schedule, with or without pipeline stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from services.trainer.megatron import cpu
from services.trainer.megatron.batching import MicroBatch

cpu.install()

from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from services.trainer.megatron.logprobs import token_logprobs  # noqa: E402
from services.trainer.megatron.model import PolicyModel  # noqa: E402

Finish = Callable[[Tensor, MicroBatch], tuple[Tensor, Any]]
"""(log-probs [n], micro-batch) -> (share of the loss, result)."""


def bare(model: torch.nn.Module) -> PolicyModel:
    """The model inside its wrappers for data parallelism and half precision."""
    while not isinstance(model, PolicyModel):
        model = model.module  # type: ignore[assignment]
    return model


def run_schedule(model: torch.nn.Module, batches: Sequence[MicroBatch], finish: Finish, forward_only: bool) -> list[Any]:
    """The results of `finish`, one per micro-batch; an empty list on all but the last pipeline stage.

    Unless `forward_only`, the gradient of the shares' sum is added up in the model's buffers, over data-parallel ranks too.
    """
    policy = bare(model)

    def conclude(output: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, Any]:
        logprobs = token_logprobs(output[0], batch.targets, batch.temperatures, policy.architecture.vocab)
        share, result = finish(logprobs, batch)
        return share, torch.zeros((), dtype=torch.int, device=share.device), result

    def forward_step(source: Iterator[MicroBatch], wrapped: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(source)
        policy.positions = batch.positions
        length = batch.input_ids.shape[1]
        position_ids = torch.arange(length, device=batch.input_ids.device).expand_as(batch.input_ids)
        return wrapped(batch.input_ids, position_ids, None), lambda output: conclude(output, batch)

    first = batches[0].input_ids
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=first.shape[1],
        micro_batch_size=first.shape[0],
        forward_only=forward_only,
    )
