"""Models, optimizers and random state in Megatron's distributed checkpoint format.

On the same layout a resumed run continues bit by bit. Weights and optimizer state can also be loaded on another layout;
random state cannot, and is then left as it is (nothing in training draws from it). Whether a checkpoint is whole is the
caller's to know: write into a temporary folder and rename it.
"""

from __future__ import annotations

import queue
import random
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from services.contract.config import ConfigError
from services.contract.weights import NoSpace
from services.trainer.megatron import cpu

cpu.install()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

from services.trainer.megatron.optimizer import configure  # noqa: E402
from services.trainer.megatron.trainable import Trainable  # noqa: E402

# The only form of the optimizer's state that loads correctly on another number of data-parallel ranks.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
HEADROOM = 1.02
"""Of the tensors' bytes: the format's own tables, and what else a checkpoint holds."""
FULL = 1 << 20
"""Fewer free bytes than this explain why writing failed."""

Parts = Mapping[str, Trainable]
"""Prefix of its tensors' names -> model; the policy's is empty."""


def save(folder: Path, parts: Parts) -> None:
    """Write into `folder`, which must exist and be empty. All ranks call this together.

    Raises NoSpace on every rank, before anything is written, when the disk has too little room; and when others fill it up
    meanwhile.
    """
    with _states_here(parts):
        state = _state(parts, loading=False)
        _check_room(folder, state)
        # Megatron would start a server process just to hand one result over, and keep it; saving here is synchronous.
        filesystem_async._results_queue = queue.Queue()  # type: ignore[assignment]
        try:
            dist_checkpointing.save(state, str(folder))
        except Exception as error:  # a full disk comes out of Megatron as an error of any kind
            if shutil.disk_usage(folder).free < FULL:
                raise NoSpace(f"the disk of {folder} filled up while the checkpoint was written: free some space") from error
            raise


def load(folder: Path, parts: Parts) -> None:
    """All ranks call this together. Raises FileNotFoundError when `folder` is no checkpoint, ConfigError when it lacks a part."""
    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise FileNotFoundError(f"{folder} is no checkpoint: it was not finished, or it is another folder")
    common = dist_checkpointing.load_common_state_dict(str(folder))
    for prefix in parts:
        if f"{prefix}optimizer" not in common:
            name = prefix.rstrip(".") or "policy"
            raise ConfigError(
                f"the checkpoint {folder} has no {name}: the steps before it were made without one. Set "
                "trainer.objective.advantage as it was, or start the run under another run.name"
            )
    with _states_here(parts):
        loaded = _read(folder, parts, same_layout=common["layout"] == _layout())
    if "random" in loaded:
        _set_random_state(loaded["random"])


def _read(folder: Path, parts: Parts, same_layout: bool) -> dict[str, Any]:
    wanted = _state(parts, loading=True)
    if not same_layout:
        del wanted["random"]
    loaded: Any = dist_checkpointing.load(wanted, str(folder))
    for prefix, part in parts.items():
        weights = {name.removeprefix(prefix): tensor for name, tensor in loaded[f"{prefix}model"].items()}
        part.bare.load_state_dict(weights)
        part.optimizer.load_state_dict(loaded[f"{prefix}optimizer"])
        configure(part.optimizer, part.trainer)
    return loaded


def _states_here(parts: Parts) -> ExitStack:
    stack = ExitStack()
    for part in parts.values():
        stack.enter_context(part.state_here())
    return stack


def _state(parts: Parts, loading: bool) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    state: dict[str, Any] = {"random": ShardedObject("random", _random_state(), (world,), (rank,)), "layout": _layout()}
    for prefix, part in parts.items():
        weights = part.bare.sharded_state_dict(prefix=prefix, metadata=METADATA)
        state[f"{prefix}model"] = weights
        state[f"{prefix}optimizer"] = part.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=METADATA)
    return state


def _check_room(folder: Path, state: dict[str, Any]) -> None:
    """Ranks may write to disks of their own, so each looks at its folder; all of them raise if one has too little room."""
    needed, free = HEADROOM * sum(_bytes(value) for value in nested_values(state)), shutil.disk_usage(folder).free
    asked = torch.tensor([needed], dtype=torch.float64, device=torch.cuda.current_device())
    least = torch.tensor([free], dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(asked)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    if least.item() < asked.item():
        raise NoSpace(
            f"{folder} has {least.item() / 1e9:.2f} GB free, the checkpoint needs {asked.item() / 1e9:.2f} GB: free some space"
        )


def _bytes(value: Any) -> int:
    """What this rank writes of a value: nothing of what another rank has too."""
    stored = isinstance(value, ShardedTensor | ShardedTensorFactory) and is_main_replica(value.replica_id)
    return value.data.nbytes if stored and value.data is not None else 0


def _layout() -> dict[str, int]:
    return {
        "processes": dist.get_world_size(),
        "tensor_parallel": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_parallel": parallel_state.get_pipeline_model_parallel_world_size(),
    }


def _random_state() -> dict[str, Any]:
    """Of all that may be drawn from: torch, Python and numpy. Training itself draws from none, a function of one's own may."""
    state = {"cpu": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "python" in state:  # not in checkpoints of before these two were kept
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
