"""A small hub's content: one corpus, and an index in two parts, and how a test gets at them."""

from __future__ import annotations

import random
from pathlib import Path

from services.prepare.catalogue import Entry
from services.prepare.fetch import Fetch
from services.prepare.hub import Patience

QUICK = Patience(tries=3, first_pause_s=0.01, longest_pause_s=0.05, stall_s=0.4)
REPO = "datasets/someone/corpus"
ENTRY = Entry("corpus", "corpus", "someone/corpus", ("corpus.jsonl.gz",))
INDEX = Entry("index", "index", "someone/corpus", ("part_aa", "part_ab"))


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


CONTENT = noise(300_000)
FILES = {"corpus.jsonl.gz": CONTENT, "README.md": b"# about", "part_aa": noise(9000, 1), "part_ab": noise(5000, 2)}


def fetched(entry: Entry, folder: Path) -> Path:
    """One entry brought into `folder`, and where it lies."""
    Fetch(entry, folder / entry.name, QUICK).run()
    return folder / entry.name
