"""Checkpoints of the distributed optimizer with torch's AdamW: four faults mended, and neither copies nor duplicates.

Torch's AdamW is what there is without Apex and Transformer Engine: on a CPU always, on a GPU sometimes. The stored form stays
Megatron's `fully_reshardable`, so that a checkpoint loads under another layout.

| Megatron 0.16.1                                     | goes wrong                                                          |
|-----------------------------------------------------|---------------------------------------------------------------------|
| wants "step" among a parameter's tensors            | loading fails: "step" travels with the parameter groups             |
| loads one step tensor for all parameters            | it is counted up once for each of them                              |
| asserts that all steps are equal                    | an optimizer that never stepped can neither be saved nor loaded     |
| gathers buckets without the padding between them    | what follows the first bucket is read shifted: tied embeddings on   |
|                                                     | the last of several pipeline stages, with data parallel ranks       |
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from services.trainer.megatron import cpu

cpu.install()

from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory  # noqa: E402
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories  # noqa: E402
from megatron.core.optimizer import distrib_optimizer  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402

_set_states = DistributedOptimizer._set_main_param_and_optimizer_states
_load_state_dict = DistributedOptimizer.load_state_dict
_sharded_state_dict = DistributedOptimizer.sharded_state_dict


def mend_adamw_checkpoints() -> None:
    """Replace the methods at fault; may be called again."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer: Any = DistributedOptimizer
    optimizer._set_main_param_and_optimizer_states = _set_states_with_step
    optimizer.load_state_dict = _load_state_dict_own_steps
    optimizer.sharded_state_dict = _sharded_state_dict_when_fresh
    optimizer.sharded_param_state_fully_reshardable = _states_without_copies


def _set_states_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
    # Wants every state of the parameter, but "step" travels with the parameter groups and is not among `tensors`;
    # nor is a float32 parameter, which the model's own weights restore.
    own = self._get_main_param_and_optimizer_states(model_param)
    return _set_states(self, model_param, {name: tensors.get(name, own[name]) for name in own})


def _load_state_dict_own_steps(self: Any, state_dict: Any) -> None:
    # One step tensor would be shared by all parameters and so be counted up once for each of them.
    _load_state_dict(self, state_dict)
    for state in self.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def _sharded_state_dict_when_fresh(self: Any, *args: Any, **kwargs: Any) -> Any:
    # Asserts that all steps are equal, which no step at all is not: an optimizer that never stepped could not save or load.
    if not self.optimizer.state:
        for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
            averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device)} | averages
    return _sharded_state_dict(self, *args, **kwargs)


def _states_without_copies(self: Any, weights: Any, is_loading: bool = False, metadata: Any = None) -> dict[int, Any]:
    """{index: {"exp_avg": …, "exp_avg_sq": …}} of every parameter, as Megatron's method of this place returns it.

    A single data-parallel rank has everything: its live tensors are stored, and loaded into, as they are. Several ranks add
    up their parts. A float32 parameter is the model's own and stored there already; in half precision "param" is the float32
    original and must be kept.
    """
    names = ("param", "exp_avg", "exp_avg_sq") if self.config.bf16 else ("exp_avg", "exp_avg_sq")
    described = {entry.data: entry for entry in nested_values(extract_sharded_tensors_and_factories(weights)[0])}
    parameters = [parameter for buffer in self.buffers for parameter in buffer.param_index_map]
    return {
        i: {name: _describe(described[parameter], name, _whole(self, parameter, name, is_loading)) for name in names}
        for i, parameter in enumerate(parameters)
    }


def _whole(self: Any, parameter: Any, name: str, is_loading: bool) -> torch.Tensor:
    """The parameter's state in the parameter's shape. To load into, its content does not matter."""
    here = parameter in self.model_param_group_index_map
    own = self._get_main_param_and_optimizer_states(parameter)[name].detach() if here else None
    if own is not None and self.data_parallel_group.size() == 1:
        return own.view(parameter.shape)
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if is_loading:
        return whole.cpu().view(parameter.shape)
    if own is not None:
        part = self._get_model_param_range_map(parameter)["param"]
        whole[part.start : part.end] = own
    dist.all_reduce(whole, group=self.data_parallel_group)
    return whole.cpu().view(parameter.shape)


def _describe(weight: Any, name: str, data: torch.Tensor) -> Any:
    """Stored as the weight is stored, under a name of its own."""
    changes = {"key": f"optimizer.state.{name}.{weight.key}", "data": data}
    return replace(weight, **changes if isinstance(weight, ShardedTensorFactory) else changes | {"dtype": data.dtype})
