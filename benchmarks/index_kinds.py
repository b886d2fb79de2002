"""FAISS kinds on one corpus: size, build time, latency at batch 1, 32 and 256, and recall@3 against Flat.

    python -m benchmarks.index_kinds --corpus C.jsonl --questions Q.jsonl [--folder var/bench] [--count 1000]

The vectors are those that `python -m benchmarks.retriever` built in `--folder`. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.retriever import minilm, prepared, read_questions
from services.retriever.families import FAMILIES
from services.retriever.index import FaissIndex, fill_index
from services.retriever.transformer import TransformerEncoder

KINDS = {
    "Flat": "",
    "SQfp16": "",
    "SQ8": "",
    "HNSW32": "efSearch=64",
    "IVF256,Flat": "nprobe=16",
    "IVF256,SQ8": "nprobe=16",
    "PQ64,RFlat": "k_factor_rf=8",
    "PQ64,Refine(SQ8)": "k_factor_rf=8",
    "RaBitQ,RFlat": "k_factor_rf=8",
    "IVF256,RaBitQ,RFlat": "nprobe=16,k_factor_rf=8",
}
TOPK, THREADS = 3, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("var/bench"))
    parser.add_argument("--encoder", type=Path, default=None)
    parser.add_argument("--count", type=int, default=1000, help="questions")
    arguments = parser.parse_args()
    arguments.encoder = arguments.encoder or minilm()
    prepared(arguments)
    vectors = np.load(arguments.folder / "index" / "embeddings.npy", mmap_mode="r")
    encoder = TransformerEncoder(arguments.encoder, FAMILIES["minilm"], 256, THREADS)
    queries = encoder.encode([row["question"] for row in read_questions(arguments.questions)[: arguments.count]], "query")
    exact = top(fill_index("Flat", vectors, THREADS), queries)
    print(f"{len(vectors):,} passages × {vectors.shape[1]}, {len(queries)} questions, {THREADS} threads")
    print("| `index_factory` | `index_search` | MB | build s | ms a query at batch 1 | 32 | 256 | recall@3 of Flat |")
    print("|---|---|---|---|---|---|---|---|")
    for factory, search in KINDS.items():
        print(measured(factory, search, vectors, queries, exact), flush=True)


def measured(factory: str, search: str, vectors: np.ndarray, queries: np.ndarray, exact: list[set[int]]) -> str:
    started = time.monotonic()
    built = fill_index(factory, vectors, THREADS)
    seconds = time.monotonic() - started
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index.faiss")
        built.save(path)
        size = path.stat().st_size / 1e6
        index = FaissIndex.load(path, THREADS, search)
    recall = np.mean([len(found & right) / TOPK for found, right in zip(top(index, queries), exact, strict=True)])
    waits = " | ".join(f"{1000 * latency(index, queries, batch):.2f}" for batch in (1, 32, 256))
    return f"| {factory} | {search} | {size:.1f} | {seconds:.1f} | {waits} | {recall:.3f} |"


def top(index: FaissIndex, queries: np.ndarray) -> list[set[int]]:
    return [{hit.row for hit in hits} for hits in index.search(queries, TOPK)]


def latency(index: FaissIndex, queries: np.ndarray, batch: int) -> float:
    """Seconds a query: the median over batches."""
    taken = []
    for start in range(0, min(len(queries) - batch, 100 * batch) + 1, batch):
        started = time.perf_counter()
        index.search(queries[start : start + batch], TOPK)
        taken.append((time.perf_counter() - started) / batch)
    return float(np.median(taken))


if __name__ == "__main__":
    main()
