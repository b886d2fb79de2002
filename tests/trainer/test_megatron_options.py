"""Options that may change how much memory a step takes, or its precision, and not where it goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.trainer.megatron_layouts import Runs

LAYOUTS = ["single", "data-parallel", "pipeline-parallel"]


@pytest.fixture(params=LAYOUTS)
def options(runs: Runs, request: pytest.FixtureRequest) -> dict[str, Any]:
    return runs[request.param]["options"]


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.parametrize("option", ["logits_chunk_mib", "recompute_activations", "offload_optimizer", "offload_reference"])
def test_an_option_that_saves_memory_changes_no_result(options: dict[str, Any], option: str) -> None:
    found, plain = options[option], options["none"]
    assert found["norms"] == plain["norms"]
    assert torch.equal(flat(found["weights"]), flat(plain["weights"]))
    assert all(torch.equal(a, b) for a, b in zip(found["reference"], plain["reference"], strict=True))


def test_recomputation_keeps_far_less_for_the_gradient(runs: Runs) -> None:
    options = runs["single"]["options"]
    assert options["recompute_activations"]["kept"] < 0.5 * options["none"]["kept"]


def test_bfloat16_moves_by_updates_smaller_than_its_spacing(options: dict[str, Any]) -> None:
    """Steps of 5e-5 are lost on most bfloat16 weights, whose neighbours are 1e-3 apart; the float32 originals add them up."""
    half = options["half"]
    moved, exact = flat(half["moved"]) - flat(half["start"]), flat(half["exact"]) - flat(half["start"])
    assert float(moved @ exact / exact.square().sum()) > 0.7


def test_bfloat16_weights_are_the_nearest_to_the_float32_ones_at_the_start(runs: Runs, options: dict[str, Any]) -> None:
    loaded = flat(runs["single"]["models"]["llama-tied"]["loaded"])
    assert torch.equal(flat(options["half"]["start"]), loaded.bfloat16().float())


def test_bfloat16_logprobs_are_near_those_of_float32(runs: Runs, options: dict[str, Any]) -> None:
    exact = torch.cat(runs["single"]["models"]["llama-tied"]["logprobs"])
    assert (torch.cat(options["half"]["logprobs"]) - exact).abs().mean() < 0.05


def test_bfloat16_resumes_bit_for_bit(options: dict[str, Any]) -> None:
    assert options["half"]["resumed_equal"]
