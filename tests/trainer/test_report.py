"""What a person reads of evaluations: the table at the end, the line of each."""

from __future__ import annotations

import msgspec

from services.contract.scores import Evaluation
from services.trainer.monitoring.report import evaluation_line, results_table


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


def test_a_sampled_evaluation_is_not_called_greedy() -> None:
    sampled = msgspec.structs.replace(evaluation("grpo", 0.5), samples=4, pass_at={"pass@4": 0.75})
    assert results_table([sampled]).startswith("GRPO, mean of 4 samples")


def test_the_line_of_an_evaluation_tells_how_sure_it_is_and_which_versions_answered() -> None:
    e = msgspec.structs.replace(evaluation("step5", 0.5), intervals={"exact_match": (0.15, 0.85)}, pass_at={"pass@4": 0.75})
    line = evaluation_line(msgspec.structs.replace(e, lowest_version=3, highest_version=5))
    assert "EM 50.0% (15.0 to 85.0)  pass@4 75.0%" in line and line.endswith("answered by versions 3 to 5")
    assert "versions" not in evaluation_line(e)
