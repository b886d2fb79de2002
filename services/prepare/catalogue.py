"""What `hub:NAME` stands for: the published data and models that a run after Search-R1 needs, each pinned to a revision.

| kind      | becomes, at `<data.directory>/hub/NAME`                                    | named by                             |
|-----------|----------------------------------------------------------------------------|--------------------------------------|
| model     | a Hugging Face folder                                                      | model.path, retriever.encoder,       |
|           |                                                                            | passage_encoder, rerank.model        |
| corpus    | one file, gzip or tar.gz as published; the retriever unpacks it beside     | data.corpus                          |
| index     | one FAISS file, its parts joined while they are downloaded                 | data.index                           |
| bm25      | a Lucene folder                                                            | retriever.bm25.index                 |
| questions | a folder with one file a split                                             | data.train_questions, eval_questions |

`NAME@REVISION` takes another revision of the same repository, and `owner/name[@REVISION]` any model repository. Sizes, revisions
and digests are those that several public projects recorded; the hub's own figures are used wherever it tells them, and a digest
below is compared with them while its pinned revision is used.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from services.prepare.errors import PrepareError

Kind = Literal["model", "corpus", "index", "bm25", "questions"]
GB = 10**9
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""Of a model's repository, at its top: configuration, weights, tokenizer. Other formats of the weights are left out."""


