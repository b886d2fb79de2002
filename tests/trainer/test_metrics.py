"""The figures of a step: what is counted, and the group that each belongs to."""

from __future__ import annotations

import msgspec
import pytest

from services.contract.messages import Span, Trajectory, VersionSpan
from services.contract.scores import Evaluation
from services.trainer.durable.ledger import Ledger
from services.trainer.feeding.staleness import staleness_metrics
from services.trainer.monitoring.metrics import evaluation_metrics, learner_metrics, rollout_metrics, thought_share
from tests.factories import make_complete_group, make_trajectory


def test_the_parts_of_the_reward_are_averaged_over_a_batch() -> None:
    group = make_complete_group("t0", [1.0, 0.0])
    first, second = group.trajectories
    first.reward_parts = {"exact_match": 1.0, "sub_match": 1.0, "f1": 1.0, "retrieval": 1.0}
    second.reward_parts = {"exact_match": 0.0, "sub_match": 1.0, "f1": 0.5}
    figures = rollout_metrics([group])
    assert [figures[f"reward/{name}"] for name in ("exact_match", "sub_match", "f1", "retrieval")] == [0.5, 1.0, 0.75, 0.5]


def test_batch_figures_count_what_they_say() -> None:
    groups = [make_complete_group("t0", [1.0, 0.0], version=4), make_complete_group("t1", [0.0, 0.0], version=5)]
    figures = rollout_metrics(groups)
    assert figures["reward/mean"] == 0.25
    assert figures["reward/zero_variance"] == 0.5 and figures["reward/groups"] == 2
    assert figures["search/per_episode"] == 1.0 and figures["search/none"] == 0 and figures["search/answered"] == 1
    assert figures["search/response_tokens"] == 7 and figures["search/model_tokens"] == 4
    assert figures["search/model_tokens_total"] == 16


def wrote(text: str) -> Trajectory:
    return make_trajectory(
        response_ids=[1, 2], logprobs=[-1.0, -1.0], spans=[Span("model", 0, 2, text, [VersionSpan(0, 0, 2)])], answer=None
    )


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("<search>abcd</search>", 0.0),
        ("<answer>a</answer>", 0.0),
        ("<think>1234567890</think>12345", 15 / 30),
        ("12345678<answer>12345</answer>", 8 / 30),
        ("no tag at all", 1.0),
        ("   \n  ", 0.0),
    ],
)
def test_a_thought_is_what_stands_outside_search_and_answer(text: str, share: float) -> None:
    assert thought_share(wrote(text)) == pytest.approx(share)


def test_a_trajectory_of_no_token_has_no_thoughts() -> None:
    assert thought_share(make_trajectory(response_ids=[], logprobs=[], spans=[], status="failed")) == 0.0


def test_a_batch_in_which_the_model_wrote_nothing_has_figures_too() -> None:
    group = make_complete_group("t0", [0.0, 0.0])
    empty = [msgspec.structs.replace(t, response_ids=[], logprobs=[], spans=[], status="failed") for t in group.trajectories]
    figures = rollout_metrics([msgspec.structs.replace(group, trajectories=empty)])
    assert figures["search/model_tokens"] == 0
    stale = staleness_metrics([msgspec.structs.replace(group, trajectories=empty)], Ledger(), bound=0)
    assert stale["staleness/mean"] == 0 and stale["staleness/histogram"] == [0]


def test_staleness_is_counted_by_trajectory() -> None:
    ledger = Ledger(version=4, unpublished=True)
    ledger.publish(5, policies_kept=3)
    groups = [make_complete_group("t0", [1.0, 0.0], version=4), make_complete_group("t1", [0.0, 0.0], version=5)]
    figures = staleness_metrics(groups, ledger, bound=2)
    assert figures["staleness/mean"] == 0.5 and figures["staleness/max"] == 1 and figures["staleness/over"] == 0
    assert figures["staleness/histogram"] == [2, 2, 0], "two trajectories of this policy, two of the one before"


@pytest.mark.parametrize("version", [3, 4])
def test_what_is_over_the_bound_or_unknown_shows(version: int) -> None:
    ledger = Ledger(version=4, unpublished=True)
    ledger.publish(5, policies_kept=3)
    group = make_complete_group("t0", [1.0, 0.0], version=version)
    assert staleness_metrics([group], ledger, bound=0)["staleness/over"] == 2


def test_the_learners_figures_are_dealt_into_groups() -> None:
    named = {"mismatch_k3": "mismatch/k3", "importance_mean": "mismatch/importance_mean", "seconds": "time/optimizer_s"}
    named |= {"rejected_fraction": "mismatch/rejected_fraction", "loss": "objective/loss", "ones_own": "objective/ones_own"}
    assert learner_metrics(dict.fromkeys(named, 1.0)) == dict.fromkeys(named.values(), 1.0)


def test_an_evaluation_is_told_whole_with_bounds_and_by_kind() -> None:
    kinds = {"capital": {"exact_match": 1.0, "questions": 2.0}}
    evaluation = Evaluation("step5", 3, 5, 2, 0.5, 1.0, 1.5, 1.0, kinds, 9.0, 0.5, 0.5, 2, {"exact_match": (0.1, 0.9)})
    figures = evaluation_metrics(msgspec.structs.replace(evaluation, pass_at={"pass@2": 0.75}, lowest_version=3, highest_version=4))
    assert (figures["eval/exact_match"], figures["eval/exact_match_low"], figures["eval/exact_match_high"]) == (0.5, 0.1, 0.9)
    assert figures["eval/pass@2"] == 0.75 and figures["eval/capital/exact_match"] == 1.0
    assert (figures["eval/version"], figures["eval/lowest_version"], figures["eval/highest_version"]) == (3, 3, 4)
