"""The processes of the trainer: joining torchrun's ranks, or being the only one.

gloo on CPUs, NCCL on GPUs. Importing this module supplies what a CPU lacks, so import it (or `model`) before Megatron.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from services.contract.config import Config
from services.trainer.megatron import cpu

cpu.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402


def init(config: Config) -> torch.device:
    """Join the processes that torchrun started, or be alone when it did not; set up the parallel layout. Returns the device.

    Raises ValueError when the number of processes does not fit the layout.
    """
    trainer = config.trainer
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    layout = trainer.tensor_parallel * trainer.pipeline_parallel
    if world % layout:
        raise ValueError(f"{world} processes do not fit tensor_parallel × pipeline_parallel = {layout}: start a multiple of it")
    device = _device(config)
    timeout = timedelta(seconds=trainer.distributed_timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world == 1:
        # Alone there is nobody to meet: an in-process store needs no port that another program may hold.
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=trainer.tensor_parallel,
        pipeline_model_parallel_size=trainer.pipeline_parallel,
        distributed_timeout_minutes=trainer.distributed_timeout_s / 60,  # type: ignore[arg-type] - a timedelta's minutes
        create_gloo_process_groups=False,
    )
    torch.manual_seed(config.run.seed)
    if device.type == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed)
    return device


def _device(config: Config) -> torch.device:
    if config.trainer.device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError('trainer.device = "cuda", but torch sees no GPU: install its CUDA build, or set "cpu"')
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    torch.set_num_threads(config.trainer.threads)
    # Adam's averages of parameters that get no gradient shrink into denormal numbers, which a CPU handles many times slower.
    torch.set_flush_denormal(True)
    return torch.device("cpu")


def shutdown() -> None:
    """Leave the process group. Safe to call twice."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
