"""What is read from a model folder, and what is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.contract.config import ObjectiveConfig
from services.trainer.megatron.architecture import Architecture, UnsupportedModelError, check_layout, read_architecture
from services.trainer.megatron.batching import Row, micro_batch
from services.trainer.megatron.loss import PolicyLoss, Totals
from tests.trainer.tiny_models import model_config

SMOLLM2 = Architecture("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, 1e-5, 1e5, tied_embeddings=True)


def read(folder: Path, values: dict[str, Any]) -> Architecture:
    (folder / "config.json").write_text(json.dumps(values))
    return read_architecture(folder)


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    model_config("qwen3").save_pretrained(tmp_path)
    found = read_architecture(tmp_path)
    assert found == Architecture("qwen3", 2, 32, 48, 4, 2, 16, 259, 128, 1e-6, 50_000.0, tied_embeddings=False)
    assert found.qk_norm and not found.qkv_bias


def test_older_folders_have_rope_theta_at_the_top(tmp_path: Path) -> None:
    values = model_config("llama").to_dict()
    del values["rope_parameters"], values["head_dim"]
    found = read(tmp_path, values | {"rope_theta": 5000.0, "rope_scaling": None, "num_key_value_heads": None})
    assert (found.rope_theta, found.head_dim, found.kv_heads) == (5000.0, 8, 4)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported: use one of llama, qwen2, qwen3"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_would_change_the_numbers_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        read(tmp_path, model_config("llama").to_dict() | change)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="has no config.json: give a Hugging Face model folder"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    "world, tensor, pipeline, reason",
    [
        (2, 2, 1, "9 attention heads cannot be split over tensor_parallel=2: choose a divisor of 9"),
        (9, 9, 1, "3 key-value heads cannot be split over tensor_parallel=9"),
        (4, 1, 4, "30 layers cannot be split over pipeline_parallel=4"),
        (4, 3, 1, "4 processes are not a multiple of tensor_parallel × pipeline_parallel = 3"),
    ],
)
def test_impossible_layouts_are_refused_with_the_reason(world: int, tensor: int, pipeline: int, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        check_layout(SMOLLM2, world, tensor, pipeline)


@pytest.mark.parametrize("world, tensor, pipeline", [(6, 3, 1), (2, 1, 2), (6, 3, 2)])
def test_smollm2_can_be_cut(world: int, tensor: int, pipeline: int) -> None:
    check_layout(SMOLLM2, world, tensor, pipeline)


def test_the_vocabulary_is_padded_to_a_multiple() -> None:
    assert SMOLLM2.padded_vocab(3) == 49152
    assert SMOLLM2.padded_vocab(5) == 49155


@pytest.mark.parametrize(
    "objective, reason",
    [({"importance": "tis"}, "needs engine_logprobs"), ({"importance": "none", "kl_coef": 0.1}, "carry no reference_logprobs")],
)
def test_a_loss_without_what_it_needs_says_so(objective: dict[str, Any], reason: str) -> None:
    import torch

    row = Row(token_ids=[1, 2], prompt_length=1, loss_mask=[1], advantage=1.0)
    batch = micro_batch([row], [0], torch.device("cpu"))
    with pytest.raises(ValueError, match=reason):
        PolicyLoss(ObjectiveConfig(**objective))(torch.zeros(1), batch.tokens, Totals.of([row]))
