"""The picture of a comparison; needs matplotlib, which is the extra `plots`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from services.contract.config import ConfigError
from services.suite.compare import Side, differences

CURVES = (
    ("evaluation", "eval/exact_match", "exact match, held out"),
    ("grpo", "reward/mean", "reward"),
    ("grpo", "search/per_episode", "searches per episode"),
    ("grpo", "reward/format", "format kept"),
    ("grpo", "objective/grad_norm", "gradient norm"),
)
"""Kind of the lines in `metrics.jsonl`, figure, title."""


def plot(a: Side, b: Side, target: Path) -> None:
    """Two runs: curves over steps. Otherwise: the paired differences with their intervals. Raises ConfigError."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("a plot needs matplotlib: pip install 'forage[plots]', or leave --plot out") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = all(any(row["kind"] == "grpo" for row in side.rows) for side in (a, b))
    figure = _curves(plt, a, b) if runs else _intervals(plt, a, b)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _curves(plt: Any, a: Side, b: Side) -> Any:
    figure, axes = plt.subplots(1, len(CURVES), figsize=(4 * len(CURVES), 3.4))
    for axis, (kind, name, title) in zip(axes, CURVES, strict=True):
        for side, colour in ((a, "#3182bd"), (b, "#e6550d")):
            curve = {row["step"]: row[name] for row in side.rows if row["kind"] == kind and isinstance(row.get(name), (int, float))}
            axis.plot(curve.keys(), curve.values(), "o-" if kind == "evaluation" else "-", color=colour, label=side.name)
        axis.set(title=title, xlabel="GRPO step")
    axes[0].legend(fontsize=8)
    return figure


def _intervals(plt: Any, a: Side, b: Side) -> Any:
    found = [d for d in differences(a, b) if d.figure != "searches"]
    if not found:
        raise ConfigError("nothing can be drawn: no question was answered by both")
    figure, axis = plt.subplots(figsize=(6, 3.2))
    gaps = [d.b - d.a for d in found]
    below = [max(0.0, gap - d.low) for gap, d in zip(gaps, found, strict=True)]
    above = [max(0.0, d.high - gap) for gap, d in zip(gaps, found, strict=True)]
    axis.errorbar(gaps, range(len(found)), xerr=[below, above], fmt="o", color="#3182bd", capsize=3)
    axis.axvline(0, color="#636363", linestyle=":")
    axis.set_yticks(range(len(found)), [d.figure for d in found])
    axis.invert_yaxis()
    axis.set(title=f"{b.name} minus {a.name}, 95 %", xlabel="difference on the same questions")
    return figure
