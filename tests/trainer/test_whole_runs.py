"""What whole runs of the real trainer leave behind: rows whose every figure docs/metrics.md explains, and checkpoints to export.

Three runs are made: a plain one, one with every option that adds figures, and one with a critic.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.contract.config import load_config
from services.contract.weights import published_versions, version_folder
from services.suite.export import export
from services.suite.run_models import RunModel
from tests.conftest import RedisServer
from tests.trainer.short_run import make_config, run_all

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
EVERYTHING = {
    "max_staleness": 1,
    "eval_every": 1,
    "eval_samples": 2,
    "eval_temperature": 0.7,
    "objective": {"kl_coef": 0.01, "entropy_coef": 0.001, "minibatches": 2, "importance": "mis", "dynamic_sampling": True},
}


RUNS = {
    "plain": {},
    "everything": EVERYTHING,
    "critic": {"objective": {"advantage": "gae", "critic_learning_rate": 1e-3, "critic_warmup_steps": 1}},
}


@pytest.fixture(scope="module")
def folder(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs of the real trainer."""
    folder = tmp_path_factory.mktemp("runs")
    run_all(folder, [make_config(folder, name, redis_server.url, **values) for name, values in RUNS.items()])
    yield folder


def rows(folder: Path, run: str, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def recorded(folder: Path) -> set[str]:
    names = {name for run in RUNS for kind in KINDS for row in rows(folder, run, kind) for name in row}
    figures = {name for name in names if name not in ("kind", "step", "at", "label", "sign", "text")}
    return {re.sub(r"@\d+", "@k", name).replace("eval/capital/", "eval/<source>/") for name in figures}


KINDS = ("warm_start", "grpo", "evaluation", "warning")


def explained() -> set[str]:
    """The names in the first cell of the page's tables."""
    cells = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    names = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    return {name for name in names if "/" in name}


def test_every_figure_is_explained_and_every_explained_figure_exists(folder: Path) -> None:
    assert recorded(folder) - explained() == set(), "not in docs/metrics.md"
    assert explained() - recorded(folder) == set(), "in docs/metrics.md, but no run records it"


def test_an_evaluation_beside_the_training_says_which_versions_answered(folder: Path) -> None:
    steps = [row for row in rows(folder, "everything", "evaluation") if row["label"].startswith("step")]
    assert [(row["label"], row["step"]) for row in steps] == [("step1", 1), ("step2", 2)]
    assert all(row["eval/version"] <= row["eval/lowest_version"] <= row["eval/highest_version"] for row in steps)


def test_a_step_has_one_row_and_its_signs(folder: Path) -> None:
    """The stand-in's log-probs are not this model's, which is the sign that shows."""
    steps = rows(folder, "plain", "grpo")
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert [row["warnings/mismatch"] for row in steps] == [0, 0, 1]
    assert [(row["step"], row["sign"]) for row in rows(folder, "plain", "warning")] == [(3, "mismatch")]


def test_no_trajectory_is_staler_than_allowed(folder: Path) -> None:
    assert all(len(row["staleness/histogram"]) == 1 for row in rows(folder, "plain", "grpo"))
    assert all(len(row["staleness/histogram"]) <= 2 for row in rows(folder, "everything", "grpo"))


@pytest.mark.parametrize("name", ["plain", "critic"])
def test_a_checkpoint_is_exported_as_the_very_model_that_the_run_ended_with(folder: Path, tmp_path: Path, name: str) -> None:
    """By a process of one rank, from the trainer's own format; and transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    run = folder / "runs" / name
    config = load_config(run / "config.toml", {})
    checkpoint = version_folder(run / "checkpoints", published_versions(run / "checkpoints")[-1])
    export(config, str(run / "config.toml"), RunModel("checkpoint", checkpoint, ""), tmp_path / "model")
    ours, final = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tmp_path / "model", run / "final"))
    start = AutoModelForCausalLM.from_pretrained(config.model_path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), final.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ours.parameters(), start.parameters(), strict=True))
