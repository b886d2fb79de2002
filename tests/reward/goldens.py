"""The golden cases of answers and formats, and trajectories that say what they say."""

from __future__ import annotations

import json
from pathlib import Path

from services.contract.messages import Span, Trajectory, VersionSpan


def golden_cases(name: str) -> list[dict]:
    return json.loads((Path(__file__).parents[1] / "goldens" / f"{name}.json").read_text())["cases"]


def trajectory_of(parts: list[tuple[str, str]], golds: list[str], prompt: str = "") -> Trajectory:
    """parts: (kind, text) of each span. One token a span; the texts are what counts here."""
    spans = [
        Span("model", i, i + 1, text, [VersionSpan(0, i, i + 1)])
        if kind == "model"
        else Span("observation", i, i + 1, text, query="q" if "<information>" in text else None)
        for i, (kind, text) in enumerate(parts)
    ]
    ids = list(range(len(spans)))
    return Trajectory(
        "t0/0", "t0", [1], ids, [0.0] * len(ids), spans, "completed", "answered", 1.0, prompt_text=prompt, golden_answers=golds
    )


def golden_trajectory(case: dict, prompt: str = "") -> Trajectory:
    """Of a case of `format_reward`."""
    parts = [(span["kind"], case["response"][span["start"] : span["end"]]) for span in case["spans"]]
    return trajectory_of([part for part in parts if part[1]], case["golds"], prompt)
