"""Draws what runs learned, from their `metrics.jsonl`: held-out exact match, behaviour, and how far the trainer is from the engine.

    python -m benchmarks.curve --metrics docs/quickstart-run/metrics.jsonl --to docs/quickstart-run/curve.png

Several files are drawn over one another, synchronous runs in one colour and asynchronous ones in another.
Needs `pip install 'forage[plots]'`. Not a measurement: the pictures of docs/quickstart-run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BOUND = 1e-3
"""What the mean gap between trainer and engine must stay below."""
SMOOTHED = 5
"""Steps."""


def read(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(GRPO steps, evaluations after the warm start or during GRPO)."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["kind"] == "grpo"], [
        row for row in rows if row["kind"] == "evaluation" and row["label"] != "start"
    ]


def smoothed(values: list[float]) -> list[float]:
    """The mean of each value and of those before it, SMOOTHED in all."""
    windows = [values[max(0, end - SMOOTHED) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def draw(path: Path, target: Path) -> None:
    steps, evaluations = read(path)
    at = [row["step"] for row in steps]
    figure, (match, behaviour, gap) = plt.subplots(1, 3, figsize=(13, 3.8))
    sampled = [100 * row["reward/exact_match"] for row in steps]
    match.plot(at, sampled, color="#9ecae1", label="training batches, sampled")
    match.plot(at, smoothed(sampled), color="#3182bd", label=f"their mean over {SMOOTHED} steps")
    held_out = [100 * row["eval/exact_match"] for row in evaluations]
    match.plot([row["step"] for row in evaluations], held_out, "o-", color="#e6550d", label="held-out countries, greedy")
    for row, value in zip(evaluations, held_out, strict=True):
        match.annotate(f"{value:.1f}", (row["step"], value), (0, 7), textcoords="offset points", ha="center", color="#e6550d")
    match.set(title="exact match, %", ylim=(0, max(*sampled, *held_out) * 1.35))
    behaviour.plot(at, [row["search/per_episode"] for row in steps], color="#31a354", label="searches per episode")
    behaviour.plot(at, [row["reward/format"] for row in steps], color="#756bb1", label="share that keeps the format")
    behaviour.plot(at, [row["reward/zero_variance"] for row in steps], color="#bdbdbd", label="groups without variance")
    behaviour.set(title="behaviour", ylim=(0, 1.35 * max(row["search/per_episode"] for row in steps)))
    gap.semilogy(at, [row["mismatch/abs"] for row in steps], color="#636363", label="mean |trainer − engine| log-prob")
    gap.axhline(BOUND, color="#de2d26", linestyle=":", label="bound")
    gap.set(title="trainer against engine")
    for axis in (match, behaviour, gap):
        axis.set_xlabel("GRPO step")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def draw_together(paths: list[Path], target: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8))
    drawn: set[str] = set()
    for path in paths:
        steps, evaluations = read(path)
        at, bound = [row["step"] for row in steps], len(steps[0]["staleness/histogram"]) - 1
        kind, colour = (f"max_staleness {bound}", "#e6550d") if bound else ("synchronous", "#3182bd")
        label = None if kind in drawn else kind
        drawn.add(kind)
        held_out = [100 * row["eval/exact_match"] for row in evaluations]
        axes[0].plot([row["step"] for row in evaluations], held_out, "o-", color=colour, label=label)
        for axis, name in zip(axes[1:], ("reward/exact_match", "search/per_episode", "reward/format"), strict=True):
            axis.plot(at, smoothed([row[name] for row in steps]), color=colour, label=label)
    learned = ("exact match of what was sampled", "searches per episode", "share that keeps the format")
    titles = ["exact match, %, held out, greedy", *(f"{name}, mean of {SMOOTHED} steps" for name in learned)]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("GRPO step")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", type=Path, nargs="+", required=True)
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    if len(options.metrics) == 1:
        draw(options.metrics[0], options.to)
    else:
        draw_together(options.metrics, options.to)


if __name__ == "__main__":
    main()
