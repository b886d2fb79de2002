"""Text to token ids and back, for whatever is not sampled: prompts, observations, demonstrations. All parts must do it alike.

transformers is imported on first use only; the contract loads without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Codec:
    """A model's tokenizer, with the choices that every part of the suite must make alike."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> Codec:
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(folder))

    def prompt(self, prompt: list[dict[str, str]] | str) -> list[int]:
        """Chat messages through the model's template, open for the assistant; plain text with the model's special tokens."""
        if isinstance(prompt, str):
            return list(self._tokenizer(prompt)["input_ids"])
        rendered = self._tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
        return list(rendered["input_ids"])

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
