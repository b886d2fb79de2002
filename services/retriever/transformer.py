"""A Hugging Face encoder on the CPU or a GPU. Imports torch: loaded only when a model is."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

# Tokenizers otherwise starts a pool of its own beside torch's threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from transformers import AutoConfig, AutoModel, AutoTokenizer, DPRContextEncoder  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from services.retriever.errors import RetrieverError  # noqa: E402
from services.retriever.families import Family, Role  # noqa: E402
from services.retriever.side_by_side import SideBySide  # noqa: E402

transformers_logging.disable_progress_bar()


def in_one_thread(work: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """For work that runs `SideBySide`: torch adds no threads of its own, and keeps nothing for a gradient."""

    @functools.wraps(work)
    def alone(*arguments: Any) -> np.ndarray:
        torch.set_num_threads(1)  # per thread, so it must be said in the thread that computes
        with torch.inference_mode():
            return work(*arguments)

    return alone


class TransformerEncoder:
    """Texts to float32 vectors. On a GPU one thread drives it: there the batch is what runs side by side."""

    runtime = "torch"

    def __init__(
        self, folder: Path, family: Family, max_tokens: int, threads: int, dtype: str = "float32", device: str = "cpu"
    ) -> None:
        """`device` is `cpu`, `cuda` or `cuda:1`. Raises RetrieverError when model, device or token limit cannot be had."""
        self.family = family
        self._max_tokens, self._device = max_tokens, usable_device(device)
        self._side_by_side = SideBySide("encoder", threads) if device == "cpu" else SideBySide("encoder", 1, sys.maxsize)
        self._tokenizer, self._model = load_model(folder, family, getattr(torch, dtype))
        self._model.eval().to(self._device)
        check_longest_text(self._model.config, max_tokens)
        self.dimension: int = self.encode(["x"], "query").shape[1]

    def encode(self, texts: Sequence[str], role: Role) -> np.ndarray:
        """float32 [len(texts), dimension], the family's prefix before each text."""
        texts = self.family.prefixed(texts, role)
        return self._side_by_side.run(texts, [len(text) for text in texts], self._encode)

    @in_one_thread
    def _encode(self, texts: list[str]) -> np.ndarray:
        with self._side_by_side.tokenizing:
            tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt")
        tokens = tokens.to(self._device)
        if self.family.pooling == "decoder":
            tokens["decoder_input_ids"] = torch.zeros((len(texts), 1), dtype=torch.long, device=self._device)
        return pool(self._model(**tokens), tokens["attention_mask"], self.family).cpu().numpy()


def usable_device(device: str) -> torch.device:
    """Raises RetrieverError when it is a GPU and there is none."""
    if device != "cpu" and not torch.cuda.is_available():
        raise RetrieverError(
            f'retriever.encoder_device is "cuda", but torch {torch.__version__} sees no GPU: '
            'set "cpu", or install torch for CUDA and give the container a GPU'
        )
    return torch.device(device)


def load_model(folder: Path, family: Family, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and model; every weight that pooling needs must come from the folder, or its vectors would be noise."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, report = _model_class(folder).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RetrieverError(f"{folder}: the encoder cannot be loaded ({error}); copy the whole model folder again") from error
    missing = [name for name in report["missing_keys"] if family.pooling == "pooler_output" or "pooler" not in name]
    if missing:
        raise RetrieverError(f"{folder}: {len(missing)} weights are missing, such as {sorted(missing)[0]}; is this an encoder?")
    return tokenizer, model


def _model_class(folder: Path) -> Any:
    """AutoModel, but for the passage half of DPR, which AutoModel would take for the question half with random weights."""
    named = AutoConfig.from_pretrained(folder).architectures or [""]
    return DPRContextEncoder if named[0] == "DPRContextEncoder" else AutoModel


def check_longest_text(model: Any, max_tokens: int) -> None:
    """Raises RetrieverError when `max_tokens` do not fit. RoBERTa and its kin number positions from after their padding token."""
    positions = getattr(model, "max_position_embeddings", None)
    if positions is None:  # relative positions, as in T5
        return
    limit = positions - (model.pad_token_id + 1) if "roberta" in model.model_type else positions
    if max_tokens > limit:
        raise RetrieverError(f"retriever.encoder_max_tokens {max_tokens} is above the model's {limit}: lower it")


def pool(output: Any, mask: torch.Tensor, family: Family) -> torch.Tensor:
    """A model's output and mask [batch, tokens] to float32 vectors [batch, dimension], the family's way."""
    if family.pooling == "pooler_output":
        vectors = output.pooler_output.float()
    elif family.pooling in ("cls", "decoder"):  # of T5 it is the decoder's only token
        vectors = output.last_hidden_state[:, 0].float()
    else:
        weights = mask.unsqueeze(-1).float()
        vectors = (output.last_hidden_state.float() * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(vectors, dim=-1) if family.normalized else vectors
