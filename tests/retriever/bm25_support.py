"""What the tests of BM25 share. Java starts once a process: all of them ask for the same heap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from services.contract.config import Config
from services.retriever.bm25 import Bm25Index, load_bm25
from tests.retriever.conftest import make_config, with_settings

HEAP = "256m"


def configure(folder: Path, rows: int = 100, **retriever: Any) -> Config:
    return make_config(folder, rows, **{"backends": ["bm25"], "bm25": {"heap": HEAP}, **retriever})


def with_bm25(config: Config, **changes: Any) -> Config:
    return with_settings(config, bm25=config.retriever.bm25.model_copy(update=changes))


def load(config: Config) -> Bm25Index:
    return load_bm25(config, "REBUILD", lambda text: None)


def rows_of(index: Bm25Index, text: str, topk: int) -> list[int]:
    """The rows of the passages found, best first."""
    return [json.loads(found.document)["extra"] for found in index.answer([(text, topk)])[0]]
