"""PPO with its critic on real Megatron against plain torch in float64, at every layout."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest
import torch

from tests.trainer.megatron_layouts import CROSSED, Runs
from tests.trainer.plain_ppo import RATES, PlainPPO
from tests.trainer.tiny_models import rewarded_rows

Case = tuple[str, str]
Weights = dict[str, torch.Tensor]


@pytest.fixture
def report(runs: Runs, case: Case) -> dict[str, Any]:
    return runs[case[0]]["critic"][case[1]]


def assert_close(found: Weights, wanted: Weights, tolerance: float = 2e-5) -> None:
    for name, tensor in found.items():
        assert (tensor - wanted[name]).norm() <= tolerance * wanted[name].norm(), name


def test_values_are_0_before_the_first_step(report: dict[str, Any]) -> None:
    assert all(not values.any() for values in report["start"])


def test_two_batches_of_ppo_are_those_of_plain_torch(runs: Runs, case: Case, report: dict[str, Any]) -> None:
    """Six optimizer steps a batch, of policy and critic: figures, weights, and the values that come out."""
    rows, plain = rewarded_rows(), PlainPPO(runs.folder(case))
    for found, rates in zip(report["figures"], RATES, strict=True):
        for name, wanted in plain.learn(rows, rates).items():
            assert found[name] == pytest.approx(wanted, rel=2e-4, abs=1e-6), name
    assert_close(report["weights"]["policy"], plain.policy.state_dict())
    assert_close(report["weights"]["critic"], plain.critic.state_dict())
    for found, row in zip(report["values"], rows, strict=True):
        wanted = plain.critic.values(row).detach() * torch.tensor(row["loss_mask"])
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)


def test_the_example_is_no_trivial_one(report: dict[str, Any]) -> None:
    """Both clips clip, the ratio is not 1, the KL is in the rewards of the second batch."""
    first, second = report["figures"]
    assert all(0 < batch["clip_fraction"] < 1 and 0 < batch["value_clip_fraction"] < 1 for batch in (first, second))
    assert first["optimizer_steps"] == 6 and first["returns_mean"] != second["returns_mean"]


def test_in_the_critics_warm_up_the_policy_stays_as_it_is(report: dict[str, Any]) -> None:
    alone, together = report["alone"]["figures"], report["figures"][0]
    assert report["alone"]["moved"] == ["critic"]
    assert (alone["loss"], alone["grad_norm"]) == (0, 0)
    assert alone["value_loss"] == together["value_loss"] and "mismatch_k3" in alone


def test_policy_and_critic_resume_together_bit_for_bit(report: dict[str, Any]) -> None:
    assert report["resumed_equal"]


@pytest.mark.parametrize("target, source", CROSSED)
def test_policy_and_critic_go_on_under_another_layout(runs: Runs, target: str, source: str) -> None:
    """The run that never changed its layout is the measure."""
    stayed, went_over = runs[source]["critic"]["llama-tied"]["weights"], runs[target]["critic_crossed"][source]
    for name in ("policy", "critic"):
        assert_close(went_over[name], stayed[name])


def test_a_critic_is_read_from_the_folder_that_it_wrote(report: dict[str, Any]) -> None:
    assert report["written_equal"]


def test_a_checkpoint_with_a_critic_serves_a_run_without(report: dict[str, Any]) -> None:
    assert report["served_without"]


def test_a_checkpoint_without_a_critic_is_refused_for_one(report: dict[str, Any]) -> None:
    assert "has no critic: the steps before it were made without one" in report["refused"]


def test_ppo_raises_the_reward(runs: Runs) -> None:
    """Sixteen batches of 24 rollouts; at random a quarter of the tokens is paid for."""
    toy = runs["single"]["toy"]
    assert fmean(toy["reward"][:2]) < 0.4
    assert fmean(toy["reward"][-2:]) > 0.8


def test_a_critic_learns_what_a_batch_is_worth(runs: Runs) -> None:
    explained = runs["single"]["toy"]["explained_variance"]
    assert explained[0] == 0 and explained[-1] > 0.5
