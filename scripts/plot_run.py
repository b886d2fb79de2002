"""Draws a run's curve from its metrics.jsonl: `.venv/bin/python scripts/plot_run.py RUN_FOLDER OUT.png` (needs matplotlib)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def read_rows(folder: Path) -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {"warm_start": [], "grpo": [], "evaluation": []}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["kind"], []).append(row)
    return rows


def smoothed(values: list[float], window: int = 5) -> list[float]:
    """Mean over the last `window` values."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def draw(folder: Path, target: Path) -> None:
    rows = read_rows(folder)
    steps = [row["step"] for row in rows["grpo"]]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8))
    matches = [100 * row["reward/exact_match"] for row in rows["grpo"]]
    left.plot(steps, matches, color="#9ecae1", label="training batches, sampled")
    left.plot(steps, smoothed(matches), color="#3182bd", label="their mean over 5 steps")
    held_out = [row for row in rows["evaluation"] if row["label"] != "start"]
    points = [(row["step"], 100 * row["eval/exact_match"]) for row in held_out]
    left.plot(*zip(*points, strict=True), "o-", color="#e6550d", label="held-out countries, greedy")
    for step, value in points:
        left.annotate(f"{value:.1f}", (step, value), textcoords="offset points", xytext=(0, 7), ha="center", color="#e6550d")
    left.margins(0.08, 0.1)
    left.set_ylim(0, 1.5 * max(*matches, *(value for _, value in points)))
    left.set(title="exact match, %", xlabel="GRPO step")
    left.legend(fontsize=8, loc="upper left")
    middle.plot(steps, [row["search/per_episode"] for row in rows["grpo"]], color="#31a354", label="searches per episode")
    middle.plot(steps, [row["reward/format"] for row in rows["grpo"]], color="#756bb1", label="share that keeps the format")
    middle.plot(steps, [row["reward/zero_variance"] for row in rows["grpo"]], color="#bdbdbd", label="groups without variance")
    middle.set(title="behaviour", xlabel="GRPO step", ylim=(0, None))
    middle.legend(fontsize=8)
    right.semilogy(steps, [row["mismatch/abs"] for row in rows["grpo"]], color="#636363", label="mean |trainer − engine| log-prob")
    right.axhline(1e-3, color="#de2d26", linestyle=":", label="bound")
    right.set(title="trainer against engine", xlabel="GRPO step")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
