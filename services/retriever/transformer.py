"""A Hugging Face encoder on the CPU or a GPU, in float32. Imports torch: loaded only when a model is."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

# Tokenizers otherwise starts a pool of its own beside torch's threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from transformers import AutoModel, AutoTokenizer  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from services.retriever.encoder import Family, Role  # noqa: E402
from services.retriever.errors import RetrieverError  # noqa: E402

transformers_logging.disable_progress_bar()


SMALLEST_PART = 4
"""Fewer texts than this are not worth a thread of their own."""


class TransformerEncoder:
    """Each of `threads` threads encodes a part of the texts by itself, rather than all of them one matrix product.

    OpenMP threads meet at a barrier many times a layer: when another process has one of the cores, all of them spin
    there. Seen with a busy neighbour on two cores: 11 queries/s with OpenMP's two threads, 158 with one.
    """

    def __init__(self, folder: Path, family: Family, max_tokens: int, threads: int) -> None:
        self.family = family
        self._max_tokens, self._threads = max_tokens, threads
        self._pool = ThreadPoolExecutor(threads, "encoder") if threads > 1 else None
        self._tokenizing = threading.Lock()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            self._model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise RetrieverError(f"{folder}: the encoder cannot be loaded ({error}); copy the whole model folder again") from error
        self._model.eval()
        self.dimension: int = self._model.config.hidden_size
        limit = getattr(self._model.config, "max_position_embeddings", max_tokens)
        if max_tokens > limit:
            raise RetrieverError(f"retriever.encoder_max_tokens {max_tokens} is above the model's {limit}: lower it")

    def encode(self, texts: Sequence[str], role: Role) -> np.ndarray:
        texts = self.family.prefixed(texts, role)
        parts = min(self._threads, len(texts) // SMALLEST_PART)
        if self._pool is None or parts < 2:
            return self._encode_part(texts)
        order = np.argsort([len(text) for text in texts], kind="stable")  # like lengths together: little is padded
        places = np.array_split(order, parts)
        vectors = np.empty((len(texts), self.dimension), np.float32)
        encoded = self._pool.map(self._encode_part, [[texts[place] for place in part] for part in places])
        for part, result in zip(places, encoded, strict=True):
            vectors[part] = result
        return vectors

    def _encode_part(self, texts: list[str]) -> np.ndarray:
        torch.set_num_threads(1)  # per thread, so it must be said in the thread that computes
        with torch.inference_mode():
            with self._tokenizing:  # a tokenizer refuses to be used from two threads at once
                tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt")
            pooled = pool(self._model(**tokens).last_hidden_state, tokens["attention_mask"], self.family)
        return np.ascontiguousarray(pooled.numpy(), np.float32)


def pool(hidden: torch.Tensor, mask: torch.Tensor, family: Family) -> torch.Tensor:
    """Hidden states [batch, tokens, dim] and mask [batch, tokens] to vectors [batch, dim], the family's way."""
    if family.pooling == "cls":
        vectors = hidden[:, 0]
    else:
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        vectors = (hidden * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(vectors, dim=-1) if family.normalized else vectors
