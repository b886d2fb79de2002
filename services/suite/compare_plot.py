"""The picture of a comparison; needs matplotlib, which is the extra `plots`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from services.contract.config import ConfigError
from services.suite.compare import Side, differences

CURVES = (
    ("reward/mean", "reward"),
    ("search/per_episode", "searches per episode"),
    ("reward/format", "format kept"),
    ("objective/grad_norm", "gradient norm"),
)


def plot(a: Side, b: Side, target: Path) -> None:
    """Two runs: curves over steps. Otherwise: the paired differences with their intervals. Raises ConfigError."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("a plot needs matplotlib: pip install 'forage[plots]', or leave --plot out") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [[row for row in side.rows if row["kind"] == "grpo"] for side in (a, b)]
    figure = _curves(plt, a, b, steps) if all(steps) else _intervals(plt, a, b)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _curves(plt: Any, a: Side, b: Side, steps: list[list[dict[str, Any]]]) -> Any:
    figure, axes = plt.subplots(1, len(CURVES), figsize=(4 * len(CURVES), 3.4))
    for axis, (name, title) in zip(axes, CURVES, strict=True):
        for side, rows, colour in zip((a, b), steps, ("#3182bd", "#e6550d"), strict=True):
            known = [row for row in rows if isinstance(row.get(name), (int, float))]
            axis.plot([row["step"] for row in known], [row[name] for row in known], color=colour, label=side.name)
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
