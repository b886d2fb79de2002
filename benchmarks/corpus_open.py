"""Seconds and memory to open a corpus, the first time and later, against reading every line of it with `json`.

Each measurement is a process of its own, over a generated corpus of short passages that the page cache holds. Memory is the
peak of what the kernel counts for the process, mapped pages included.

    python benchmarks/corpus_open.py [--rows 5000000] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from services.retriever.corpus import Corpus
from services.retriever.offsets import offsets_path

Measured = tuple[float, float]
"""Seconds, and peak memory in MiB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--folder", type=Path, help="where the corpus is generated; default: a temporary folder")
    parser.add_argument("--measure", nargs=2, metavar=("HOW", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        how, path = arguments.measure
        print(json.dumps(measure(WAYS[how], Path(path))))
        return
    with tempfile.TemporaryDirectory(prefix="corpus-open-", dir=arguments.folder) as folder:
        compare(generate(Path(folder) / "corpus.jsonl", arguments.rows))


def generate(path: Path, rows: int) -> Path:
    with path.open("w") as file:
        file.writelines(
            f'{{"id": "{row}", "contents": "\\"Place {row}\\"\\nA short passage, number {row}."}}\n' for row in range(rows)
        )
    path.read_bytes()  # into the page cache
    print(f"{rows:,} rows, {path.stat().st_size:,} bytes")
    return path


def compare(path: Path) -> None:
    baseline = in_own_process("json", path)
    offsets_path(path).unlink(missing_ok=True)
    outcomes = {"first open": in_own_process("open", path), "later open": in_own_process("open", path)}
    print("| | seconds | peak MiB | seconds, ratio to json | memory, ratio to json |\n|---|---|---|---|---|")
    print(f"| json, every line | {baseline[0]:.2f} | {baseline[1]:.0f} | 1 | 1 |")
    for name, (seconds, memory) in outcomes.items():
        print(f"| {name} | {seconds:.3f} | {memory:.0f} | {seconds / baseline[0]:.4f} | {memory / baseline[1]:.3f} |")


def in_own_process(how: str, path: Path) -> Measured:
    command = [sys.executable, __file__, "--measure", how, str(path)]
    seconds, memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return seconds, memory


def measure(work: Callable[[Path], object], path: Path) -> Measured:
    started = time.perf_counter()
    kept = work(path)
    seconds = time.perf_counter() - started
    assert kept
    return seconds, peak_mib()


def peak_mib() -> float:
    """Not `ru_maxrss`, which a process inherits from the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def read_with_json(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [json.loads(line) for line in file]


def open_corpus(path: Path) -> str:
    corpus = Corpus.open(path)
    return corpus.contents(len(corpus) - 1)


WAYS: dict[str, Callable[[Path], object]] = {"json": read_with_json, "open": open_corpus}

if __name__ == "__main__":
    main()
