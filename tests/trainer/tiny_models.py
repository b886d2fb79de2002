"""Tiny random Hugging Face models for the learner's tests, and rows to train them on. No Megatron in here."""

from __future__ import annotations

import random
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers

from services.contract.messages import Span, VersionSpan
from services.trainer.feeding.collect import CompleteGroup
from tests.factories import make_trajectory

VOCAB = 259
"""Odd, so that two tensor-parallel ranks must pad it."""
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ROPE = {"rope_type": "default", "rope_theta": 50_000.0}
TIED = {"llama-tied": True, "llama": False, "qwen2-tied": True, "qwen3": False}


def model_config(name: str) -> Any:
    sizes = dict(SIZES, tie_word_embeddings=TIED[name], rope_parameters=ROPE)
    if name.startswith("qwen2"):
        return transformers.Qwen2Config(**sizes, rms_norm_eps=1e-6)
    if name.startswith("qwen3"):
        return transformers.Qwen3Config(**sizes, rms_norm_eps=1e-6, head_dim=16)
    return transformers.LlamaConfig(**sizes, rms_norm_eps=1e-5)


def save_tiny(name: str, folder: Path) -> Path:
    """A model whose norms and biases are random too, so that a wrong mapping of them cannot go unseen."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(model_config(name), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def load_plain(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def row_values(count: int = 7, seed: int = 0) -> list[dict[str, Any]]:
    """Keyword arguments of `Row`: uneven lengths, two model spans with an observation between, one row without advantage."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        prompt, own, seen, answer = draw.randint(2, 9), draw.randint(2, 6), draw.randint(0, 12), draw.randint(1, 5)
        mask = [1] * own + [0] * seen + [1] * answer + [0] * draw.randint(0, 3)
        rows.append(
            {
                "token_ids": [draw.randrange(VOCAB) for _ in range(prompt + len(mask))],
                "prompt_length": prompt,
                "loss_mask": mask,
                "engine_logprobs": [draw.uniform(-7, -4) * m for m in mask],
                "reference_logprobs": [draw.uniform(-6, -5) * m for m in mask],
                "advantage": 0.0 if i == 2 else draw.uniform(-2, 2),
                "weight": draw.choice([0.5, 1.0, 2.0]),
                "temperature": draw.choice([0.7, 1.0]),
            }
        )
    return rows


def rewarded_rows() -> list[dict[str, Any]]:
    """Six of these rows, their advantages taken for rewards."""
    return [row | {"reward": row["advantage"]} for row in row_values(count=6, seed=1)]


def group_of(group_id: str, rows: list[dict[str, Any]]) -> CompleteGroup:
    """The rows, each with a `reward`, as the trajectories of a group."""
    return CompleteGroup(group_id, [_trajectory(group_id, n, row) for n, row in enumerate(rows)], [b"0-1"] * len(rows))


def _trajectory(group_id: str, sample: int, row: dict[str, Any]):  # noqa: ANN202
    prompt = row["prompt_length"]
    return make_trajectory(
        group_id,
        sample,
        prompt_ids=row["token_ids"][:prompt],
        response_ids=row["token_ids"][prompt:],
        logprobs=row["engine_logprobs"],
        spans=_spans(row["loss_mask"]),
        temperature=row["temperature"],
        reward=row["reward"],
    )


def _spans(mask: list[int]) -> list[Span]:
    spans, start = [], 0
    for own, tokens in groupby(mask):
        end = start + len(list(tokens))
        spans.append(Span("model", start, end, "", [VersionSpan(0, start, end)]) if own else Span("observation", start, end, ""))
        start = end
    return spans
