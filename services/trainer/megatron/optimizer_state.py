"""Checkpoints of the distributed optimizer with torch's AdamW: three faults mended, and neither copies nor duplicates.

Torch's AdamW is what there is without Apex and Transformer Engine: on a CPU always, on a GPU sometimes. The stored form stays
Megatron's `fully_reshardable`, so that a checkpoint loads under another layout.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

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
_gathered_states = DistributedOptimizer.sharded_param_state_fully_reshardable


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

    With several data-parallel ranks Megatron gathers the parts. A single rank has everything: its live tensors are stored,
    and loaded into, as they are, where gathering would hold four copies of the model. A float32 parameter is the model's
    own and stored there already; in half precision "param" is the float32 original and must be kept.
    """
    if self.data_parallel_group.size() == 1:
        states = _own_states(self, weights)
    else:
        states = _gathered_states(self, weights, is_loading, metadata) or {}
    if not self.config.bf16:
        for tensors in states.values():
            tensors.pop("param")
    return states


def _own_states(self: Any, weights: Any) -> dict[int, Any]:
    described = {entry.data: entry for entry in nested_values(extract_sharded_tensors_and_factories(weights)[0])}
    parameters = [parameter for buffer in self.buffers for parameter in buffer.param_index_map]
    return {i: _describe(self, parameter, described[parameter]) for i, parameter in enumerate(parameters)}


def _describe(self: Any, parameter: Any, weight: Any) -> dict[str, Any]:
    """The parameter's states, each stored as its weight is stored, under a name of its own."""
    found = {}
    for name, tensor in self._get_main_param_and_optimizer_states(parameter).items():
        if name == "step":
            continue
        data = tensor.detach().view(weight.data.shape)
        changes = {"key": f"optimizer.state.{name}.{weight.key}", "data": data}
        if not isinstance(weight, ShardedTensorFactory):
            changes["dtype"] = data.dtype
        found[name] = replace(weight, **changes)
    return found
