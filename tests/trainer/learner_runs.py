"""Starts the learner's worker processes for one layout and hands back what they report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.conftest import free_port
from tests.trainer.tiny_models import rewarded_rows, row_values, save_tiny

LIMIT_S = 3000
"""Only for ranks that hang; what a test may take is the test runner's limit."""


def run_layout(
    scratch: Path, names: list[str], asked: set[str], processes: int = 1, trainer: dict[str, Any] | None = None, **job: Any
) -> dict[str, Any]:
    """One launch of `processes` ranks that do what is `asked` with each model (`learner_worker.reports` knows the words).

    Raises RuntimeError with their output when one fails.
    """
    models = [save_tiny(name, scratch / name) for name in names]
    job |= {
        "asked": asked,
        "trainer": (trainer or {}) | {"processes": processes},
        "models": models,
        "rows": row_values(),
        "rewarded": rewarded_rows(),
        "scratch": scratch,
    }
    torch.save(job, scratch / "job.pt")
    address = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [_start(scratch, os.environ | address | {"RANK": str(rank)}) for rank in range(processes)]
    try:
        outputs = [rank.communicate(timeout=LIMIT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("the learner's worker failed:\n" + "\n".join(outputs)[-6000:])
    return torch.load(scratch / "result.pt", weights_only=False)


def _start(scratch: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.trainer.learner_worker", str(scratch / "job.pt"), str(scratch / "result.pt")]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
