"""What Megatron-Core takes for granted and a machine without CUDA lacks. With CUDA nothing here has any effect.

Call `install()` before the first import of `megatron.core`. Left out on purpose: CUDA's random state. Dropout is 0 and
weights come from a file, so nothing in the model draws random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
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


def mend_adamw_checkpoints() -> None:
    """Three faults of the distributed optimizer's checkpoints that only show with torch's AdamW.

    That is: without Apex and Transformer Engine, so on a CPU always and on a GPU sometimes. Call after importing Megatron.
    """
    from megatron.core.optimizer import distrib_optimizer

    optimizer_class = distrib_optimizer.DistributedOptimizer
    if distrib_optimizer.HAVE_APEX_OR_TE or getattr(optimizer_class, "_forage_mended", False):
        return
    set_states = optimizer_class._set_main_param_and_optimizer_states
    load_state_dict = optimizer_class.load_state_dict
    sharded_state_dict = optimizer_class.sharded_state_dict

    def set_states_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # Wants every state of the parameter, but "step" travels with the parameter groups and is not among `tensors`.
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        return set_states(self, model_param, {**tensors, "step": state["step"]} if "step" in state else tensors)

    def sharded_state_dict_when_fresh(
        self: Any, model_sharded_state_dict: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        # Asserts that all steps are equal, which no step at all is not: an optimizer that never stepped could not load.
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return sharded_state_dict(self, model_sharded_state_dict, is_loading, *args, **kwargs)

    def load_state_dict_own_steps(self: Any, state_dict: Any) -> Any:
        # One step tensor would be shared by all parameters and so be counted up once for each of them.
        result = load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
        return result

    optimizer_class._set_main_param_and_optimizer_states = set_states_with_step
    optimizer_class.sharded_state_dict = sharded_state_dict_when_fresh  # type: ignore[assignment]
    optimizer_class.load_state_dict = load_state_dict_own_steps
    optimizer_class._forage_mended = True  # type: ignore[attr-defined]
