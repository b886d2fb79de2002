"""Texts to vectors. One table says how each family of encoders wants its texts and pools its tokens.

Pooling, prefixes and normalisation belong to the model: applying another family's gives vectors that look right and
rank wrong. So the family is decided once, here, written into the index manifest, and compared at every start.

This module needs no torch: `describe_encoder` reads names and digests, `load_encoder` loads the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from services.contract.config import Config
from services.retriever.errors import RetrieverError
from services.retriever.files import sha256

Role = Literal["query", "passage"]
Pooling = Literal["mean", "cls", "bag"]


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
        Family("contriever", "", "", "mean", False, "contriever", "contriever"),
        # Small E5 models were tuned from other MiniLM bases: only the base of all-MiniLM-L6 tells the family.
        Family("minilm", "", "", "mean", True, r"(?<!e5-)minilm", r"nreimers/minilm-l6|all-minilm"),
        Family("hashing", "", "", "bag", True, NEVER, NEVER),
    )
}


class Encoder(Protocol):
    @property
    def dimension(self) -> int: ...

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


def describe_encoder(config: Config) -> EncoderDescription:
    """Raises RetrieverError when the folder is missing or its family cannot be told."""
    settings = config.retriever
    if settings.encoder_family == "hashing":
        return EncoderDescription(HashingEncoder.NAME, HashingEncoder.NAME, FAMILIES["hashing"], HashingEncoder.DIMENSION, 0, None)
    folder = config.encoder_path
    if not (folder / "config.json").is_file():
        raise RetrieverError(f"{folder}: no encoder here (config.json is missing); run `prepare`, or set retriever.encoder")
    model = json.loads((folder / "config.json").read_text())
    family = FAMILIES[settings.encoder_family] if settings.encoder_family != "auto" else infer_family(folder, model)
    name = model.get("_name_or_path") or _model_name(folder)
    return EncoderDescription(name, folder_digest(folder), family, model["hidden_size"], settings.encoder_max_tokens, folder)


def infer_family(folder: Path, model: dict[str, object]) -> Family:
    """By the folder's name, else by the model's name in its config.json."""
    named = str(model.get("_name_or_path") or "").lower()
    found = [f for f in FAMILIES.values() if re.search(f.folder_mark, _model_name(folder))]
    found = found or [f for f in FAMILIES.values() if re.search(f.base_mark, named)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(name for name in FAMILIES if name != "hashing")
    raise RetrieverError(
        f"{folder}: cannot tell the encoder's family from its name ({_model_name(folder)!r}, {named!r} in config.json); "
        f"set retriever.encoder_family to one of {known}"
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
            digest.update(f"{path.name}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def load_encoder(description: EncoderDescription, threads: int) -> Encoder:
    if description.folder is None:
        return HashingEncoder()
    from services.retriever.transformer import TransformerEncoder  # torch takes seconds to import

    return TransformerEncoder(description.folder, description.family, description.max_tokens, threads)


STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be by did do does for from has have how in is it its of on or that the this to was were what when "
        "where which who whose with",
    )
)


class HashingEncoder:
    """Words hashed into a fixed number of signed buckets: needs no model. For tests and the smoke run, not for quality."""

    NAME = "hashing-1024-v1"
    DIMENSION = 1024
    dimension = DIMENSION

    def encode(self, texts: Sequence[str], role: Role) -> np.ndarray:
        vectors = np.zeros((len(texts), self.DIMENSION), np.float32)
        for vector, text in zip(vectors, FAMILIES["hashing"].prefixed(texts, role), strict=True):
            self._fill(vector, text)
        return vectors

    def _fill(self, vector: np.ndarray, text: str) -> None:
        for word, count in Counter(re.findall(r"\w+", text.casefold())).items():
            if word not in STOP_WORDS:
                code = zlib.crc32(word.encode())
                vector[code % self.DIMENSION] += (1 + math.log(count)) * (1 if code >> 31 else -1)
        length = float(np.linalg.norm(vector))
        if length > 0:
            vector /= length
