"""The model wrapped for data parallelism, and AdamW as Megatron's distributed optimizer.

Its state is split over data-parallel ranks; in float32 it updates the model's parameters in place and keeps no copy of them.
"""

from __future__ import annotations

from typing import Any

import torch

from services.contract.config import TrainerConfig
from services.trainer.megatron import cpu

cpu.install()

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.optimizer import MegatronOptimizer  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

from services.trainer.megatron.model import TokenModel  # noqa: E402
from services.trainer.megatron.optimizer_state import mend_adamw_checkpoints  # noqa: E402

mend_adamw_checkpoints()


def wrap(model: TokenModel, trainable: bool) -> torch.nn.Module:
    """In the form that Megatron's schedules take: cast to bfloat16 where configured, with gradient buffers if trainable."""
    config = model.config
    module: torch.nn.Module = Float16Module(config, model) if config.bf16 else model
    if not trainable:
        return module
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(config, ddp, module)
    config.finalize_model_grads_func = _sum_gradients
    return wrapped


def _sum_gradients(models: list[Any], _tokens: Any = None, **kwargs: Any) -> None:
    # Without a token count nothing is divided: shares of the loss carry the batch's denominators already.
    finalize_model_grads(models, None, **kwargs)


def make_optimizer(model: torch.nn.Module, trainer: TrainerConfig) -> MegatronOptimizer:
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=trainer.learning_rate,
            weight_decay=trainer.weight_decay,
            adam_beta1=trainer.beta1,
            adam_beta2=trainer.beta2,
            adam_eps=trainer.adam_eps,
            clip_grad=trainer.clip_grad,
            bf16=trainer.dtype == "bfloat16",
            params_dtype=getattr(torch, trainer.dtype),
            use_distributed_optimizer=True,
        ),
        [model],  # type: ignore[list-item]
        use_gloo_process_groups=False,
    )
    configure(optimizer, trainer)
    return optimizer


def configure(optimizer: MegatronOptimizer, trainer: TrainerConfig) -> None:
    """Set what Megatron leaves to its caller. Also after loading: a checkpoint brings the settings it was saved under."""
    for group in optimizer.param_groups:
        # One pass over memory instead of about ten. Only set on the groups: Megatron chooses the optimizer's arguments.
        group["fused"], group["foreach"] = True, False
        # Norms and biases are in a group of their own whose multiplier is 0. Applying it is the caller's part in Megatron.
        group["weight_decay"] = trainer.weight_decay * group.get("wd_mult", 1.0)
        group["betas"], group["eps"] = (trainer.beta1, trainer.beta2), trainer.adam_eps


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)


def state_to(optimizer: MegatronOptimizer, device: torch.device) -> None:
    """Move Adam's averages, two numbers a weight. The weights stay; in bfloat16 so do their float32 originals."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            state |= {name: value.to(device) for name, value in state.items() if name in ("exp_avg", "exp_avg_sq")}
