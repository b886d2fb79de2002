"""The golden vectors in tests/goldens: values that two public projects return for inputs made up for the purpose, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.trainer.objective.packed import rollout_index

GOLDENS = Path(__file__).parents[1] / "goldens"
Golden = dict[str, Any]


def cases(file: str, wanted: Callable[[Golden], bool]) -> list[Any]:
    """The cases of a file that have an expected value and are wanted. Fails where none is: a test of nothing."""
    every = json.loads((GOLDENS / file).read_text())["cases"]
    found = [pytest.param(case, id=case["id"]) for case in every if "expected" in case and wanted(case)]
    assert found, f"{file} has no such case"
    return found


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def flat(lists: Any) -> Tensor:
    """[all tokens], one sample after another."""
    return double([value for values in lists for value in values])


def own(lists: Any, masks: Any) -> Tensor:
    """[model tokens], one sample after another."""
    return flat(lists)[flat(masks).bool()]


def own_rollout(masks: Any) -> Tensor:
    """[model tokens]: the sample of each."""
    return rollout_index([sum(mask) for mask in masks])


def own_rollout_tokens(masks: list[list[int]], rollout_ids: list[int] | None = None) -> Tensor:
    """[model tokens]: model tokens of the token's rollout, over all samples that share the rollout's id."""
    ids = rollout_ids or list(range(len(masks)))
    totals = {rollout: sum(sum(m) for m, r in zip(masks, ids, strict=True) if r == rollout) for rollout in ids}
    return own([[totals[rollout]] * len(mask) for mask, rollout in zip(masks, ids, strict=True)], masks)


def assert_equal(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
