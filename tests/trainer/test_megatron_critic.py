"""The critic on real Megatron against plain torch, at every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.trainer import plain_torch
from tests.trainer.megatron_layouts import Runs
from tests.trainer.tiny_models import load_plain, row_values

Case = tuple[str, str]


@pytest.fixture
def report(runs: Runs, case: Case) -> dict[str, Any]:
    return runs[case[0]]["critic"][case[1]]


def test_values_are_0_before_the_first_step(report: dict[str, Any]) -> None:
    assert all(not values.any() for values in report["start"])


def test_three_steps_are_those_of_plain_torch(runs: Runs, case: Case, report: dict[str, Any]) -> None:
    rows, plain = row_values(), plain_torch.PlainCritic(load_plain(runs.folder(case)))
    expected = plain_torch.train(plain, lambda critic: plain_torch.value_error(critic, rows))
    for found, wanted in zip(report["steps"], expected, strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    for name, tensor in plain.state_dict().items():
        assert (report["weights"][name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    with torch.no_grad():
        values = [plain.values(row) * torch.tensor(row["loss_mask"]) for row in rows]
    for found, wanted in zip(report["values"], values, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_policy_and_critic_resume_together_bit_for_bit(report: dict[str, Any]) -> None:
    went_on, resumed = report["resumed_norms"]
    assert resumed == went_on and report["resumed_equal"]


def test_a_critic_is_read_from_the_folder_that_it_wrote(report: dict[str, Any]) -> None:
    assert report["written_equal"]
