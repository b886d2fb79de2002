"""Scores of an evaluation from its answers: what the trainer records, `forage eval` prints and `forage runs compare` compares.

An evaluation keeps every answer as a line of a file (`Answer`), so its scores can be made again from the file alone.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import msgspec

from services.contract.files import replace_file
from services.contract.statistics import ks_of, mean_interval, pass_at_k, wilson

SHARES = ("exact_match", "sub_match", "format", "answered")
"""Figures that are 0 or 1 for one episode."""
FIGURES = ("exact_match", "sub_match", "f1", "format", "searches", "answered")


class Answer(msgspec.Struct, frozen=True):
    """One episode of an evaluation, as far as its scores need it. Lines may hold more; that is left alone."""

    id: str
    """`{group}/{sample}`."""
    source: str
    question: str
    parts: dict[str, float] = {}
    """What the grader found: exact_match, sub_match, f1, format …"""
    searches: int = 0
    """That the retriever answered."""
    answer: str | None = None
    versions: list[int] = []
    """Policy versions that wrote it."""

    @property
    def group_id(self) -> str:
        return self.id.rpartition("/")[0]


class Scores(msgspec.Struct, frozen=True):
    """Means over questions, each question's own being the mean over its samples."""

    questions: int
    figures: dict[str, float]
    """FIGURES and, of several samples, pass@1, pass@2 …"""
    intervals: dict[str, tuple[float, float]]
    """95 %: Wilson for shares of one sample a question, bootstrap over questions otherwise."""


class Evaluation(msgspec.Struct, frozen=True):
    """Scores of one policy on the held-out questions; shares between 0 and 1."""

    label: str
    version: int
    """That it was fed for."""
    step: int
    questions: int
    exact_match: float
    format: float
    searches: float
    """Per question."""
    answered: float
    """Share that ends in an answer after at least one search."""
    by_source: dict[str, dict[str, float]]
    """The same figures for every kind of question."""
    seconds: float
    f1: float | None = None
    sub_match: float | None = None
    """None in the ledger of a run that was begun before these figures were taken."""
    samples: int = 1
    intervals: dict[str, tuple[float, float]] = {}
    """95 %, of the whole."""
    pass_at: dict[str, float] = {}
    """pass@k of the whole; only with several samples."""
    lowest_version: int = -1
    """Of any token in it; -1 if nothing was written. Equal to `version` when training waited for it."""
    highest_version: int = -1
    lost: int = 0
    """Questions that were given up; they count as wrong."""


def figures_of(answer: Answer | None, may_search: bool = True) -> dict[str, float]:
    """Of one episode; None (given up) scores 0. Where a policy may search, it has `answered` only after at least one search."""
    if answer is None:
        return dict.fromkeys(FIGURES, 0.0)
    found = {name: answer.parts.get(name, 0.0) for name in ("exact_match", "sub_match", "f1", "format")}
    answered = answer.answer is not None and (answer.searches > 0 or not may_search)
    return found | {"searches": float(answer.searches), "answered": float(answered)}


def score(questions: Sequence[Sequence[dict[str, float]]]) -> Scores:
    """`questions`: for each, the figures of each of its samples. All have equally many samples, at least one."""
    samples = len(questions[0]) if questions else 0
    means = [{name: fmean(sample[name] for sample in played) for name in FIGURES} for played in questions]
    for row, played in zip(means, questions, strict=True):
        right = sum(sample["exact_match"] == 1 for sample in played)
        row |= {f"pass@{k}": pass_at_k(samples, right, k) for k in ks_of(samples)}
    columns = {name: [row[name] for row in means] for name in (means[0] if means else FIGURES)}
    figures = {name: round(fmean(values), 4) if values else 0.0 for name, values in columns.items()}
    return Scores(len(questions), figures, {name: _interval(name, values, samples) for name, values in columns.items()})


def _interval(name: str, values: list[float], samples: int) -> tuple[float, float]:
    if samples == 1 and name in SHARES and all(value in (0, 1) for value in values):
        low, high = wilson(sum(values), len(values))
    else:
        low, high = mean_interval(values)
    return round(low, 4), round(high, 4)


def by_source(rows: Iterable[tuple[str, list[dict[str, float]]]]) -> dict[str, Scores]:
    """Scores of every kind of question. rows: (source, figures of each sample) of every question."""
    found: dict[str, list[list[dict[str, float]]]] = defaultdict(list)
    for source, played in rows:
        found[source].append(played)
    return {source: score(questions) for source, questions in sorted(found.items())}


def kind_row(scores: Scores) -> dict[str, float]:
    """A kind of question as one flat row: the figures, the questions, and the bounds of exact match and F1."""
    bounds = {name: scores.intervals[name] for name in ("exact_match", "f1")}
    ends = {f"{name}_{end}": value for name, pair in bounds.items() for end, value in zip(("low", "high"), pair, strict=True)}
    return scores.figures | {"questions": float(scores.questions)} | ends


# -- the answers' file -------------------------------------------------------------------------------------------------


def read_answers(path: Path) -> list[tuple[Answer, bytes]]:
    """Every whole answer with its line; [] without a file. A line torn by a crash is left out: its question is asked again."""
    if not path.exists():
        return []
    decode, found = msgspec.json.Decoder(Answer).decode, []
    for line in path.read_bytes().splitlines():
        try:
            found.append((decode(line), line))
        except msgspec.DecodeError:
            continue
    return found


def append_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Add lines and make them durable: what is in the file may be forgotten elsewhere."""
    with path.open("ab") as file:
        file.write(b"".join(line + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Replace the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, b"".join(line + b"\n" for line in lines))
