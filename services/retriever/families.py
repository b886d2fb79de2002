"""How each family of encoders wants its texts and pools its tokens, and which family a model is of.

Pooling, prefixes and normalisation belong to the model: applying another family's gives vectors that look right and
rank wrong. So the family is decided once, here, written into the index manifest, and compared at every start.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services.retriever.errors import RetrieverError

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


def infer_family(folder: Path, model: dict[str, Any]) -> Family:
    """By the folder's name, else by the model's name in its config.json, else by its type."""
    named = str(model.get("_name_or_path") or "").lower()
    found = [f for f in FAMILIES.values() if re.search(f.folder_mark, model_name(folder))]
    found = found or [f for f in FAMILIES.values() if re.search(f.base_mark, named)]
    found = found or [FAMILIES[family] for kind, family in MODEL_TYPES.items() if model.get("model_type") == kind]
    if len(found) == 1:
        return found[0]
    known = ", ".join(name for name in FAMILIES if name != "hashing")
    raise RetrieverError(
        f"{folder}: cannot tell the encoder's family from its name ({model_name(folder)!r}, {named!r} in config.json); "
        f"set retriever.encoder_family to one of {known} (plain: mean of the tokens, no prefix, not normalised)"
    )


def model_name(folder: Path) -> str:
    """The folder's name; in a Hugging Face cache, where that is a revision, the repository's."""
    folder = folder.resolve()
    return (folder.parent.parent if folder.parent.name == "snapshots" else folder).name.lower()
