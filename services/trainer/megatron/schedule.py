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

from services.trainer.megatron.model import TokenModel  # noqa: E402

Finish = Callable[[Tensor, MicroBatch], tuple[Tensor, Any]]
"""(the model's answer [k, n], micro-batch) -> (share of the loss, result)."""


def bare(model: torch.nn.Module) -> TokenModel:
    """The model inside its wrappers for data parallelism and half precision."""
    while not isinstance(model, TokenModel):
        model = model.module  # type: ignore[assignment]
    return model


def run_schedule(model: torch.nn.Module, batches: Sequence[MicroBatch], finish: Finish, forward_only: bool) -> list[Any]:
    """The results of `finish`, one per micro-batch; an empty list on all but the last pipeline stage.

    Unless `forward_only`, the gradient of the shares' sum is added up in the model's buffers, over data-parallel ranks too.
    """
    inner = bare(model)

    def conclude(answer: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, Any]:
        share, result = finish(answer, batch)
        return share, torch.zeros((), dtype=torch.int, device=share.device), result

    def forward_step(source: Iterator[MicroBatch], wrapped: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(source)
        return inner.ask(batch, wrapped), lambda answer: conclude(answer, batch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=batches[0].input_ids.shape[1],
        micro_batch_size=1,
        forward_only=forward_only,
    )
