"""Text to token ids and back, for whatever is not sampled: prompts, observations, demonstrations. All parts must do it alike.

transformers is imported on first use only; the contract loads without it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Codec:
    """A model's tokenizer, with the choices that every part of the suite must make alike.

    Texts go to the `tokenizers` library itself: what transformers adds around it costs as much again. Raises ValueError when the
    tokenizer does not rest on that library.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json: save the model's tokenizer as a fast one")
        self._tokenizer = tokenizer
        self._texts = copy.deepcopy(tokenizer.backend_tokenizer)  # one of our own, in which special tokens are text
        self._texts.encode_special_tokens = True

    @classmethod
    def load(cls, folder: Path) -> Codec:
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(folder))

    def prompt(self, prompt: list[dict[str, str]] | str) -> list[int]:
        """Chat messages through the model's template, open for the assistant; plain text with the model's special tokens.

        Special tokens written out in a prompt become their ids: a prompt is the run's own. Raises ValueError when the model has no
        chat template.
        """
        if isinstance(prompt, str):
            return list(self._tokenizer(prompt)["input_ids"])
        if not self._tokenizer.chat_template:
            raise ValueError("the model's tokenizer has no chat template: set data.chat_template = false")
        rendered = self._tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
        return list(rendered["input_ids"])

    def encode(self, text: str) -> list[int]:
        """Text as text: a special token written out in it (``<|im_end|>`` in a passage) never becomes the special id."""
        return self._texts.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._texts.decode(ids, skip_special_tokens=False)
