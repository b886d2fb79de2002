"""Model, optimizer and random state in Megatron's distributed checkpoint format.

On the same layout a resumed run continues bit by bit. Weights and optimizer state can also be loaded on another layout;
random state cannot, and is then left as it is (nothing in training draws from it). Whether a checkpoint is whole is the
caller's to know: write into a temporary folder and rename it.
"""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from services.trainer.megatron import cpu

cpu.install()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.optimizer.optimizer import MegatronOptimizer  # noqa: E402

from services.trainer.megatron.schedule import bare  # noqa: E402

# The only form of the optimizer's state that loads correctly on another number of data-parallel ranks.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def save(folder: Path, model: torch.nn.Module, optimizer: MegatronOptimizer) -> None:
    """Write into `folder`, which must exist and be empty. All ranks call this together."""
    # Megatron would start a server process just to hand one result over, and keep it; saving here is synchronous.
    filesystem_async._results_queue = queue.Queue()  # type: ignore[assignment]
    dist_checkpointing.save(_state(model, optimizer, loading=False), str(folder))


def load(folder: Path, model: torch.nn.Module, optimizer: MegatronOptimizer) -> None:
    """All ranks call this together. Raises FileNotFoundError when `folder` holds no checkpoint."""
    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise FileNotFoundError(f"{folder} is no checkpoint: it was not finished, or it is another folder")
    wanted = _state(model, optimizer, loading=True)
    if dist_checkpointing.load_common_state_dict(str(folder))["layout"] != _layout():
        del wanted["random"]
    loaded: Any = dist_checkpointing.load(wanted, str(folder))
    bare(model).load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    if "random" in loaded:
        _set_random_state(loaded["random"])


def _state(model: torch.nn.Module, optimizer: MegatronOptimizer, loading: bool) -> dict[str, Any]:
    weights = bare(model).sharded_state_dict(metadata=METADATA)
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=loading, metadata=METADATA),
        "random": ShardedObject("random", _random_state(), (world,), (rank,)),
        "layout": _layout(),
    }


def _layout() -> dict[str, int]:
    return {
        "processes": dist.get_world_size(),
        "tensor_parallel": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_parallel": parallel_state.get_pipeline_model_parallel_world_size(),
    }


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
