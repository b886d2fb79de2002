"""Random models small enough to make in a test, saved as Hugging Face folders: for how they are pooled, not what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, DPRConfig, PreTrainedTokenizerFast, T5Config, T5Model

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "the",
    "harbour",
    "keeps",
    "a",
    "violin",
    "what",
    "of",
    "is",
    "capital",
    "chad",
    "query",
    "passage",
    ":",
    "represent",
    "this",
    "sentence",
    "for",
]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def bert(folder: Path) -> Path:
    return _save(folder, BertModel(BertConfig(**SIZES)))


def dpr(folder: Path, half: str = "DPRQuestionEncoder", projection: int = 0) -> Path:
    """`half` is DPRQuestionEncoder or DPRContextEncoder."""
    return _save(folder, getattr(transformers, half)(DPRConfig(**SIZES, projection_dim=projection)))


def t5(folder: Path) -> Path:
    sizes: dict[str, Any] = {"vocab_size": len(WORDS), "d_model": 24, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return _save(folder, T5Model(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)))


def _save(folder: Path, model: Any) -> Path:
    chance = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():  # large enough for padding and prefixes to show
        torch.nn.init.normal_(parameter, 1.0 if name.lower().endswith("norm.weight") else 0.0, 0.3, chance)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_input_names=["input_ids", "attention_mask"], **names)
