"""Importance weights, rejection and veto against the goldens, and what the original left undefined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from services.contract.config import ObjectiveConfig
from services.trainer.objective.corrections import Correction, correct, mean_weight, mismatch
from services.trainer.objective.losses import rollout_mean
from tests.trainer.goldens import Golden, assert_equal, cases, double, own, own_rollout, own_rollout_tokens

MODES = {"truncate": "tis", "clip": "tis", "mask": "mis"}


def mis_objective(config: dict[str, Any]) -> ObjectiveConfig:
    """Our options for slime's. There the veto only acts with `use_rs`, bounds are taken over from the weights' where they are not
    given, and a lower bound that is not given is 1/upper; here each option stands for itself."""
    high = config["tis_upper_bound"]
    low = 1 / high if config["tis_lower_bound"] is None else config["tis_lower_bound"]
    options: dict[str, Any] = {"importance": "none"}
    if config["use_tis"]:
        truncates = config["tis_mode"] == "truncate"
        options = {"importance": MODES[config["tis_mode"]], "importance_level": config["tis_level"]}
        options |= {"importance_low": 0.0 if truncates else low, "importance_high": high}
        options["importance_normalize"] = config["tis_batch_normalize"]
    if config["use_rs"]:
        bounds = {"reject_low": config["rs_lower_bound"] or low, "reject_high": config["rs_upper_bound"] or high}
        options |= {"reject_level": config["rs_level"], "veto": config["rs_veto_threshold"], **bounds}
    return ObjectiveConfig(**options)


def corrected(inputs: Golden, o: ObjectiveConfig) -> Correction:
    """As the learner does it: the weights divided by the batch's mean."""
    masks = inputs["loss_masks"]
    train, engine = (own(inputs[name], masks) for name in ("train_log_probs", "rollout_log_probs"))
    rollout = own_rollout(masks)
    found = correct(train, engine, rollout, o)
    mean = mean_weight(found.weights, rollout, o.importance_level) if o.importance_normalize else 1.0
    return Correction(found.weights / mean, found.keep)


def mean_loss(inputs: Golden, found: Correction) -> Tensor:
    masks = inputs["loss_masks"]
    loss = own(inputs["pg_loss"], masks) * found.weights
    return rollout_mean(loss, found.keep, own_rollout_tokens(masks), len(masks))


COUNTS_EMPTY_ROLLOUTS = "mm-070"


def as_in_the_original(c: Golden) -> bool:
    """Left out: a mean over sequences that counts those without a model token (see below), and `metrics_only`, where rejection is
    computed but not applied."""
    return c["kind"] == "mis" and c["category"] != "metrics_only" and c["id"] != COUNTS_EMPTY_ROLLOUTS


@pytest.mark.parametrize("case", cases("mismatch_correction.json", as_in_the_original))
def test_weights_and_rejection(case: Golden) -> None:
    inputs, expected, masks = case["inputs"], case["expected"], case["inputs"]["loss_masks"]
    found = corrected(inputs, mis_objective(inputs["config"]))
    if expected["weights"] is not None:
        assert_equal(found.weights, own(expected["weights"], masks))
    assert_equal(found.keep.double(), own(expected["masks"], masks))
    assert_equal(mean_loss(inputs, found), expected["mean_pg_loss"])


@pytest.mark.parametrize("case", cases("mismatch_correction.json", lambda c: c["kind"] in ("tis", "icepop")))
def test_tis_and_icepop(case: Golden) -> None:
    inputs, expected = case["inputs"], case["expected"]
    o = ObjectiveConfig(importance=case["kind"], importance_low=inputs["lower"], importance_high=inputs["upper"])
    found = corrected(inputs, o)
    assert_equal(found.weights, own(expected["weights"], inputs["loss_masks"]))
    assert found.keep.all()
    assert_equal(mean_loss(inputs, found), expected["mean_pg_loss"])


