"""What the lead does, every rank learns: its results, its errors, however long it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import free_port


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of both ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, "-m", "tests.trainer.ranks_worker", str(folder), str(free_port())], check=True, timeout=240)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("what", "heard"),
    [
        ("result", "of rank 0"),
        ("error", "full"),
        ("late", "late"),
        ("given_up", "full"),
        ("in_step", 2.0),
    ],
)
def test_every_rank_hears_what_the_lead_did(reports: list[dict[str, Any]], what: str, heard: Any) -> None:
    """`late` took twice as long as the ranks wait for each other in training."""
    assert [report[what] for report in reports] == [heard, heard]


def test_the_lead_may_break_off_and_gather_again(reports: list[dict[str, Any]]) -> None:
    lead, other = (report["tried_again"] for report in reports)
    assert lead == [[2.0], [2.0] * 3]
    assert other == [], "it only gathered along"
