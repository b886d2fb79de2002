"""Texts to vectors. One table says how each family of encoders wants its texts and pools its tokens.

Pooling, prefixes and normalisation belong to the model: applying another family's gives vectors that look right and
rank wrong. So the family is decided once, here, written into the index manifest, and compared at every start.

This module needs no torch: `describe_encoder` reads names and digests, `load_encoder` loads the model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from services.contract.config import Config
from services.contract.files import file_digest
from services.retriever.errors import RetrieverError
from services.retriever.hashing import HashingEncoder

log = logging.getLogger("retriever")

Role = Literal["query", "passage"]
Pooling = Literal["mean", "cls", "pooler_output", "decoder", "bag"]
"""`decoder`: what a T5's decoder makes of its start token. `bag`: words without a model."""
Runtime = Literal["auto", "torch", "onnx", "onnx-int8"]


@dataclass(frozen=True)
class Family:
    name: str
    query_prefix: str
    passage_prefix: str
    pooling: Pooling
    normalized: bool
    folder_mark: str
    """Regular expression that tells the family by its folder's name."""
    base_mark: str
    """The same for the name inside config.json, which is often that of the model it was tuned from."""

    def prefixed(self, texts: Sequence[str], role: Role) -> list[str]:
        prefix = self.query_prefix if role == "query" else self.passage_prefix
        return [prefix + text for text in texts]


BGE_QUERY = "Represent this sentence for searching relevant passages: "
NEVER = r"(?!)"
FAMILIES = {
    family.name: family
    for family in (
        Family("e5", "query: ", "passage: ", "mean", True, r"(?<![a-z0-9])e5(?![a-z0-9])", r"(?<![a-z0-9])e5(?![a-z0-9])"),
        Family("bge", BGE_QUERY, "", "cls", True, r"(?<![a-z0-9])bge(?![a-z0-9])", r"(?<![a-z0-9])bge(?![a-z0-9])"),
        Family("dpr", "", "", "pooler_output", False, r"(?<![a-z0-9])dpr(?![a-z0-9])", r"(?<![a-z0-9])dpr(?![a-z0-9])"),
        Family("contriever", "", "", "mean", False, "contriever", "contriever"),
        Family("t5", "", "", "decoder", False, NEVER, NEVER),
        # Small E5 models were tuned from other MiniLM bases: only the base of all-MiniLM-L6 tells the family.
        Family("minilm", "", "", "mean", True, r"(?<!e5-)minilm", r"nreimers/minilm-l6|all-minilm"),
        Family("plain", "", "", "mean", False, r"(?<![a-z0-9])jina(?![a-z0-9])", r"(?<![a-z0-9])jina(?![a-z0-9])"),
        Family("hashing", "", "", "bag", True, NEVER, NEVER),
    )
}
MODEL_TYPES = {"t5": "t5", "dpr": "dpr"}
"""config.json's `model_type` to family, where no name tells it: these models can be pooled in one way only."""


class Encoder(Protocol):
    @property
    def dimension(self) -> int: ...

    @property
    def runtime(self) -> str:
        """What computes the vectors: torch, onnx, onnx-int8, or hashing."""
        ...

    def encode(self, texts: Sequence[str], role: Role) -> np.ndarray:
        """float32 [len(texts), dimension], C order. The family's prefix is put on here."""
        ...


@dataclass(frozen=True)
class EncoderDescription:
    """What an index must agree with; known without loading the model."""

    name: str
    digest: str
    family: Family
    dimension: int
    max_tokens: int
    folder: Path | None
    dtype: str = "float32"
    device: str = "cpu"
    runtime: Runtime = "auto"
    exports: Path = Path()
    """Where the graphs lie that were exported for ONNX Runtime."""


def describe_encoder(config: Config, role: Role) -> EncoderDescription:
    """The model that encodes queries, or passages; mostly one. Raises RetrieverError when its folder is missing or its family
    cannot be told."""
    settings = config.retriever
    if settings.encoder_family == "hashing":
        return EncoderDescription(HashingEncoder.NAME, HashingEncoder.NAME, FAMILIES["hashing"], HashingEncoder.DIMENSION, 0, None)
    folder = (config.data.local(settings.passage_encoder) if role == "passage" else None) or config.encoder_path
    if not (folder / "config.json").is_file():
        raise RetrieverError(f"{folder}: no encoder here (config.json is missing); run `prepare`, or set retriever.encoder")
    model = _model_config(folder)
    family = FAMILIES[settings.encoder_family] if settings.encoder_family != "auto" else infer_family(folder, model)
    return EncoderDescription(
        name=model.get("_name_or_path") or _model_name(folder),
        digest=folder_digest(folder),
        family=family,
        dimension=_dimension(folder, model, family),
        max_tokens=settings.encoder_max_tokens,
        folder=folder,
        dtype=settings.encoder_dtype,
        device=settings.encoder_device,
        runtime=settings.encoder_runtime,
        exports=config.data.directory / "models" / "onnx",
    )