@dataclass(frozen=True)
class Entry:
    name: str
    kind: Kind
    repo: str
    files: tuple[str, ...]
    """Paths in the repository, in their order, or patterns of them (`*` does not cross a `/`)."""
    revision: str = "main"
    size: int = 0
    """Bytes to download, about; 0: not known. For people: what counts is what the hub says."""
    growth: float = 0.0
    """Bytes that the retriever needs besides to unpack it, for each byte that is downloaded."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    """Questions: split to file."""
    source: str | None = None
    """Questions: the kind that rows are of which name none."""
    note: str = ""

    @property
    def repo_type(self) -> str:
        return "model" if self.kind == "model" else "dataset"

    @property
    def is_one_file(self) -> bool:
        return self.kind in ("corpus", "index")


def _model(name: str, repo: str, size: float, revision: str = "main", sha256: Mapping[str, str] | None = None) -> Entry:
    return Entry(name, "model", repo, MODEL_FILES, revision, round(size * GB), sha256=sha256 or {})


def _flashrag(name: str, **splits: str) -> Entry:
    files = {split: f"{name}/{file}" for split, file in splits.items()}
    repo, revision = "RUC-NLPIR/FlashRAG_datasets", "5d8dc07e0d2f03784f3fcef665110910375a985b"
    return Entry(f"flashrag-{name}", "questions", repo, tuple(files.values()), revision, splits=files, source=name)


_ALL = [
    _model("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", 1.0),
    _model("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct", 1.0),
    _model("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", 3.1),
    _model("qwen2.5-1.5b-instruct", "Qwen/Qwen2.5-1.5B-Instruct", 3.1, "989aa7980e4cf806f80c7fef2b1adb7bc71aa306"),
    _model("qwen2.5-3b", "Qwen/Qwen2.5-3B", 6.2, "3aab1f1954e9cc14eb9509a215f9e5ca08227a9b"),
    _model("qwen2.5-3b-instruct", "Qwen/Qwen2.5-3B-Instruct", 6.2),
    _model("qwen2.5-7b", "Qwen/Qwen2.5-7B", 15.2, "d149729398750b98c0af14eb82c78cfe92750796"),
    _model("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct", 15.2),
    _model(
        "e5-base-v2",
        "intfloat/e5-base-v2",
        0.44,
        "f52bf8ec8c7124536f0efb74aca902b2995e5bcd",
        {"model.safetensors": "d0d559c47d5f71b1d280b13b62a2657f3e3bc70c0786f9ab91a36545e6a8f693"},
    ),
    Entry(
        "wiki-18",
        "corpus",
        "PeterJinGo/wiki-18-corpus",
        ("wiki-18.jsonl.gz",),
        "69c1c00ffe7c5554c68d8548355cb22e46aabc51",
        round(5.12 * GB),
        growth=14_393_573_105 / (5.12 * GB),
        note="Wikipedia of December 2018 in 21,015,324 passages of 100 words; really a tar.gz; 14.4 GB unpacked",
    ),
    Entry(
        "wiki-18-e5",
        "index",
        "PeterJinGo/wiki-18-e5-index",
        ("part_aa", "part_ab"),
        "a4d31160a035f30764604f4827cd8f1d0315eb86",
        64_559_075_373,
        sha256={
            "part_aa": "a8a6a246951da4bbc8771a223283ef61963882a32864d9044ec00abb90fc3023",
            "part_ab": "b6d9bc943626fe7cb44de4c849e9379e7f272ab216c0552acbcf2390cc033c11",
        },
        note='index_factory = "Flat", encoder e5-base-v2, 256 tokens',
    ),
    Entry(
        "wiki-18-e5-hnsw64",
        "index",
        "PeterJinGo/wiki-18-e5-index-HNSW64",
        ("part_aa", "part_ab"),
        size=round(75.5 * GB),
        note='index_factory = "HNSW64", encoder e5-base-v2, 256 tokens',
    ),
    Entry(
        "wiki-18-bm25",
        "bm25",
        "PeterJinGo/wiki-18-bm25-index",
        ("bm25/*",),
        "2c7554f25f425038c4bcb155735a0f831851fd78",
        round(2.3 * GB),
        note="Lucene; docids are the corpus's rows",
    ),
    Entry(
        "nq-hotpotqa",
        "questions",
        "PeterJinGo/nq_hotpotqa_train",
        ("train.parquet", "test.parquet"),
        "b7d80abfee334a7a91cb377544f09180d58b34f6",
        355_663_891 + 70_370_337,
        sha256={
            "train.parquet": "c3cc21e862a8469105de666101578cbff23cdc77e91a803cef102622c89cc4f6",
            "test.parquet": "30aa887b6d47e06e8c0f6f5307c88fe4e13461ac25a20ec0a5433ad7a4fe25dc",
        },
        splits={"train": "train.parquet", "test": "test.parquet"},
        note="Search-R1's own: 169,615 training rows of NQ and HotpotQA, 51,713 test rows of seven sets",
    ),
    _flashrag("nq", train="train.jsonl", test="test.jsonl"),
    _flashrag("hotpotqa", train="train.jsonl", dev="dev.jsonl"),
    _flashrag("triviaqa", test="test.jsonl"),
    _flashrag("popqa", test="test.jsonl"),
    _flashrag("2wikimultihopqa", dev="dev.jsonl"),
    _flashrag("musique", dev="dev.jsonl"),
    _flashrag("bamboogle", test="test.jsonl"),
]
CATALOGUE = {entry.name: entry for entry in _ALL}


def find_entry(name: str, key: str) -> Entry:
    """What `hub:<name>`, which stands in the configuration's `key`, means. Raises PrepareError."""
    base, _, revision = name.partition("@")
    if entry := CATALOGUE.get(base):
        # What is known of the pinned revision need not hold for another.
        return replace(entry, name=name, revision=revision, sha256={}) if revision else entry
    if base.count("/") == 1:
        return Entry(name, "model", base, MODEL_FILES, revision or "main")
    near = difflib.get_close_matches(base, CATALOGUE, 1)
    hint = f"did you mean hub:{near[0]}?" if near else "`forage data catalogue` lists them; owner/name names a model's repository"
    raise PrepareError(f"{key}: the catalogue has no {base!r}; {hint}")


def require_kind(entry: Entry, kind: Kind, key: str) -> Entry:
    if entry.kind != kind:
        raise PrepareError(
            f"{key}: hub:{entry.name} is of the kind {entry.kind}, {kind} is needed here; see `forage data catalogue`"
        )
    return entry


def catalogue_table() -> str:
    """For people: name, kind, size, repository and what it is."""
    rows = [("name", "kind", "download", "repository @ revision, note")]
    for entry in CATALOGUE.values():
        size = f"{entry.size / GB:.1f} GB" if entry.size else ""
        origin = f"{entry.repo} @ {entry.revision[:8]}"
        rows.append((entry.name, entry.kind, size, "; ".join(filter(None, (origin, ", ".join(entry.splits), entry.note)))))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows)
