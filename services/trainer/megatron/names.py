"""One map between Hugging Face's names and Megatron's, read in both directions; no arithmetic, so bit-exact.

A parameter that the map does not know is an error. `Kind` says how the tensors differ: how several Hugging Face tensors
are joined into one, and along which dimension tensor-parallel ranks hold a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from services.trainer.megatron import cpu
from services.trainer.megatron.architecture import Architecture

cpu.install()

from megatron.core import parallel_state  # noqa: E402

from services.trainer.megatron.model import ValueModel  # noqa: E402

Kind = Literal["whole", "vocab", "row", "gated", "qkv"]
"""whole: every rank holds all. vocab, qkv: split by rows; row: by columns (Megatron's RowParallelLinear).
gated: gate and up projection, each split by rows, a rank's two parts one after the other."""
Entry = tuple[list[str], Kind]
EMBEDDING, HEAD, VALUE_HEAD = "model.embed_tokens.weight", "lm_head.weight", "score.weight"


def name_map(architecture: Architecture, model: torch.nn.Module) -> dict[str, Entry]:
    """Megatron's parameter name on this pipeline stage -> (Hugging Face names, kind). KeyError names an unknown parameter."""
    known: dict[str, Entry] = {
        "embedding.word_embeddings.weight": ([EMBEDDING], "vocab"),
        "decoder.final_layernorm.weight": (["model.norm.weight"], "whole"),
        "output_layer.weight": _last_layer(architecture, model),
    }
    for local, layer in enumerate(model.decoder.layers):  # type: ignore[union-attr,arg-type]
        known |= _layer_entries(f"decoder.layers.{local}.", f"model.layers.{layer.layer_number - 1}.")
    names = [name for name, _ in model.named_parameters()]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise KeyError(f"no Hugging Face name for {', '.join(unknown)}: add it to services/trainer/megatron/names.py")
    return {name: known[name] for name in names}


def _last_layer(architecture: Architecture, model: torch.nn.Module) -> Entry:
    if isinstance(model, ValueModel):
        return [VALUE_HEAD], "whole"
    return [EMBEDDING if architecture.tied_embeddings else HEAD], "vocab"


def _layer_entries(ours: str, theirs: str) -> dict[str, Entry]:
    projections = [f"{theirs}self_attn.{x}_proj" for x in "qkv"]
    gated = [f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight"]
    return {
        f"{ours}input_layernorm.weight": ([f"{theirs}input_layernorm.weight"], "whole"),
        f"{ours}pre_mlp_layernorm.weight": ([f"{theirs}post_attention_layernorm.weight"], "whole"),
        # Transformer Engine keeps the two norms inside the layers that follow them.
        f"{ours}self_attention.linear_qkv.layer_norm_weight": ([f"{theirs}input_layernorm.weight"], "whole"),
        f"{ours}mlp.linear_fc1.layer_norm_weight": ([f"{theirs}post_attention_layernorm.weight"], "whole"),
        f"{ours}self_attention.linear_qkv.weight": ([f"{p}.weight" for p in projections], "qkv"),
        f"{ours}self_attention.linear_qkv.bias": ([f"{p}.bias" for p in projections], "qkv"),
        f"{ours}self_attention.q_layernorm.weight": ([f"{theirs}self_attn.q_norm.weight"], "whole"),
        f"{ours}self_attention.k_layernorm.weight": ([f"{theirs}self_attn.k_norm.weight"], "whole"),
        f"{ours}self_attention.linear_proj.weight": ([f"{theirs}self_attn.o_proj.weight"], "row"),
        f"{ours}mlp.linear_fc1.weight": (gated, "gated"),
        f"{ours}mlp.linear_fc2.weight": ([f"{theirs}mlp.down_proj.weight"], "row"),
    }


@torch.no_grad()
def load_weights(model: torch.nn.Module, architecture: Architecture, read: Callable[[str], Tensor]) -> None:
    """Fill this rank's parameters. read: Hugging Face name -> full tensor."""
    parameters = dict(model.named_parameters())
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    for name, (sources, kind) in name_map(architecture, model).items():
        full = _join_sources(architecture, kind, [read(source) for source in sources])
        if kind == "vocab":
            full = F.pad(full, (0, 0, 0, architecture.padded_vocab(ranks) - full.shape[0]))
        part = _part(kind, full, parallel_state.get_tensor_model_parallel_rank(), ranks)
        if part.shape != parameters[name].shape:
            raise ValueError(f"{', '.join(sources)}: {tuple(part.shape)}, but the model has {tuple(parameters[name].shape)}")
        parameters[name].copy_(part)


@torch.no_grad()
def stage_weights(model: torch.nn.Module, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) of this pipeline stage; all its tensor-parallel ranks iterate together.

    A tensor may be a view of the live parameter: use it before the next step, or clone it.
    """
    parameters = dict(model.named_parameters())
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    for name, (targets, kind) in name_map(architecture, model).items():
        if name == "output_layer.weight" and targets == [EMBEDDING]:
            continue  # a tied head; it is given as the embedding
        own = parameters[name].detach()
        parts = [own] if ranks == 1 or kind == "whole" else _gather(own, ranks)
        full = _whole(kind, parts)
        if kind == "vocab":
            full = full[: architecture.vocab]
        yield from zip(targets, _split_targets(architecture, kind, full), strict=True)


def _gather(own: Tensor, ranks: int) -> list[Tensor]:
    parts = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(parts, own.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return parts


def _join_sources(architecture: Architecture, kind: Kind, tensors: list[Tensor]) -> Tensor:
    """qkv: Megatron keeps each key-value head next to the query heads that share it. gated: [2, ffn, hidden]."""
    if kind == "gated":
        return torch.stack(tensors)
    if kind != "qkv":
        return tensors[0]
    groups, tail = architecture.kv_heads, tensors[0].shape[1:]
    return torch.cat([t.reshape(groups, -1, *tail) for t in tensors], dim=1).reshape(-1, *tail)


def _split_targets(architecture: Architecture, kind: Kind, full: Tensor) -> list[Tensor]:
    if kind == "gated":
        return list(full.unbind(0))
    if kind != "qkv":
        return [full]
    groups, tail, head = architecture.kv_heads, full.shape[1:], architecture.head_dim
    queries = architecture.heads // groups * head
    return [part.reshape(-1, *tail) for part in full.reshape(groups, -1, *tail).split([queries, head, head], dim=1)]


def _part(kind: Kind, full: Tensor, rank: int, ranks: int) -> Tensor:
    if kind == "whole":
        return full
    part = full.chunk(ranks, dim=1 if kind in ("row", "gated") else 0)[rank]
    return part.reshape(-1, part.shape[-1]) if kind == "gated" else part


def _whole(kind: Kind, parts: list[Tensor]) -> Tensor:
    if kind == "whole":
        return parts[0]
    if kind == "gated":
        return torch.cat([p.reshape(2, -1, p.shape[-1]) for p in parts], dim=1)
    return torch.cat(parts, dim=1 if kind == "row" else 0) if len(parts) > 1 else parts[0]
