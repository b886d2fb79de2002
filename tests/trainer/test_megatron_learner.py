"""The learner on real Megatron against plain torch, with one process and with two in every way of sharing the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import plain_torch
from tests.trainer.learner_runs import run_layout
from tests.trainer.tiny_models import load_plain, row_values

LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {"names": ["llama-tied", "qwen2-tied", "qwen3"], "invariance": True, "selection": True},
    "data-parallel": {"names": ["llama-tied"], "processes": 2, "invariance": True},
    "tensor-parallel": {"names": ["qwen2-tied", "qwen3"], "processes": 2, "trainer": {"tensor_parallel": 2}, "selection": True},
    "pipeline-parallel": {"names": ["llama"], "processes": 2, "trainer": {"pipeline_parallel": 2}},
}
CASES = [(layout, name) for layout, run in LAYOUTS.items() for name in run["names"]]
CROSSED = {"tensor-parallel": "qwen2-tied", "data-parallel": "llama-tied"}
"""Layouts that also load what the single process saved of this model, their first."""
Case = tuple[str, str]


class Runs:
    """Reports by layout, each started when first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory = factory
        self.done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def __getitem__(self, layout: str) -> dict[str, Any]:
        if layout not in self.done:
            scratch = self.factory.mktemp(layout)
            job = dict(LAYOUTS[layout])
            if layout in CROSSED:
                job["foreign_checkpoint"] = Path(self["single"]["resume"][CROSSED[layout]]["checkpoint"])
            self.done[layout] = scratch, run_layout(scratch, **job)
        return self.done[layout][1]

    def folder(self, case: Case) -> Path:
        self[case[0]]
        return self.done[case[0]][0] / case[1]

    def report(self, case: Case) -> dict[str, Any]:
        return self[case[0]]["models"][case[1]]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory)


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def masked_logprobs(model: torch.nn.Module, **changes: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [plain_torch.response_logprobs(model, row | changes) * torch.tensor(row["loss_mask"]) for row in row_values()]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=2e-6)


def assert_same_training(steps: list[dict[str, float]], weights: dict[str, torch.Tensor], folder: Path, make_loss: Any) -> None:
    model = load_plain(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = plain_torch.train(model, make_loss)
    for found, wanted in zip(steps, expected, strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5, abs=1e-6)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    after = model.state_dict()
    # Adam divides by the gradient's size, so where that is nearly 0 the last bits decide: compare the movement as a whole.
    wrong = torch.cat([(weights[name] - after[name]).flatten() for name in weights]).norm()
    moved = torch.cat([(after[name] - before[name]).flatten() for name in weights]).norm()
    assert wrong < 1e-3 * moved


def test_weights_come_back_bit_for_bit(runs: Runs, case: Case) -> None:
    expected = load_plain(runs.folder(case)).state_dict()
    found = runs.report(case)["loaded"]
    assert set(expected) - set(found) <= {"lm_head.weight"}, "only a tied head may be left out"
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_logprobs_are_those_of_transformers(runs: Runs, case: Case) -> None:
    assert_close(runs.report(case)["logprobs"], masked_logprobs(load_plain(runs.folder(case))))


def test_three_grpo_steps_are_those_of_plain_torch(runs: Runs, case: Case) -> None:
    report, rows = runs.report(case), row_values()
    assert_same_training(
        report["grpo"], report["grpo_weights"], runs.folder(case), lambda model: plain_torch.grpo(model, rows, kl_coef=0.3)
    )


def test_three_supervised_steps_are_those_of_plain_torch(runs: Runs, case: Case) -> None:
    report, rows = runs.report(case), row_values()
    assert_same_training(
        report["supervised"], report["supervised_weights"], runs.folder(case), lambda model: plain_torch.supervised(model, rows)
    )


def test_reference_logprobs_stay_those_of_the_frozen_weights(runs: Runs, case: Case) -> None:
    report = runs.report(case)
    assert_close(report["reference_logprobs"], report["logprobs"])
    assert not torch.allclose(report["trained_logprobs"][0], report["logprobs"][0], atol=1e-3)


def test_a_resumed_run_goes_on_bit_for_bit(runs: Runs, case: Case) -> None:
    resume = runs[case[0]]["resume"][case[1]]
    ahead, fresh, rewound = resume["norms"]
    assert fresh == ahead and rewound == ahead
    assert resume["fresh_equal"] and resume["random_equal"]


@pytest.mark.parametrize("layout", CROSSED)
def test_a_checkpoint_loads_under_another_layout(runs: Runs, layout: str) -> None:
    ahead = runs["single"]["resume"][CROSSED[layout]]["norms"][0]
    assert runs[layout]["cross"]["norms"] == pytest.approx(ahead, rel=1e-5)


@pytest.mark.parametrize("layout", ["single", "tensor-parallel"])
def test_logprobs_from_selected_logits_equal_those_from_all(runs: Runs, layout: str) -> None:
    assert runs[layout]["selection"] < 2e-6


@pytest.mark.parametrize("layout", ["single", "data-parallel"])
@pytest.mark.parametrize("aggregate", ["rollout_mean", "token_mean"])
def test_loss_and_gradient_do_not_depend_on_the_micro_batches(runs: Runs, layout: str, aggregate: str) -> None:
    steps = list(runs[layout]["invariance"][aggregate].values())
    for step in steps[1:]:
        assert step["grad_norm"] == pytest.approx(steps[0]["grad_norm"], rel=1e-5)
        assert step["loss"] == pytest.approx(steps[0]["loss"], rel=1e-5)
        assert step["mismatch_abs"] == pytest.approx(steps[0]["mismatch_abs"], rel=1e-5)


@pytest.mark.parametrize("layout", ["single", "data-parallel"])
def test_leaving_out_rows_without_advantage_changes_nothing(runs: Runs, layout: str) -> None:
    invariance = runs[layout]["invariance"]
    left_out, computed = invariance["rollout_mean"][64], invariance["every_row"]
    assert left_out["grad_norm"] == pytest.approx(computed["grad_norm"], rel=1e-5)
    assert left_out["loss"] == pytest.approx(computed["loss"], rel=1e-5)
    assert (left_out["rows_trained"], computed["rows_trained"]) == (6, 7)


def test_a_batch_without_any_advantage_has_no_gradient(runs: Runs) -> None:
    step = runs["single"]["invariance"]["no_signal"]
    assert (step["loss"], step["grad_norm"], step["rows_trained"], step["rows"]) == (0, 0, 0, 7)


def test_a_rank_without_rows_takes_part(runs: Runs) -> None:
    one_row = {layout: runs[layout]["invariance"]["one_row"] for layout in ("single", "data-parallel")}
    assert one_row["data-parallel"]["grad_norm"] == pytest.approx(one_row["single"]["grad_norm"], rel=1e-5)
    assert one_row["data-parallel"]["tokens"] == one_row["single"]["tokens"]


def test_metrics_say_what_was_computed(runs: Runs) -> None:
    small, large = (runs["single"]["invariance"]["rollout_mean"][n] for n in (8, 4096))
    assert small["tokens"] == large["tokens"]
    assert small["padding"] == 0 < large["padding"] < 0.5


@pytest.mark.parametrize("broken, reason", [("loss", "the weights were left as they are"), ("weights", "no tensor")])
def test_what_cannot_be_trained_is_said(runs: Runs, broken: str, reason: str) -> None:
    assert reason in runs["single"]["errors"][broken]
