"""What a Hugging Face folder says about its model, and whether a parallel layout can hold it.

Read from `config.json` alone, so that the trainer does not load transformers. Anything that would change the numbers and
is not built here (scaled rope, sliding windows, biases in places of their own) is refused, never ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.contract.config import TrainerConfig

FAMILIES = ("llama", "qwen2", "qwen3")


class UnsupportedModelError(ValueError):
    """The model cannot be trained here, or not in this layout. The message says why and what to change."""


@dataclass(frozen=True)
class Architecture:
    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    tied_embeddings: bool

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Rows of the embedding so that every tensor-parallel rank holds as many; the added ones are masked."""
        return -(-self.vocab // tensor_parallel) * tensor_parallel

    def forward_flops(self, tokens: int, model_tokens: int) -> float:
        """Multiplications and additions to read one row of `tokens`, with the output layer at `model_tokens`.

        Counted are matrix products: 2 for each weight and token, and causal attention (scores and mixing, half of the square).
        """
        attended = self.heads * self.head_dim
        weights = self.hidden * (2 * attended + 2 * self.kv_heads * self.head_dim) + 3 * self.hidden * self.ffn
        layer = 2 * tokens * weights + 2 * tokens * tokens * attended
        return float(self.layers * layer + 2 * model_tokens * self.hidden * self.vocab)


def read_architecture(folder: Path) -> Architecture:
    """Raises UnsupportedModelError for a folder that is not a model of a known family."""
    path = folder / "config.json"
    if not path.is_file():
        raise UnsupportedModelError(f"{folder} has no config.json: give a Hugging Face model folder")
    values: dict[str, Any] = json.loads(path.read_text())
    problem = _problem(values)
    if problem:
        raise UnsupportedModelError(f"{path}: {problem}")
    heads = values["num_attention_heads"]
    rope = _rope(values)
    return Architecture(
        family=values["model_type"],
        layers=values["num_hidden_layers"],
        hidden=values["hidden_size"],
        ffn=values["intermediate_size"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        vocab=values["vocab_size"],
        max_positions=values.get("max_position_embeddings", 2048),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10_000.0),
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
    )


def read_checked(trainer: TrainerConfig, folder: Path) -> Architecture:
    """As `read_architecture`, and the layout of the processes that run now can hold it."""
    import torch.distributed as dist

    architecture = read_architecture(folder)
    check_layout(architecture, dist.get_world_size(), trainer.tensor_parallel, trainer.pipeline_parallel)
    return architecture


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 writes `rope_parameters`; before that `rope_scaling`, with `rope_theta` beside it."""
    return values.get("rope_parameters") or values.get("rope_scaling") or {}


def _problem(values: dict[str, Any]) -> str | None:
    family = values.get("model_type")
    if family not in FAMILIES:
        return f"model_type {family!r} is not supported: use one of {', '.join(FAMILIES)}"
    rope_type = _rope(values).get("rope_type") or _rope(values).get("type") or "default"
    if rope_type != "default":
        return f"rope type {rope_type!r} is not supported: only the default, unscaled one is"
    if values.get("attention_bias") or values.get("mlp_bias"):
        return "attention_bias and mlp_bias are not supported"
    if values.get("use_sliding_window"):
        return "sliding-window attention is not supported: set use_sliding_window to false if your contexts are short"
    if values.get("hidden_act", "silu") != "silu":
        return f"hidden_act {values['hidden_act']!r} is not supported: only silu is"
    return None


def check_layout(architecture: Architecture, world: int, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Raises UnsupportedModelError, with every reason, when the model cannot be cut that way."""
    reasons = list(_layout_problems(architecture, world, tensor_parallel, pipeline_parallel))
    if reasons:
        layout = f"tensor_parallel={tensor_parallel}, pipeline_parallel={pipeline_parallel} on {world} processes"
        raise UnsupportedModelError(f"this model cannot be trained with {layout}: " + "; ".join(reasons))


def _layout_problems(a: Architecture, world: int, tp: int, pp: int) -> list[str]:
    found: list[str] = []
    if world % (tp * pp):
        found.append(f"{world} processes are not a multiple of tensor_parallel × pipeline_parallel = {tp * pp}")
    for count, what in ((a.heads, "attention heads"), (a.kv_heads, "key-value heads"), (a.ffn, "feed-forward units")):
        if count % tp:
            found.append(f"{count} {what} cannot be split over tensor_parallel={tp}: choose a divisor of {count}")
    if a.layers % pp:
        found.append(f"{a.layers} layers cannot be split over pipeline_parallel={pp}: choose a divisor of {a.layers}")
    return found
