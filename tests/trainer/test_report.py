"""What a person reads at the end, and what a resumed run keeps of its journal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from services.trainer.ledger import Evaluation, Ledger
from services.trainer.metrics import Journal, rollout_metrics
from services.trainer.report import results_table
from services.trainer.staleness import staleness_figures
from tests.factories import make_complete_group


def evaluation(label: str, exact_match: float) -> Evaluation:
    by_source = {
        "capital": {"exact_match": exact_match, "f1": 0.5, "format": 1.0, "searches": 1.5, "answered": 1.0, "questions": 4}
    }
    return Evaluation(label, 1, 0, 4, exact_match, 1.0, 1.5, 1.0, by_source, 10.0)


def test_the_table_goes_from_the_first_policy_to_the_last() -> None:
    table = results_table([evaluation("grpo", 0.75), evaluation("start", 0.0), evaluation("warm", 0.25), evaluation("step5", 0.5)])
    assert table.startswith("start → warm start → GRPO")
    (row,) = [line for line in table.splitlines() if line.startswith("| capital")]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "capital",
        "4",
        "0 → 25 → 75",
        "50 → 50 → 50",
        "100 → 100 → 100",
        "1.50 → 1.50 → 1.50",
    ]


def test_a_figure_that_was_not_taken_is_a_dash() -> None:
    (row,) = [line for line in results_table([evaluation("start", 0.0)]).splitlines() if line.startswith("| **all**")]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["**all**", "4", "0", "–", "100", "1.50"]


def test_a_run_without_evaluations_says_so() -> None:
    assert results_table([]) == "no evaluation was made"


def test_a_resumed_journal_drops_what_the_checkpoint_does_not_contain(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, {})
    journal.record("evaluation", 0, {"label": "start"})
    journal.record("grpo", 1, {"reward": 0.1})
    length = journal.length()
    journal.record("evaluation", 1, {"label": "broken off"})
    journal.record("grpo", 2, {"reward": 0.1})
    resumed = Journal(tmp_path, length, {"grpo": 1})
    resumed.record("grpo", 2, {"reward": 0.2})
    rows = [json.loads(line) for line in resumed.path.read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in rows] == [("evaluation", 0), ("grpo", 1), ("grpo", 2)]
    assert resumed.rows("grpo")[-1]["reward"] == 0.2


@pytest.mark.parametrize("length", [None, 10_000])
def test_a_row_that_a_crash_tore_is_dropped(tmp_path: Path, length: int | None) -> None:
    journal = Journal(tmp_path, 0, {})
    journal.record("grpo", 1, {"reward": 0.1})
    with journal.path.open("a") as file:
        file.write('{"kind": "grpo", "st')
    assert [row["step"] for row in Journal(tmp_path, length, {}).rows("grpo")] == [1]


def test_a_journal_that_lost_rows_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Journal(tmp_path, 0, {}).record("grpo", 1, {"reward": 0.1})
    Journal(tmp_path, 10_000, {})
    assert "metrics.jsonl is shorter than when the checkpoint was made: rows are missing" in caplog.text


def test_a_run_without_a_checkpoint_begins_its_journal_anew(tmp_path: Path) -> None:
    Journal(tmp_path, 0, {}).record("evaluation", 0, {"label": "start"})
    assert Journal(tmp_path, 0, {}).path.read_bytes() == b""


def test_every_kind_of_row_has_curves_of_its_own_steps(tmp_path: Path) -> None:
    """A restart at step 1 of GRPO must not hide the steps of the warm start after the first."""
    journal = Journal(tmp_path, 0, {})
    for step in (1, 2, 3):
        journal.record("warm_start", step, {"loss": 1.0})
    journal.record("grpo", 1, {"reward": 0.1})
    journal.record("grpo", 2, {"reward": 0.1})
    Journal(tmp_path, None, {"warm_start": 3, "grpo": 1}).record("grpo", 2, {"reward": 0.2})
    assert _curve(tmp_path, "warm_start", "loss") == [1, 2, 3]
    assert _curve(tmp_path, "grpo", "reward") == [1, 2]


def _curve(folder: Path, kind: str, figure: str) -> list[int]:
    """Steps that TensorBoard shows."""
    shown = EventAccumulator(str(folder / "tensorboard" / kind))
    shown.Reload()
    return [event.step for event in shown.Scalars(f"{kind}/{figure}")]


def test_the_parts_of_the_reward_are_averaged_over_a_batch() -> None:
    group = make_complete_group("t0", [1.0, 0.0])
    first, second = group.trajectories
    first.reward_parts = {"exact_match": 1.0, "sub_match": 1.0, "f1": 1.0, "retrieval": 1.0}
    second.reward_parts = {"exact_match": 0.0, "sub_match": 1.0, "f1": 0.5}
    figures = rollout_metrics([group])
    assert (figures["exact_match"], figures["sub_match"], figures["f1"], figures["retrieval"]) == (0.5, 1.0, 0.75, 0.5)


def test_batch_figures_count_what_they_say() -> None:
    groups = [make_complete_group("t0", [1.0, 0.0], version=4), make_complete_group("t1", [0.0, 0.0], version=5)]
    figures = rollout_metrics(groups)
    assert figures["reward"] == 0.25
    assert figures["zero_variance_groups"] == 0.5
    assert figures["searches"] == 1.0
    assert figures["response_tokens"] == 7 and figures["model_tokens"] == 4 and figures["model_tokens_total"] == 16


def test_staleness_is_counted_by_trajectory() -> None:
    ledger = Ledger(version=4, unpublished=True)
    ledger.publish(5, policies_kept=3)
    groups = [make_complete_group("t0", [1.0, 0.0], version=4), make_complete_group("t1", [0.0, 0.0], version=5)]
    figures = staleness_figures(groups, ledger, bound=2)
    assert figures["staleness"] == 0.5 and figures["staleness_max"] == 1 and figures["staleness_over"] == 0
    assert [figures[f"staleness_{n}"] for n in range(3)] == [2, 2, 0]


@pytest.mark.parametrize("version", [3, 4])
def test_what_is_over_the_bound_or_unknown_shows(version: int) -> None:
    ledger = Ledger(version=4, unpublished=True)
    ledger.publish(5, policies_kept=3)
    assert staleness_figures([make_complete_group("t0", [1.0, 0.0], version=version)], ledger, bound=0)["staleness_over"] == 2
