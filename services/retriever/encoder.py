"""Texts to vectors: `describe_encoder` reads a model's names and digests, `load_encoder` loads it. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from services.contract.config import Config
from services.contract.files import file_digest
from services.retriever.errors import RetrieverError
from services.retriever.families import FAMILIES, EncoderDescription, Family, Role, infer_family, model_name
from services.retriever.hashing import HashingEncoder

log = logging.getLogger("retriever")


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
        name=model.get("_name_or_path") or model_name(folder),
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
    from services.retriever.onnx_encoder import OnnxEncoder
    from services.retriever.onnx_session import ExportFailed

    try:
        return OnnxEncoder(description if chosen else replace(description, runtime="onnx"), threads)
    except ExportFailed as error:
        if chosen:
            raise
        log.warning("torch computes the vectors: %s", error)
        return None
