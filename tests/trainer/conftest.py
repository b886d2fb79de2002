"""The launches of Megatron that the learner's and the critic's tests share."""

from __future__ import annotations

import pytest

from tests.trainer.megatron_layouts import CASES, Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory)


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(layout, model)"""
    return request.param
