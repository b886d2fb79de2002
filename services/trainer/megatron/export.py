"""The policy's weights under Hugging Face names, whole, on every rank, whatever the layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from services.trainer.megatron import cpu
from services.trainer.megatron.model import TokenModel
from services.trainer.megatron.names import stage_weights

cpu.install()

from megatron.core import parallel_state  # noqa: E402


def whole_weights(model: TokenModel) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor) in the model's dtype; all ranks iterate together. Tensors may be views of live parameters."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if stages == 1:
        yield from stage_weights(model, model.architecture)
        return
    for stage in range(stages):
        yield from _from_stage(model, stage)


def _from_stage(model: TokenModel, stage: int) -> Iterator[tuple[str, Tensor]]:
    """One stage's weights, sent to the other stages."""
    group = parallel_state.get_pipeline_model_parallel_group()
    source = dist.get_process_group_ranks(group)[stage]  # type: ignore[arg-type]
    here = parallel_state.get_pipeline_model_parallel_rank() == stage
    own = [(name, tensor.contiguous()) for name, tensor in stage_weights(model, model.architecture)] if here else []
    described: list[Any] = [[(name, tensor.shape) for name, tensor in own]]
    dist.broadcast_object_list(described, src=source, group=group)  # type: ignore[arg-type]
    like = next(model.parameters())
    for i, (name, shape) in enumerate(described[0]):
        tensor = own[i][1] if here else torch.empty(shape, dtype=like.dtype, device=like.device)
        dist.broadcast(tensor, src=source, group=group)  # type: ignore[arg-type]
        yield name, tensor
