"""The layouts that the learner and the critic are tested at, and what is asked of each; a launch is made once a session."""

from __future__ import annotations

from typing import Any

import pytest

from tests.trainer.learner_runs import run_layout

LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {
        "names": ["llama-tied", "qwen2-tied", "qwen3"],
        "asked": {"models", "invariance", "options", "head", "errors", "toy"},
    },
    "data-parallel": {"names": ["llama-tied"], "processes": 2, "asked": {"models", "invariance", "options", "crossed"}},
    "tensor-parallel": {
        "names": ["llama-tied", "qwen2-tied", "qwen3"],
        "processes": 2,
        "trainer": {"tensor_parallel": 2},
        "asked": {"models", "head", "crossed"},
    },
    "pipeline-parallel": {
        "names": ["llama-tied", "llama"],
        "processes": 2,
        "trainer": {"pipeline_parallel": 2},
        "asked": {"models", "options", "crossed"},
    },
    "tensor-and-pipeline": {
        "names": ["llama-tied", "qwen2-tied"],
        "processes": 4,
        "trainer": {"tensor_parallel": 2, "pipeline_parallel": 2},
        "asked": {"models", "crossed"},
    },
    "pipeline-and-data": {"names": ["llama-tied"], "processes": 4, "trainer": {"pipeline_parallel": 2}, "asked": {"models"}},
    "single-again": {"names": ["llama-tied"], "asked": {"crossed"}},
}
CASES = [(layout, name) for layout, run in LAYOUTS.items() if "models" in run["asked"] for name in run["names"]]
CROSSED = [
    ("data-parallel", "single"),
    ("tensor-parallel", "single"),
    ("tensor-parallel", "data-parallel"),
    ("pipeline-parallel", "data-parallel"),
    ("tensor-and-pipeline", "data-parallel"),
    ("single-again", "data-parallel"),
    ("single-again", "tensor-parallel"),
    ("single-again", "pipeline-and-data"),
]
"""(layout that goes on, layout that saved): both with llama-tied."""


class Runs:
    """Reports by layout, each started when first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory = factory
        self.done: dict[str, tuple[Any, dict[str, Any]]] = {}

    def __getitem__(self, layout: str) -> dict[str, Any]:
        if layout not in self.done:
            sources = [source for target, source in CROSSED if target == layout]
            foreign = {source: self[source]["resume"]["llama-tied"]["checkpoint"] for source in sources}
            critics = {source: self[source]["critic"]["llama-tied"]["checkpoint"] for source in sources}
            scratch = self.factory.mktemp(layout)
            self.done[layout] = scratch, run_layout(scratch, **LAYOUTS[layout], foreign=foreign, foreign_critics=critics)
        return self.done[layout][1]

    def folder(self, case: tuple[str, str]) -> Any:
        """The Hugging Face folder of a case's model."""
        self[case[0]]
        return self.done[case[0]][0] / case[1]
