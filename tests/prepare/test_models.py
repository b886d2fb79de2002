"""Models that transformers loads; SmolLM2 still answers after the conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.prepare.errors import PrepareError
from services.prepare.models import check_model_folder, write_encoder, write_smollm2, write_tiny

MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]


def answer(folder: Path, tokens: int) -> tuple[Any, str]:
    """(the model loaded from `folder`, what it greedily answers to MESSAGES)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return model, tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


def test_the_tiny_model_loads_and_generates(prepared: Path) -> None:
    import torch

    model, text = answer(prepared / "models" / "policy", tokens=4)
    assert text
    assert next(model.parameters()).dtype == torch.float32
    assert model.config.num_attention_heads % 2 == model.config.num_key_value_heads % 2 == 0


def test_the_tokenizer_knows_its_chat_marks(prepared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared / "models" / "policy")
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [tokenizer.eos_token_id]


def test_the_tiny_model_depends_on_the_seed_alone(prepared: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_tiny(tmp_path / str(seed), seed=seed, max_context=1024)
    made = (prepared / "models" / "policy" / "model.safetensors").read_bytes()
    assert (tmp_path / "0" / "model.safetensors").read_bytes() == made
    assert (tmp_path / "1" / "model.safetensors").read_bytes() != made


def test_smollm2_answers_after_the_conversion(tmp_path: Path) -> None:
    write_smollm2(tmp_path / "policy")
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32"
    _, text = answer(tmp_path / "policy", tokens=12)
    assert "Paris" in text


def test_the_encoder_is_copied_whole(tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder")
    check_model_folder(tmp_path / "encoder", "retriever.encoder")


def test_a_missing_model_folder_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="model.path: no folder at .*nowhere"):
        check_model_folder(tmp_path / "nowhere", "model.path")


def test_a_folder_that_is_no_model_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PrepareError, match="no weights, no a tokenizer"):
        check_model_folder(tmp_path, "model.path")