def describe_encoders(config: Config) -> tuple[EncoderDescription, EncoderDescription]:
    """Of queries and of passages. Raises RetrieverError when they do not belong together."""
    queries = describe_encoder(config, "query")
    passages = describe_encoder(config, "passage") if config.retriever.passage_encoder else queries
    if (queries.family, queries.dimension) != (passages.family, passages.dimension):
        raise RetrieverError(
            f"retriever.encoder ({queries.family.name}, {queries.dimension} dimensions) and retriever.passage_encoder "
            f"({passages.family.name}, {passages.dimension}) are no pair: set both to the halves of one model"
        )
    return queries, passages


def _model_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise RetrieverError(f"{folder / 'config.json'}: not JSON ({error}); copy the whole model folder again") from None


def _dimension(folder: Path, model: dict[str, Any], family: Family) -> int:
    """Numbers a vector. DPR may project its first token's; T5 calls its width `d_model`."""
    projected = model.get("projection_dim") if family.pooling == "pooler_output" else None
    if size := projected or model.get("hidden_size") or model.get("d_model"):
        return size
    raise RetrieverError(f"{folder / 'config.json'}: neither hidden_size nor d_model is there: is this an embedding model?")


def infer_family(folder: Path, model: dict[str, Any]) -> Family:
    """By the folder's name, else by the model's name in its config.json, else by its type."""
    named = str(model.get("_name_or_path") or "").lower()
    found = [f for f in FAMILIES.values() if re.search(f.folder_mark, _model_name(folder))]
    found = found or [f for f in FAMILIES.values() if re.search(f.base_mark, named)]
    found = found or [FAMILIES[family] for kind, family in MODEL_TYPES.items() if model.get("model_type") == kind]
    if len(found) == 1:
        return found[0]
    known = ", ".join(name for name in FAMILIES if name != "hashing")
    raise RetrieverError(
        f"{folder}: cannot tell the encoder's family from its name ({_model_name(folder)!r}, {named!r} in config.json); "
        f"set retriever.encoder_family to one of {known} (plain: mean of the tokens, no prefix, not normalised)"
    )


def _model_name(folder: Path) -> str:
    """The folder's name; in a Hugging Face cache, where that is a revision, the repository's."""
    folder = folder.resolve()
    return (folder.parent.parent if folder.parent.name == "snapshots" else folder).name.lower()


def folder_digest(folder: Path) -> str:
    """One digest over the files that decide what the model answers; README and the like do not count."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in {".safetensors", ".bin", ".model"} or re.match(r"config\.json|vocab|merges|tokenizer|special", path.name):
            digest.update(f"{path.name}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()


def load_encoder(description: EncoderDescription, threads: int) -> Encoder:
    if description.folder is None:
        return HashingEncoder()
    if description.runtime != "torch" and (encoder := _on_onnx(description, threads)):
        return encoder
    from services.retriever.transformer import TransformerEncoder  # torch takes seconds to import

    return TransformerEncoder(
        description.folder, description.family, description.max_tokens, threads, description.dtype, description.device
    )


def _on_onnx(description: EncoderDescription, threads: int) -> Encoder | None:
    """None where `auto` had better take torch: the model cannot be exported, or would not give the same vectors."""
    chosen = description.runtime != "auto"
    if not chosen and (description.device, description.dtype) != ("cpu", "float32"):
        return None
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        if chosen:
            raise RetrieverError('retriever.encoder_runtime is "onnx": pip install onnx onnxruntime, or set "torch"')
        return None
    from services.retriever.onnx_encoder import ExportFailed, OnnxEncoder

    try:
        return OnnxEncoder(description if chosen else replace(description, runtime="onnx"), threads)
    except ExportFailed as error:
        if chosen:
            raise
        log.warning("torch computes the vectors: %s", error)
        return None
