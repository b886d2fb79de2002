"""The final table: how the policy scored before, after the warm start and after GRPO, by kind of question."""

from __future__ import annotations

from services.trainer.ledger import Evaluation

LABELS = {"start": "starting policy", "warm": "after warm start", "grpo": "after GRPO"}
FIGURES = ("exact_match", "format", "searches")
HEADINGS = {"exact_match": "exact match", "format": "format", "searches": "searches"}


def results_table(evaluations: list[Evaluation]) -> str:
    """A Markdown table: one row a kind of question, three figures for every evaluation, the whole in the last row."""
    shown = [e for label in LABELS for e in evaluations if e.label == label]
    if not shown:
        return "no evaluation was made"
    sources = sorted({source for e in shown for source in e.by_source})
    groups = " | ".join(f"{LABELS[e.label]}: {HEADINGS[f]}" for e in shown for f in FIGURES)
    lines = [f"| questions | n | {groups} |", "|---|---|" + "---|" * (len(shown) * len(FIGURES))]
    for source in sources:
        scores = [e.by_source.get(source, {}) for e in shown]
        lines.append(_row(source, int(max(s.get("questions", 0) for s in scores)), scores))
    lines.append(_row("**all**", max(e.questions for e in shown), [_as_scores(e) for e in shown]))
    return "\n".join(lines)


def _as_scores(evaluation: Evaluation) -> dict[str, float]:
    return {figure: getattr(evaluation, figure) for figure in FIGURES}


def _row(name: str, questions: int, scores: list[dict[str, float]]) -> str:
    cells = [_cell(score.get(figure), figure) for score in scores for figure in FIGURES]
    return f"| {name} | {questions} | " + " | ".join(cells) + " |"


def _cell(value: float | None, figure: str) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if figure == "searches" else f"{100 * value:.1f} %"
