"""What a person wants to know of questions before training on them: how many of what, which are broken, which come twice, and
which of the held-out ones would be trained on. Questions are the same when their words are, whatever case and punctuation.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from services.contract.messages import Question
from services.prepare.errors import PrepareError
from services.prepare.question_rows import Fault, Located, questions_of

FAULTS_SHOWN = 10


@dataclass
class SourceFigures:
    """Of one source; lengths in words."""

    question_words: list[int] = field(default_factory=list)
    answer_words: list[int] = field(default_factory=list)
    """Of each question's first golden answer."""
    answers: int = 0
    own_prompts: int = 0

    def add(self, question: Question) -> None:
        self.question_words.append(len(question.question.split()))
        self.answer_words.append(len(question.golden_answers[0].split()))
        self.answers += len(question.golden_answers)
        self.own_prompts += question.prompt is not None


@dataclass
class Summary:
    """Of one set of files."""

    name: str
    sources: dict[str, SourceFigures] = field(default_factory=lambda: defaultdict(SourceFigures))
    faults: list[str] = field(default_factory=list)
    """The first of them; `broken` counts all."""
    broken: int = 0
    repeated_keys: int = 0
    repeated_questions: int = 0
    asked: set[int] = field(default_factory=set)
    """Hashes of the questions' words: 8 bytes each, so that 10 million fit."""

    @property
    def rows(self) -> int:
        return sum(len(figures.question_words) for figures in self.sources.values())

    @property
    def usable(self) -> bool:
        return not (self.broken or self.repeated_keys)


def summarize(name: str, files: Iterable[Located]) -> Summary:
    """Every row of the files is read. A file that cannot be read at all counts as one fault."""
    summary, keys = Summary(name), set[int]()
    for file in files:
        try:
            for row in questions_of(file):
                _count(summary, keys, row)
        except PrepareError as error:
            _count(summary, keys, Fault(str(error)))
    return summary


def _count(summary: Summary, keys: set[int], row: Question | Fault) -> None:
    if isinstance(row, Fault):
        summary.broken += 1
        if len(summary.faults) < FAULTS_SHOWN:
            summary.faults.append(row.text)
        return
    summary.sources[row.source].add(row)
    key, words = _hash(row.example_id), _hash(_words(row.question))
    summary.repeated_keys += key in keys
    summary.repeated_questions += words in summary.asked
    keys.add(key)
    summary.asked.add(words)


def report(summaries: Sequence[Summary]) -> str:
    """For people: a table for each set, then what two sets have in common."""
    blocks = [_table(summary) for summary in summaries]
    for number, one in enumerate(summaries):
        for other in summaries[number + 1 :]:
            shared = len(one.asked & other.asked)
            share = f" ({shared / len(other.asked):.2%} of {other.name})" if shared else ""
            blocks.append(f"{one.name} and {other.name} have {shared:,} questions in common{share}")
    return "\n\n".join(blocks)


def _table(summary: Summary) -> str:
    heading = ("source", "rows", "words a question", "golden answers", "words an answer", "longest", "own prompts")
    rows = [heading, *(_row(source, figures) for source, figures in sorted(summary.sources.items()))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines = [f"{summary.name}: {summary.rows:,} questions", *(lines if summary.sources else [])]
    if summary.repeated_questions:
        lines.append(f"{summary.repeated_questions:,} are asked more than once")
    if summary.repeated_keys:
        lines.append(
            f"{summary.repeated_keys:,} keys (source:id) stand there more than once: give every question of a source its own id"
        )
    if summary.broken:
        more = f", the first {len(summary.faults)}" if summary.broken > len(summary.faults) else ""
        lines += [f"{summary.broken:,} rows cannot be used{more}:", *(f"  {fault}" for fault in summary.faults)]
    return "\n".join(lines)


def _row(source: str, figures: SourceFigures) -> tuple[str, ...]:
    count = len(figures.question_words)
    return (
        source,
        f"{count:,}",
        f"{statistics.mean(figures.question_words):.1f}",
        f"{figures.answers / count:.1f}",
        f"{statistics.mean(figures.answer_words):.1f}",
        str(max(figures.answer_words)),
        f"{figures.own_prompts:,}",
    )


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
