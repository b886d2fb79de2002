"""`forage runs compare`: two runs, or two evaluations, side by side. Pure but for reading their folders.

Paired: the same question (kind and text) in both. A difference of exact match with one sample a question is tested by McNemar's
exact test on the questions that only one got right; F1, and anything with several samples, by a bootstrap over paired differences.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from services.contract.config import ConfigError
from services.contract.eval_job import ANSWERS, evaluations_in, read_job, read_result
from services.contract.scores import Answer, figures_of, read_answers
from services.contract.statistics import bootstrap_p, mcnemar, mean_interval
from services.suite.published import in_order
from services.suite.run_models import find_run

COMPARED = ("exact_match", "f1", "sub_match", "format", "searches", "answered")
LAST_STEPS = 5
STEP_FIGURES = (
    "reward/mean",
    "reward/exact_match",
    "reward/format",
    "reward/zero_variance",
    "search/per_episode",
    "search/model_tokens",
    "objective/negative_logprob",
    "objective/grad_norm",
    "mismatch/k3",
    "staleness/mean",
    "time/step_s",
    "time/tokens_per_s",
)


class Side(msgspec.Struct, frozen=True):
    """One of the two that are compared."""

    name: str
    answers: dict[tuple[str, str], list[Answer]]
    """By kind and text of the question; of a run, those of its last evaluation."""
    may_search: bool
    rows: list[dict[str, Any]]
    """Of a run's journal; none of an evaluation."""
    told: str
    """Which answers these are."""


class Difference(msgspec.Struct, frozen=True):
    """Of one figure over the questions that both answered: b minus a."""

    figure: str
    a: float
    b: float
    low: float
    """95 %, bootstrap over questions."""
    high: float
    p: float
    test: str


def read_side(name: str, directory: Path) -> Side:
    """An evaluation's folder, or a run by folder or name. Raises ConfigError."""
    folder = Path(name)
    if (folder / ANSWERS).exists():
        job, result = read_job(folder), read_result(folder)
        told = f"{job.model}, mode {job.mode}" if job else "answers"
        if result is None:
            told += ", unfinished"
        return Side(name, _by_question(folder / ANSWERS), job is None or job.mode == "search", [], told)
    if several := evaluations_in(folder):
        raise ConfigError(f"{name} holds several evaluations: name one of {', '.join(map(str, several))}")
    run = find_run(name, directory)
    rows = _journal(run)
    last = next((row for row in reversed(rows) if row["kind"] == "evaluation"), None)
    path = run / "evaluations" / f"{last['label']}-step{last['step']:06d}.jsonl" if last else None
    told = f"evaluation {last['label']} at step {last['step']}" if last else "no evaluation"
    return Side(run.name, _by_question(path) if path else {}, True, rows, told)


def sets_of(a: Side, b: Side) -> list[str]:
    """The kinds of question that both answered some of, in the order of the papers."""
    return in_order({source for source, _ in a.answers.keys() & b.answers.keys()})


def differences(a: Side, b: Side, source: str | None = None) -> list[Difference]:
    """Of every figure, over the questions (of one kind, if it is named) that both answered; [] if there are none."""
    both = [key for key in a.answers if key in b.answers and source in (None, key[0])]
    if not both:
        return []
    left = [_means(a.answers[key], a.may_search) for key in both]
    right = [_means(b.answers[key], b.may_search) for key in both]
    single = all(len(side.answers[key]) == 1 for side in (a, b) for key in both)
    return [_difference(figure, [x[figure] for x in left], [y[figure] for y in right], single) for figure in COMPARED]


def _difference(figure: str, left: list[float], right: list[float], single: bool) -> Difference:
    gaps = [y - x for x, y in zip(left, right, strict=True)]
    low, high = mean_interval(gaps)
    if single and figure not in ("f1", "searches"):
        p, test = mcnemar(gaps.count(-1), gaps.count(1)), f"McNemar, {gaps.count(1)} won, {gaps.count(-1)} lost"
    else:
        p, test = bootstrap_p(gaps), "paired bootstrap"
    return Difference(figure, fmean(left), fmean(right), low, high, p, test)


def comparison(a: Side, b: Side) -> str:
    """Markdown: the steps' figures of runs, then the paired differences."""
    parts = [f"a: {a.name} ({a.told})\nb: {b.name} ({b.told})"]
    if table := _steps_table(a, b):
        parts.append(table)
    found = differences(a, b)
    questions = sum(key in b.answers for key in a.answers)
    if found:
        parts.append(f"Paired, on the {questions} questions that both answered:\n\n{_differences_table(found)}")
        if len(sets := sets_of(a, b)) > 1:
            parts.append(f"Exact match by kind of question, each test by itself:\n\n{_sets_table(a, b, sets)}")
    else:
        parts.append("No question was answered by both: nothing can be paired.")
    return "\n\n".join(parts)


HEAD = ["a", "b", "b - a (95 %)", "p", "test"]


def _differences_table(found: list[Difference]) -> str:
    return markdown([["figure", *HEAD], *([d.figure, *_cells(d)] for d in found)])


def _sets_table(a: Side, b: Side, sets: list[str]) -> str:
    rows = [["questions", "n", *HEAD]]
    for source in sets:
        match = next(d for d in differences(a, b, source) if d.figure == "exact_match")
        rows.append([source, str(sum(key[0] == source and key in b.answers for key in a.answers)), *_cells(match)])
    return markdown(rows)


def _cells(d: Difference) -> list[str]:
    return [f"{d.a:.3f}", f"{d.b:.3f}", f"{d.b - d.a:+.3f} ({d.low:+.3f} to {d.high:+.3f})", f"{d.p:.2g}", d.test]


def _steps_table(a: Side, b: Side) -> str:
    """Means over the last steps of each run; nothing where one is no run."""
    steps = [[row for row in side.rows if row["kind"] == "grpo"] for side in (a, b)]
    if not all(steps):
        return ""
    heading = f"GRPO steps {steps[0][-1]['step']} and {steps[1][-1]['step']}; means of the last {LAST_STEPS}:"
    rows = [["figure", "a", "b"]]
    for figure in STEP_FIGURES:
        rows.append([figure, *(_last_mean(of_side, figure) for of_side in steps)])
    return f"{heading}\n\n{markdown(rows)}"


def _last_mean(steps: list[dict[str, Any]], figure: str) -> str:
    values = [row[figure] for row in steps[-LAST_STEPS:] if isinstance(row.get(figure), (int, float))]
    return f"{fmean(values):.4g}" if values else "–"


def markdown(rows: list[list[str]]) -> str:
    """A table that can be read in a terminal too; the first row is its head."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _means(answers: list[Answer], may_search: bool) -> dict[str, float]:
    figures = [figures_of(answer, may_search) for answer in answers]
    return {name: fmean(row[name] for row in figures) for name in COMPARED}


def _by_question(path: Path) -> dict[tuple[str, str], list[Answer]]:
    found: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for answer, _ in read_answers(path):
        found[answer.source, answer.question].append(answer)
    return dict(found)


def _journal(run: Path) -> list[dict[str, Any]]:
    """Raises ConfigError when it cannot be read."""
    rows: list[dict[str, Any]] = []
    try:
        lines = (run / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"{run}/metrics.jsonl cannot be read: {error.strerror}") from None
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn, or being written at this instant
        if isinstance(row, dict) and isinstance(row.get("kind"), str):
            rows.append(row)
    return rows
