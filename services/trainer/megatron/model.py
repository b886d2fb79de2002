"""A Hugging Face architecture as a Megatron GPTModel that computes logits only where they are asked for.

Of a search episode about a fifth of the tokens is the model's own; the output layer (a sixth of a small model's work and
most of its peak memory) runs at those alone. `positions` says where; it is set before each forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from services.trainer.megatron import cpu

cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from services.trainer.megatron.architecture import Architecture  # noqa: E402
from services.trainer.megatron.attention import SdpaCoreAttention  # noqa: E402


def transformer_config(architecture: Architecture, dtype: torch.dtype) -> TransformerConfig:
    """For the parallel layout that is set up now."""
    a = architecture
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    return TransformerConfig(
        num_layers=a.layers,
        hidden_size=a.hidden,
        ffn_hidden_size=a.ffn,
        num_attention_heads=a.heads,
        num_query_groups=a.kv_heads,
        kv_channels=a.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=a.norm_eps,
        qk_layernorm=a.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=a.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=dtype,
        # Micro-batches are cut by tokens, so their shapes differ and pipeline stages must tell each other.
        variable_seq_lengths=pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # asked for with variable lengths, though there are no experts
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Losses come with the batch's own denominators: gradients are summed over ranks, never averaged.
        calculate_per_token_loss=True,
        # Every weight is read from a file, so drawing it first would be lost time. Initialization itself must stay on:
        # it marks the weights that are split over tensor-parallel ranks, without which their gradient norm is wrong.
        perform_initialization=True,
        init_method=_leave,
        output_layer_init_method=_leave,
        use_cpu_initialization=not torch.cuda.is_available(),
        # Off because they need Apex or Transformer Engine.
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )


def _leave(weight: Tensor) -> Tensor:
    return weight


class PolicyModel(GPTModel):
    """GPTModel whose forward returns logits [1, n, vocab / tensor_parallel] at `positions` instead of everywhere.

    positions: [n] indices into the flattened [length, batch] of the last stage's hidden states. None: everywhere.
    """

    def __init__(self, architecture: Architecture, dtype: torch.dtype) -> None:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=architecture.qk_norm)
        spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention  # type: ignore[union-attr]
        super().__init__(
            transformer_config(architecture, dtype),
            spec,
            vocab_size=architecture.padded_vocab(parallel_state.get_tensor_model_parallel_world_size()),
            max_sequence_length=architecture.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,  # type: ignore[arg-type]
        )
        self.architecture = architecture
        self.positions: Tensor | None = None
        if self.post_process:
            self.output_layer.register_forward_pre_hook(self._select)

    def _select(self, _: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.positions is None:
            return None
        hidden, *rest = args
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, self.positions).unsqueeze(1), *rest
