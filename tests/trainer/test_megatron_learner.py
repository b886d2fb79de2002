"""The learner on real Megatron against plain torch, at every layout: one process, and work shared in every way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import plain_torch
from tests.trainer.megatron_layouts import CROSSED, Runs
from tests.trainer.tiny_models import load_plain, row_values

Case = tuple[str, str]


@pytest.fixture
def report(runs: Runs, case: Case) -> dict[str, Any]:
    return runs[case[0]]["models"][case[1]]


def masked_logprobs(model: torch.nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [plain_torch.response_logprobs(model, row) * torch.tensor(row["loss_mask"]) for row in row_values()]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=2e-6)


def assert_same_steps(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    for ours, plain in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5, abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    for name in found:
        assert (found[name] - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    wrong = torch.cat([(found[name] - expected[name]).flatten() for name in found]).norm()
    moved = torch.cat([(expected[name] - before[name]).flatten() for name in found]).norm()
    assert wrong < 1e-3 * moved


def assert_same_training(report: dict[str, Any], kind: str, folder: Path, make_loss: Any) -> None:
    model = load_plain(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_same_steps(report[kind], plain_torch.train(model, make_loss))
    assert_same_weights(report[f"{kind}_weights"], model.state_dict(), before)


def test_weights_come_back_bit_for_bit(runs: Runs, case: Case, report: dict[str, Any]) -> None:
    expected, found = load_plain(runs.folder(case)).state_dict(), report["loaded"]
    assert set(expected) - set(found) <= {"lm_head.weight"}, "only a tied head may be left out"
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_logprobs_are_those_of_transformers(runs: Runs, case: Case, report: dict[str, Any]) -> None:
    assert_close(report["logprobs"], masked_logprobs(load_plain(runs.folder(case))))


def test_three_grpo_steps_are_those_of_plain_torch(runs: Runs, case: Case, report: dict[str, Any]) -> None:
    rows = row_values()
    assert_same_training(report, "grpo", runs.folder(case), lambda model: plain_torch.grpo(model, rows, kl_coef=0.3))


def test_three_supervised_steps_are_those_of_plain_torch(runs: Runs, case: Case, report: dict[str, Any]) -> None:
    rows = row_values()
    assert_same_training(report, "supervised", runs.folder(case), lambda model: plain_torch.supervised(model, rows))


def test_three_steps_with_an_entropy_bonus_are_those_of_plain_torch(runs: Runs, case: Case, report: dict[str, Any]) -> None:
    rows = row_values()
    assert_same_training(report, "entropy", runs.folder(case), lambda model: plain_torch.entropy_bonus(model, rows))


def test_reference_logprobs_stay_those_of_the_frozen_weights(report: dict[str, Any]) -> None:
    assert_close(report["reference_logprobs"], report["logprobs"])
    assert not torch.allclose(report["trained_logprobs"][0], report["logprobs"][0], atol=1e-3)


def test_a_resumed_run_goes_on_bit_for_bit(runs: Runs, case: Case) -> None:
    resume = runs[case[0]]["resume"][case[1]]
    ahead, fresh, rewound = resume["norms"]
    assert fresh == ahead and rewound == ahead
    assert resume["equal"] and resume["random_equal"]


@pytest.mark.parametrize("target, source", CROSSED)
def test_a_checkpoint_goes_on_under_another_layout(runs: Runs, target: str, source: str) -> None:
    """The run that never changed its layout is the measure."""
    stayed, went_over = runs[source]["resume"]["llama-tied"], runs[target]["crossed"][source]
    assert went_over["norms"] == pytest.approx(stayed["norms"][0], rel=1e-5)
    for name, expected in stayed["weights"].items():
        assert (went_over["weights"][name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("layout", ["single", "tensor-parallel"])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_the_last_layer_in_pieces_is_the_whole_one(runs: Runs, layout: str, chunk: int) -> None:
    """Log-probs, entropies and their gradients, with temperatures and a vocabulary that does not divide."""
    for found, expected in zip(runs[layout]["head"][chunk], plain_torch.head_expected(), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


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
    assert small["padding"] == large["padding"] == 0
    assert (small["microbatches"], large["microbatches"]) == (6, 1)


def test_data_parallel_ranks_get_even_work(runs: Runs) -> None:
    steps = runs["data-parallel"]["invariance"]
    assert 1 <= steps["rollout_mean"][64]["imbalance"] < 1.2
    assert steps["one_row"]["imbalance"] == 2, "one of two ranks had all the work"
    assert steps["one_row"]["padding"] > 0, "the other computed a filler"


@pytest.mark.parametrize(
    "what, reason",
    [
        ("loss", "the weights were left as they are"),
        ("token", "a row has token 259, but the model knows 0 to 258"),
        ("weights", "no tensor"),
        ("disk", "the checkpoint needs 0.00 GB: free some space"),
        ("checkpoint", "is no checkpoint"),
        ("name", "no Hugging Face name for stranger"),
        ("engine", "transformer_engine cannot be imported: install it, or set it to false"),
    ],
)
def test_what_cannot_be_used_is_refused(runs: Runs, what: str, reason: str) -> None:
    assert reason in runs["single"]["errors"][what]


def test_the_norms_of_transformer_engine_have_names(runs: Runs) -> None:
    expected = "model.layers.2.input_layernorm.weight, model.layers.2.post_attention_layernorm.weight"
    assert runs["single"]["errors"]["fused"] == expected


def test_transformers_still_loads_models_beside_megatron(runs: Runs) -> None:
    assert runs["single"]["errors"]["beside"] == "loaded"
