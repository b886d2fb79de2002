"""A Hugging Face architecture as a Megatron GPTModel over packed rows that answers only what is asked of a micro-batch.

Of a search episode about a fifth of the tokens is the model's own; the last layer (a sixth of a small model's work and most
of its peak memory) runs at those alone. `ask` says which, before each forward.

| class         | last layer                          | answer at the model tokens                                  |
|---------------|-------------------------------------|-------------------------------------------------------------|
| `PolicyModel` | output layer over the vocabulary    | [1, n] log-probs, or [2, n] with entropies                  |
| `ValueModel`  | one row of weights, 0 if not stored | [1, n] values                                               |
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from services.contract.config import TrainerConfig
from services.trainer.megatron import cpu

cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from services.trainer.megatron.architecture import Architecture  # noqa: E402
from services.trainer.megatron.batching import MicroBatch  # noqa: E402
from services.trainer.megatron.layers import layer_spec  # noqa: E402
from services.trainer.megatron.logprobs import token_logprobs  # noqa: E402

FLOAT32_BYTES = 4


def transformer_config(architecture: Architecture, trainer: TrainerConfig) -> TransformerConfig:
    """For the parallel layout that is set up now."""
    a, dtype = architecture, getattr(torch, trainer.dtype)
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
        # The name is Megatron's; it means that the activation is the module that the specification of a layer names.
        use_te_activation_func=not trainer.transformer_engine,
        add_bias_linear=False,
        add_qkv_bias=a.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Losses come with the batch's own denominators: gradients are summed over ranks, never averaged.
        calculate_per_token_loss=True,
        **_layout(),
        **_recomputation(trainer),
        **_initialization(),
        **_no_fusions(),
    )


def _layout() -> dict[str, Any]:
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": pipeline,
        # Micro-batches are cut by tokens, so their shapes differ and pipeline stages must tell each other.
        "variable_seq_lengths": pipeline > 1,
        "moe_token_dispatcher_type": "alltoall",  # asked for with variable lengths, though there are no experts
    }


def _recomputation(trainer: TrainerConfig) -> dict[str, Any]:
    """Of a layer only its input is kept, and the rest computed once more for the gradient."""
    if not trainer.recompute_activations:
        return {}
    cpu.spare_random_state()
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _initialization() -> dict[str, Any]:
    # Every weight is read from a file, so drawing it first would be lost time. Initialization itself must stay on:
    # it marks the weights that are split over tensor-parallel ranks, without which their gradient norm is wrong.
    leave = {"init_method": _leave, "output_layer_init_method": _leave}
    return {"perform_initialization": True, "use_cpu_initialization": not torch.cuda.is_available(), **leave}


def _leave(weight: Tensor) -> Tensor:
    return weight


def _no_fusions() -> dict[str, Any]:
    """Kernels that need Apex or Transformer Engine."""
    names = ("persist_layer_norm", "masked_softmax_fusion", "gradient_accumulation_fusion", "bias_activation_fusion")
    return dict.fromkeys((*names, "bias_dropout_fusion", "apply_rope_fusion"), False)


class TokenModel(GPTModel):
    """What both models have in common. The last pipeline stage returns float32 [k, n]: k answers for n model tokens."""

    def __init__(self, architecture: Architecture, trainer: TrainerConfig, tied: bool) -> None:
        config = transformer_config(architecture, trainer)
        super().__init__(
            config,
            layer_spec(architecture, trainer.transformer_engine),
            vocab_size=architecture.padded_vocab(config.tensor_model_parallel_size),
            max_sequence_length=architecture.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            parallel_output=True,
            share_embeddings_and_output_weights=tied,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,  # type: ignore[arg-type]
        )
        self.architecture = architecture
        self.asked: MicroBatch | None = None

    def ask(self, batch: MicroBatch, wrapped: torch.nn.Module) -> Tensor:
        """Forward of this stage, through the wrappers for data parallelism and half precision that the model is in."""
        self.asked = batch
        packed = PackedSeqParams(
            qkv_format="thd",  # type: ignore[arg-type]
            cu_seqlens_q=batch.ends,
            cu_seqlens_kv=batch.ends,
            max_seqlen_q=batch.longest,
            max_seqlen_kv=batch.longest,
        )
        return wrapped(batch.input_ids, None, None, packed_seq_params=packed)

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        assert self.asked is not None, "call the model through `ask`"
        return self._answer(hidden_states.squeeze(1).index_select(0, self.asked.positions), self.asked)

    def _answer(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """hidden [n, size] at the model tokens -> float32 [k, n]."""
        raise NotImplementedError


class PolicyModel(TokenModel):
    def __init__(self, architecture: Architecture, trainer: TrainerConfig) -> None:
        super().__init__(architecture, trainer, architecture.tied_embeddings)
        self.wants_entropy = False
        self.chunk_bytes = trainer.logits_chunk_mib << 20

    def _answer(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        assert weight is not None
        chunk = max(1, self.chunk_bytes // (weight.shape[0] * FLOAT32_BYTES))
        return token_logprobs(hidden, weight, batch.targets, batch.temperatures, self.architecture.vocab, chunk, self.wants_entropy)


class ValueModel(TokenModel):
    """Hugging Face calls the last layer `score`, as in its token classifiers."""

    def __init__(self, architecture: Architecture, trainer: TrainerConfig) -> None:
        super().__init__(architecture, trainer, tied=False)
        if self.post_process:
            self.output_layer = torch.nn.Linear(architecture.hidden, 1, bias=False, dtype=getattr(torch, trainer.dtype))

    def _answer(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        return self.output_layer(hidden).float().t()
