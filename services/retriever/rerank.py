"""A cross-encoder: one score for a query and a text read together. Imports torch: loaded only when a model is named."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from services.contract.config import Config
from services.retriever.encoder import folder_digest
from services.retriever.errors import RetrieverError
from services.retriever.saying import Say
from services.retriever.side_by_side import SideBySide
from services.retriever.sources import Pair
from services.retriever.transformer import in_one_thread

CANARY: Pair = ("What keeps a violin?", '"Harbour"\nThe harbour keeps a violin.')


class CrossEncoder:
    """A `Resource` of pairs: (query, contents) to the logit of relevance, as in ms-marco cross-encoders."""

    def __init__(self, folder: Path, max_tokens: int, threads: int) -> None:
        self.seconds: dict[str, float] = {}
        self._max_tokens, self._side_by_side = max_tokens, SideBySide("reranker", threads)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            self._model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError, SafetensorError) as error:
            raise RetrieverError(f"{folder}: the reranker cannot be loaded ({error}); copy the whole model folder again") from error
        if self._model.config.num_labels != 1:
            outputs = self._model.config.num_labels
            raise RetrieverError(f"{folder}: this classifier has {outputs} outputs, a reranker has one; set retriever.rerank.model")
        self._model.eval()
        self.info: dict[str, Any] = {"model": folder.name, "model_digest": folder_digest(folder), "max_tokens": max_tokens}

    def canary(self) -> Pair:
        return CANARY

    def answer(self, keys: Sequence[Pair]) -> list[float]:
        started = time.perf_counter()
        lengths = [len(query) + len(text) for query, text in keys]
        scores = self._side_by_side.run(keys, lengths, self._score)
        if not np.isfinite(scores).all():
            raise RuntimeError("the reranker gave a number that is not finite")
        self.seconds = {"rerank": time.perf_counter() - started}
        return scores.tolist()

    @in_one_thread
    def _score(self, pairs: list[Pair]) -> np.ndarray:
        """float32 [pairs]. What is too long loses its end, the longer of the two first."""
        queries, texts = [query for query, _ in pairs], [text for _, text in pairs]
        with self._side_by_side.tokenizing:
            tokens = self._tokenizer(
                queries, texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
            )
        return self._model(**tokens).logits[:, 0].numpy()


def load_reranker(config: Config, say: Say) -> CrossEncoder:
    folder, settings = config.reranker_path, config.retriever
    assert folder is not None, "loaded only where it is configured"
    if not (folder / "config.json").is_file():
        raise RetrieverError(
            f"{folder}: no model here (config.json is missing); run `prepare` for a hub:NAME, "
            "or set retriever.rerank.model to a Hugging Face folder"
        )
    say(f"loading the reranker {folder.name}")
    model = CrossEncoder(folder, settings.rerank.max_tokens, settings.threads)
    say("asking the canary pair")
    model.answer([model.canary()])
    return model