@pytest.mark.parametrize("case", cases("mismatch_correction.json", lambda c: c["kind"] == "tis"))
def test_mismatch_metrics(case: Golden) -> None:
    """The golden's `tis` is the mean ratio and `tis_clipfrac` the share outside the range, per sample, then over samples."""
    inputs, expected, masks = case["inputs"], case["expected"]["metrics"], case["inputs"]["loss_masks"]
    train, engine = (own(inputs[name], masks) for name in ("train_log_probs", "rollout_log_probs"))
    gap = mismatch(train, engine, inputs["lower"], inputs["upper"])
    ones, sizes = torch.ones_like(train), own_rollout_tokens(masks)
    assert_equal(rollout_mean(gap.ratio, ones, sizes, len(masks)), expected["tis"])
    # The original counts in float32.
    assert float(rollout_mean(gap.outside, ones, sizes, len(masks))) == pytest.approx(expected["tis_clipfrac"], abs=1e-6)


TRAIN, ENGINE, ROLLOUT = double([-1.0, -2.0, -0.5, -0.3]), double([-1.1, -0.5, -1.3, -0.2]), torch.tensor([0, 0, 0, 1])


def test_the_veto_acts_without_any_rejection() -> None:
    """In slime it is ignored then."""
    kept = correct(TRAIN, ENGINE, ROLLOUT, ObjectiveConfig(veto=0.5)).keep
    assert kept.tolist() == [False, False, False, True]


def test_normalisation_is_defined_at_the_geometric_level() -> None:
    """There slime raises. All tokens of a rollout have one weight; the mean is over rollouts."""
    weights = double([0.5, 0.5, 0.5, 2.0])
    assert mean_weight(weights, ROLLOUT, "geometric") == pytest.approx(1.25)
    assert mean_weight(weights, ROLLOUT, "token") == pytest.approx(0.875)


@pytest.mark.parametrize("case", cases("mismatch_correction.json", lambda c: c["id"] == COUNTS_EMPTY_ROLLOUTS))
def test_a_rollout_without_model_tokens_has_no_weight_to_average(case: Golden) -> None:
    """The original counts it as a weight of 0, so that the others' mean comes out above 1."""
    inputs, masks = case["inputs"], case["inputs"]["loss_masks"]
    found = corrected(inputs, mis_objective(inputs["config"])).weights
    written = sum(any(mask) for mask in masks)
    assert_equal(found, own(case["expected"]["weights"], masks) * written / len(masks))
    assert mean_weight(found, own_rollout(masks), "sequence") == pytest.approx(1.0)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0, 0.0, 0.0]])
def test_nothing_to_normalise_is_no_division_by_zero(weights: list[float]) -> None:
    assert mean_weight(double(weights), ROLLOUT[: len(weights)], "token") == 1.0


def test_without_correction_every_token_counts_once() -> None:
    found = correct(TRAIN, ENGINE, ROLLOUT, ObjectiveConfig(importance="none"))
    assert found.weights.tolist() == [1, 1, 1, 1] and found.keep.all()


def test_one_sided_rejection() -> None:
    o = {"importance": "none", "reject_level": "token"}
    assert correct(TRAIN, ENGINE, ROLLOUT, ObjectiveConfig(**o, reject_high=1.5)).keep.tolist() == [True, True, False, True]
    assert correct(TRAIN, ENGINE, ROLLOUT, ObjectiveConfig(**o, reject_low=0.5)).keep.tolist() == [True, False, True, True]


@pytest.mark.parametrize("importance", ["none", "tis", "icepop", "mis"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_corrections_carry_no_gradient(importance: str, level: str) -> None:
    options = {} if importance == "none" else {"importance_level": level}
    train = TRAIN.clone().requires_grad_()
    found = correct(train, ENGINE, ROLLOUT, ObjectiveConfig(importance=importance, reject_level=level, reject_high=9.0, **options))
    assert not found.weights.requires_grad and not found.keep.requires_grad


def test_a_hopeless_log_ratio_gives_a_finite_weight() -> None:
    found = correct(double([0.0]), double([-1e4]), torch.tensor([0]), ObjectiveConfig(importance="mis"))
    assert found.weights.isfinite().all() and not found.keep.any()
