"""Of what modules a layer is built: Megatron's with an attention and activation of ours, or Transformer Engine's if installed."""

from __future__ import annotations

from typing import Any

from services.trainer.megatron import cpu
from services.trainer.megatron.activation import SwiGlu
from services.trainer.megatron.architecture import Architecture, UnsupportedModelError
from services.trainer.megatron.attention import PackedAttention

cpu.install()

from megatron.core.models.gpt import gpt_layer_specs  # noqa: E402


def layer_spec(architecture: Architecture, transformer_engine: bool) -> Any:
    """Megatron's specification of one layer. Raises UnsupportedModelError when Transformer Engine is asked for and not there."""
    if transformer_engine:
        return _transformer_engine_spec(architecture)
    spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=architecture.qk_norm)
    spec.submodules.self_attention.submodules.core_attention = PackedAttention  # type: ignore[union-attr]
    spec.submodules.mlp.submodules.activation_func = SwiGlu  # type: ignore[union-attr]
    return spec


def _transformer_engine_spec(architecture: Architecture) -> Any:
    """Fused layers and attention of NVIDIA's own. Written after Megatron's interface; no test of this project has run it."""
    if not gpt_layer_specs.HAVE_TE:
        raise UnsupportedModelError(
            "trainer.transformer_engine is true, but the package transformer_engine cannot be imported: "
            "install it, or set it to false"
        )
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=architecture.qk_norm)
