"""The encoder on ONNX Runtime, CPU only: the same vectors as torch's, sooner; with int8 weights sooner still, and a little off.

The graph is exported from the Hugging Face folder once, and compared with torch before it is kept (`onnx_export.py`). With int8
the scale of the activations is taken from the whole batch, so that a query's vector depends a little on the queries beside it.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from services.contract.files import hold_lock
from services.retriever.families import EncoderDescription, Role
from services.retriever.files import written_whole
from services.retriever.onnx_session import open_session
from services.retriever.side_by_side import SideBySide

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it would start a pool of its own beside our threads

log = logging.getLogger("retriever")

FORMAT = 1
"""Raised when what is exported changes, so that no older graph is taken up."""


class OnnxEncoder:
    """Texts to float32 vectors; each of `threads` threads computes its own part of a batch."""

    def __init__(self, description: EncoderDescription, threads: int) -> None:
        """Raises ExportFailed, or RetrieverError for a folder that torch could not load either."""
        from transformers import AutoTokenizer

        assert description.folder is not None, "the hashing encoder has no graph"
        self.family, self._max_tokens = description.family, description.max_tokens
        self.runtime: str = description.runtime
        self._side_by_side = SideBySide("encoder", threads)
        with _graph(description) as path:
            self._session = open_session(path)
        self._inputs = [given.name for given in self._session.get_inputs()]
        self._tokenizer = AutoTokenizer.from_pretrained(description.folder)
        self.dimension: int = self.encode(["x"], "query").shape[1]

    def encode(self, texts: Sequence[str], role: Role) -> np.ndarray:
        """float32 [len(texts), dimension], the family's prefix before each text."""
        texts = self.family.prefixed(texts, role)
        return self._side_by_side.run(texts, [len(text) for text in texts], self._encode)

    def _encode(self, texts: list[str]) -> np.ndarray:
        with self._side_by_side.tokenizing:
            tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="np")
        return self._session.run(None, {name: tokens[name] for name in self._inputs})[0]


@contextmanager
def _graph(description: EncoderDescription) -> Iterator[Path]:
    """The exported model: kept among the run's models, or, where nothing can be written, only while it is read."""
    name = f"{description.digest[:16]}-{description.family.name}-{description.max_tokens}-{description.runtime}-{FORMAT}.onnx"
    kept = description.exports / name
    if kept.exists() or _keep(description, kept):
        yield kept
        return
    with tempfile.TemporaryDirectory() as folder:
        _export(description, Path(folder) / name)
        yield Path(folder) / name


def _keep(description: EncoderDescription, kept: Path) -> bool:
    """Export to `kept`, one process at a time. False: nothing can be written there."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        lock = hold_lock(kept.parent / ".lock", wait=True)
    except OSError as error:
        log.warning("%s: an exported encoder cannot be kept there (%s) and is made at every start", kept.parent, error)
        return False
    with lock:
        if not kept.exists():
            with written_whole(kept) as temporary:
                _export(description, temporary)
    return True


def _export(description: EncoderDescription, path: Path) -> None:
    from services.retriever.onnx_export import export  # torch takes seconds to import

    log.info("exporting the encoder %s for ONNX Runtime, once", description.name)
    export(description, path)
