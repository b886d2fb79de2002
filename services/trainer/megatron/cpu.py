"""What Megatron-Core takes for granted and a machine without CUDA lacks. With CUDA nothing here has any effect.

Call `install()` before the first import of `megatron.core`. Left out on purpose: CUDA's random state. Dropout is 0 and
weights come from a file, so nothing in the model draws random numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
NOISE = (
    ".*Apex is not installed.*",
    ".*Apex are not installed.*",
    "full scope is deprecated.*",
    ".*attribute of a Tensor that is not a leaf.*",
    r"`torch\.distributed\..* is deprecated.*",
    "`load_state_dict` is deprecated.*",
    "Please use DTensor instead.*",
)
"""Warnings of Megatron and torch about each other that nobody who reads the trainer's log can act on."""
_active: list[TorchFunctionMode] = []


class _CpuInsteadOfCuda(TorchFunctionMode):
    """Answers literal requests for CUDA with the CPU.

    A mode and not replaced functions: `torch.zeros` and the like stay what other libraries expect them to be
    (transformers compares them by identity when it loads a model).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # The schedules, the optimizer and gradient clipping allocate with device="cuda".
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        # Tensors are moved with x.cuda().
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        # Dtypes are told by the name of the tensor's type, such as "torch.cuda.FloatTensor".
        if func is torch.Tensor.type and isinstance(result, str):
            return result if ".cuda." in result else result.replace("torch.", "torch.cuda.", 1)
        return result


def _names_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def install() -> bool:
    """Supply what is missing; returns whether anything was. May be called again."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    if torch.cuda.is_available() or _active:
        return False
    # `device=torch.cuda.current_device()` is how buffers are placed.
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]
    # Called after copies to the host and after pipeline communication; a CPU has nothing to wait for.
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.current_stream = lambda *_, **__: None  # type: ignore[assignment,return-value]
    mode = _CpuInsteadOfCuda()
    mode.__enter__()
    _active.append(mode)
    return True


def spare_random_state() -> None:
    """Recomputation keeps and restores CUDA's random state around every layer; without CUDA, and without dropout, there is none."""
    if torch.cuda.is_available():
        return
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.empty(0)
    random._set_cuda_rng_state = lambda *_, **__: None
