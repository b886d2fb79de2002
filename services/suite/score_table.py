"""Evaluations side by side, as papers print them: a row for each, a column for each set of questions, and what others published.

The average counts every set alike. Sets are independent, so its interval is made of theirs (`mean_of_independent`). A row that
lacks one of the sets has no average: it would be one of other questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import msgspec

from services.contract.config import ConfigError
from services.contract.eval_job import JOB, EvalJob, EvalResult, evaluations_in, read_job, read_result
from services.contract.scores import Scores
from services.contract.statistics import mean_of_independent
from services.suite.compare import markdown
from services.suite.published import PublishedRow, in_order
from services.suite.text import visible

AVERAGE = "average"


class TableRow(msgspec.Struct, frozen=True):
    """One evaluation."""

    name: str
    folder: str
    job: EvalJob
    sets: dict[str, Scores]
    average: Scores | None
    """Over the table's sets; its `questions` are those of all of them. None when a set is missing."""
    lost: int
    """Questions that were given up; they count as wrong."""

    def scores(self, column: str) -> Scores | None:
        """Of a set, or of their average."""
        return self.average if column == AVERAGE else self.sets.get(column)


class ScoreTable(msgspec.Struct, frozen=True):
    sets: list[str]
    """In Search-R1's order, others after them by name."""
    rows: list[TableRow]
    published: list[PublishedRow]
    """Those that have one of the sets at least."""

    @property
    def columns(self) -> list[str]:
        """The sets and, of several, their average."""
        return [*self.sets, *([AVERAGE] if len(self.sets) > 1 else [])]

    def asked(self, column: str) -> str:
        """How many questions; from the fewest to the most where rows differ, "–" where none has the column."""
        counts = sorted({scores.questions for row in self.rows if (scores := row.scores(column))})
        return "–".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1]))) if counts else "–"

    def published_share(self, row: PublishedRow, column: str) -> float | None:
        return row.average_over(self.sets) if column == AVERAGE else row.exact_match.get(column)


def read_evaluations(names: Sequence[str]) -> list[tuple[str | None, Path, EvalResult]]:
    """(its name if one was given, folder, scores) for each of `FOLDER` or `NAME=FOLDER`; the modes of one `forage eval` lie in one
    folder, which stands for all of them. Raises ConfigError for what is no evaluation, or is not finished."""
    found: list[tuple[str | None, Path, EvalResult]] = []
    for given in names:
        name, folder = _split(given)
        inside = evaluations_in(folder)
        if not inside:
            raise ConfigError(f"{folder} is no evaluation: it has no {JOB}; `forage eval --out {folder}` makes one")
        for each in inside:
            found.append((f"{name}, {each.name}" if name and len(inside) > 1 else name, each, _finished(each)))
    return found


def is_finished(folder: Path) -> bool:
    """Whether the scores there are those of the job there, and not of a smaller one that was asked for before."""
    job, result = read_job(folder), read_result(folder)
    return job is not None and result is not None and result.job == job


def _finished(folder: Path) -> EvalResult:
    result = read_result(folder)
    if result is None or not is_finished(folder):
        raise ConfigError(f"the evaluation in {folder} is not finished: give its `forage eval` command again, it goes on")
    return result


def _split(given: str) -> tuple[str | None, Path]:
    name, equals, folder = given.partition("=")
    return (name.strip(), Path(folder)) if equals and not Path(given).exists() else (None, Path(given))


def make_table(evaluations: Sequence[tuple[str | None, Path, EvalResult]], published: Iterable[PublishedRow] = ()) -> ScoreTable:
    sets = in_order({source for _, _, result in evaluations for source in result.by_source})
    names = _names(evaluations)
    rows = [
        TableRow(name, str(folder), result.job, result.by_source, _average(result.by_source, sets), result.lost)
        for name, (_, folder, result) in zip(names, evaluations, strict=True)
    ]
    return ScoreTable(sets, rows, [row for row in published if set(row.exact_match) & set(sets)])


def _names(evaluations: Sequence[tuple[str | None, Path, EvalResult]]) -> list[str]:
    """Given ones; else model and mode, and what tells those apart that are then called alike."""
    names = [name or default_name(result.job) for name, _, result in evaluations]
    twice = {name for name, times in Counter(names).items() if times > 1}
    return [
        f"{name} ({result.job.model_digest[:6]})" if name in twice else name
        for name, (_, _, result) in zip(names, evaluations, strict=True)
    ]


def default_name(job: EvalJob) -> str:
    model = Path(job.model).name or job.model
    drawn = "" if job.temperature == 0 else f", {job.samples} × T {job.temperature:g}"
    return f"{model}, {job.mode}{drawn}"


def _average(by_set: dict[str, Scores], sets: Sequence[str]) -> Scores | None:
    if not sets or any(name not in by_set for name in sets):
        return None
    parts = [by_set[name] for name in sets]
    figures = [name for name in parts[0].figures if all(name in part.figures for part in parts)]
    means = {name: round(fmean(part.figures[name] for part in parts), 4) for name in figures}
    intervals = {name: mean_of_independent([(part.figures[name], *part.intervals[name]) for part in parts]) for name in figures}
    rounded = {name: (round(low, 4), round(high, 4)) for name, (low, high) in intervals.items()}
    return Scores(sum(part.questions for part in parts), means, rounded)


# -- Markdown ----------------------------------------------------------------------------------------------------------


def as_markdown(table: ScoreTable) -> str:
    """For a person, a terminal included."""
    parts = ["Exact match %, in brackets its 95 % interval:", _matches(table)]
    if table.published:
        parts.append(_origins(table))
    parts += ["All figures:", _figures(table)]
    if lost := [f"{row.name}: {row.lost}" for row in table.rows if row.lost]:
        parts.append(f"Questions that were given up, and count as wrong: {', '.join(lost)}.")
    return visible("\n\n".join(parts))


def _matches(table: ScoreTable) -> str:
    rows = [["", *table.columns], ["questions", *map(table.asked, table.columns)]]
    rows += [[row.name, *(_share(row.scores(column), "exact_match") for column in table.columns)] for row in table.rows]
    for row in table.published:
        rows.append([f"*{row.name}*", *(_percent(table.published_share(row, column)) for column in table.columns)])
    return markdown(rows)


def _figures(table: ScoreTable) -> str:
    rows = [["", "set", "n", "EM %", "F1 %", "sub-match %", "format %", "answered %", "searches"]]
    for row in table.rows:
        for column in table.columns:
            if scores := row.scores(column):
                shares = [_share(scores, figure) for figure in ("exact_match", "f1")]
                shares += [_percent(scores.figures[figure]) for figure in ("sub_match", "format", "answered")]
                rows.append([row.name, column, f"{scores.questions:,}", *shares, f"{scores.figures['searches']:.2f}"])
    return markdown(rows)


def _origins(table: ScoreTable) -> str:
    told = {row.source: f"In italics: {row.source}; {row.url}, read {row.read}." for row in table.published}
    return "\n".join(told.values())


def _share(scores: Scores | None, figure: str) -> str:
    if scores is None:
        return "–"
    low, high = scores.intervals[figure]
    return f"{100 * scores.figures[figure]:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
