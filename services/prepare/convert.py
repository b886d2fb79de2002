"""Any files of questions become the one JSONL that the trainer reads: every row checked, keys unique, all of it or nothing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from services.contract.config import Config
from services.contract.messages import Question
from services.contract.telemetry import Progress
from services.prepare.errors import PrepareError
from services.prepare.question_rows import Fault, Located, locate, questions_of
from services.prepare.steps import Step, code_digest

logger = logging.getLogger("prepare")


def convert_step(config: Config, key: str, output: Path) -> Step:
    """Made again when a file, what is said about it, or the code that reads it has changed."""
    files = locate(config, key)
    inputs = {"files": [_identity(file) for file in files], "code": code_digest("convert", "question_rows", "question_files")}
    return Step(key, output, inputs, lambda out: write_questions(files, out, key))


def write_questions(files: Sequence[Located], path: Path, key: str) -> None:
    """All questions of `files` in their order. Raises PrepareError at the first row that is none, or whose key was there before."""
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    with path.open("wb") as out, Progress(f"reading {key}", sum(file.path.stat().st_size for file in files), "bytes") as bar:
        for file in files:
            for question in checked(file, seen):
                out.write(msgspec.json.encode(question) + b"\n")
                counts[question.source] += 1
            bar.advance(file.path.stat().st_size)
    logger.info("%s: %s", key, ", ".join(f"{source} {count:,}" for source, count in sorted(counts.items())))


def checked(file: Located, seen: set[str]) -> Iterator[Question]:
    """The file's questions; their keys are added to `seen`."""
    for row in questions_of(file):
        if isinstance(row, Fault):
            raise PrepareError(row.text)
        if row.example_id in seen:
            raise PrepareError(
                f"{file.path}: the key {row.example_id} (source:id) stands there twice, or in two files; give each file a `source` "
                "of its own, or each question an id"
            )
        seen.add(row.example_id)
        yield row


def _identity(file: Located) -> dict[str, object]:
    if not file.path.is_file():
        raise PrepareError(f"{file.path}: no such file; mend its path in the configuration")
    status = file.path.stat()
    options = file.file.model_dump(mode="json", exclude={"path"})
    return {"path": str(file.path), "bytes": status.st_size, "changed": status.st_mtime_ns, **options, "source": file.source}
