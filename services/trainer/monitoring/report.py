"""The final table: how the policy scored before, after the warm start and after GRPO, by kind of question."""

from __future__ import annotations

from collections.abc import Callable

from services.contract.eval_job import EvalResult
from services.contract.scores import Evaluation, Scores

LABELS = {"start": "start", "warm": "warm start", "grpo": "GRPO"}
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "exact_match": ("exact match %", lambda share: f"{100 * share:.0f}"),
    "f1": ("F1 %", lambda share: f"{100 * share:.0f}"),
    "format": ("format %", lambda share: f"{100 * share:.0f}"),
    "searches": ("searches per question", lambda count: f"{count:.2f}"),
}


def results_table(evaluations: list[Evaluation]) -> str:
    """A Markdown table: a row for every kind of question, the whole last; each cell goes from the first policy to the last."""
    shown = [e for label in LABELS for e in evaluations if e.label == label]
    if not shown:
        return "no evaluation was made"
    rows = [["questions", "n", *[heading for heading, _ in FIGURES.values()]]]
    for source in sorted({source for e in shown for source in e.by_source}):
        scores = [e.by_source.get(source, {}) for e in shown]
        rows.append([source, f"{max(s.get('questions', 0) for s in scores):.0f}", *_cells(scores)])
    rows.append(["**all**", str(max(e.questions for e in shown)), *_cells([_as_scores(e) for e in shown])])
    policies = " → ".join(LABELS[e.label] for e in shown)
    return f"{policies}, {_how(shown[-1].samples)}, on held-out questions:\n\n{_markdown(rows)}"


def _how(samples: int) -> str:
    return "greedy" if samples == 1 else f"mean of {samples} samples"


def _as_scores(evaluation: Evaluation) -> dict[str, float]:
    return {figure: getattr(evaluation, figure) for figure in FIGURES}


def _cells(scores: list[dict[str, float]]) -> list[str]:
    return [" → ".join(show(s[name]) if s.get(name) is not None else "–" for s in scores) for name, (_, show) in FIGURES.items()]


def _markdown(rows: list[list[str]]) -> str:
    """Aligned, so that it can be read in a terminal too."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def evaluation_line(e: Evaluation) -> str:
    """For the log."""
    low, high = e.intervals["exact_match"]
    mixed = f", answered by versions {e.lowest_version} to {e.highest_version}" if e.lowest_version != e.highest_version else ""
    passes = "".join(f"  {name} {value:.1%}" for name, value in e.pass_at.items())
    return (
        f"evaluation ({e.label}): EM {e.exact_match:.1%} ({100 * low:.1f} to {100 * high:.1f}){passes}  format {e.format:.1%}  "
        f"searches {e.searches:.2f}  searched and answered {e.answered:.1%}  "
        f"of {e.questions} held-out questions in {e.seconds:.0f} s{mixed}"
    )


def scores_table(result: EvalResult) -> str:
    """A Markdown table of one evaluation: a row for every kind of question, their mean, the whole with its intervals."""
    passes = [name for name in result.whole.figures if name.startswith("pass@")]
    shares = ["exact_match", "f1", "sub_match", "format", "answered", *passes]
    rows = [
        ["questions", "n", "EM % (95 %)", "F1 %", "sub-match %", "format %", "answered %", *[f"{p} %" for p in passes], "searches"]
    ]
    for source, scores in result.by_source.items():
        rows.append([source, str(scores.questions), *_score_cells(scores.figures, shares, scores)])
    if len(result.by_source) > 1:
        rows.append(["**mean of kinds**", str(len(result.by_source)), *_score_cells(result.source_mean, shares)])
    rows.append(["**all**", str(result.whole.questions), *_score_cells(result.whole.figures, shares, result.whole)])
    job = result.job
    how = "greedy" if job.temperature == 0 else f"{job.samples} sample(s) at temperature {job.temperature:g}"
    lost = f"\n\n{result.lost} question(s) were given up and count as wrong." if result.lost else ""
    return f"{job.model}, mode {job.mode}, {how}:\n\n{_markdown(rows)}{lost}"


def _score_cells(figures: dict[str, float], shares: list[str], scores: Scores | None = None) -> list[str]:
    cells = [f"{100 * figures[name]:.1f}" for name in shares]
    if scores:
        low, high = scores.intervals["exact_match"]
        cells[0] += f" ({100 * low:.1f}–{100 * high:.1f})"
    return [*cells, f"{figures['searches']:.2f}"]
