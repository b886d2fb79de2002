"""What a person reads at the end, and what a resumed run keeps of its journal."""

from __future__ import annotations

import json
from pathlib import Path

from services.trainer.ledger import Evaluation
from services.trainer.metrics import Journal, rollout_metrics
from services.trainer.report import results_table
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
    journal = Journal(tmp_path, warm_step=0, step=0)
    journal.record("warm_start", 1, {"loss": 1.0})
    for step in (1, 2, 3):
        journal.record("grpo", step, {"reward": 0.1})
    with journal.path.open("a") as file:
        file.write('{"kind": "grpo", "st')  # torn by a crash
    resumed = Journal(tmp_path, warm_step=1, step=2)
    assert [row["step"] for row in resumed.rows("grpo")] == [1, 2]
    assert [row["step"] for row in resumed.rows("warm_start")] == [1]
    assert all(json.loads(line) for line in resumed.path.read_text().splitlines())


def test_the_parts_of_the_reward_are_averaged_over_a_batch() -> None:
    group = make_complete_group("t0", [1.0, 0.0])
    first, second = group.trajectories
    first.reward_parts = {"exact_match": 1.0, "sub_match": 1.0, "f1": 1.0, "retrieval": 1.0}
    second.reward_parts = {"exact_match": 0.0, "sub_match": 1.0, "f1": 0.5}
    figures = rollout_metrics([group], version=0)
    assert (figures["exact_match"], figures["sub_match"], figures["f1"], figures["retrieval"]) == (0.5, 1.0, 0.75, 0.5)


def test_batch_figures_count_what_they_say() -> None:
    groups = [make_complete_group("t0", [1.0, 0.0], version=4), make_complete_group("t1", [0.0, 0.0], version=5)]
    figures = rollout_metrics(groups, version=5)
    assert figures["reward"] == 0.25
    assert figures["zero_variance_groups"] == 0.5
    assert figures["staleness"] == 0.5 and figures["staleness_max"] == 1
    assert figures["searches"] == 1.0
    assert figures["response_tokens"] == 7 and figures["model_tokens"] == 4 and figures["model_tokens_total"] == 16
