"""What `forage eval` asks the trainer's evaluator to do, and the files that both know."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from services.contract.scores import Scores

Mode = Literal["search", "rag", "direct"]
MODES: tuple[Mode, ...] = ("direct", "rag", "search")
ANSWERS, JOB, RESULTS, TABLE = "answers.jsonl", "job.json", "results.json", "results.md"


class EvalJob(msgspec.Struct, frozen=True):
    """One evaluation of one model, kept as `job.json` in its folder: answers there belong to no other job."""

    model: str
    """As the person named it."""
    model_digest: str
    """Of its weights; two models under one path are not taken for one."""
    questions: list[str]
    """Files; none: those of the configuration, `data.eval_questions`."""
    sources: list[str]
    """Kinds of question; none: all."""
    limit: int
    """Questions, taken evenly from every kind; 0: all. May grow: the smaller sample is part of the larger."""
    samples: int
    temperature: float
    mode: Mode

    def same_answers(self, other: EvalJob) -> bool:
        """Whether answers of one are answers of the other: all but the choice of questions is equal."""
        choice = {"questions": [], "sources": [], "limit": 0, "model": ""}
        return msgspec.structs.replace(self, **choice) == msgspec.structs.replace(other, **choice)


class EvalResult(msgspec.Struct, frozen=True):
    """What `results.json` holds."""

    job: EvalJob
    whole: Scores
    by_source: dict[str, Scores]
    source_mean: dict[str, float]
    """Figures as the mean over kinds of question, each kind counting alike."""
    lost: int
    """Questions that were given up; they count as wrong."""
    versions: list[int]
    """Policy versions that answered."""


def unknown_sources(wanted: Iterable[str], present: Iterable[str]) -> str | None:
    """What is wrong with choosing these kinds of questions out of those that are there; None if nothing."""
    there = set(present)
    if missing := sorted(set(wanted) - there):
        return f"no question is of the kind {', '.join(missing)}; these files have {', '.join(sorted(there)) or 'none'}"
    return None


def read_job(folder: Path) -> EvalJob | None:
    """None where there is none or another version of forage wrote it."""
    try:
        return msgspec.json.decode((folder / JOB).read_bytes(), type=EvalJob)
    except (OSError, msgspec.DecodeError):
        return None


def read_result(folder: Path) -> EvalResult | None:
    try:
        return msgspec.json.decode((folder / RESULTS).read_bytes(), type=EvalResult)
    except (OSError, msgspec.DecodeError):
        return None


def evaluations_in(folder: Path) -> list[Path]:
    """The folder itself if it is an evaluation; else those in it, one a mode, that `forage eval` makes of several modes."""
    if (folder / JOB).exists():
        return [folder]
    return [folder / mode for mode in MODES if (folder / mode / JOB).exists()]
