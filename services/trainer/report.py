"""The final table: how the policy scored before, after the warm start and after GRPO, by kind of question."""

from __future__ import annotations

from collections.abc import Callable

from services.trainer.ledger import Evaluation

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
    return f"{policies}, greedy, on held-out questions:\n\n{_markdown(rows)}"


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
