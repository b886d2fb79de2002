"""The pure grader: golden transcripts, and how match, format, retrieval and the configured rewards combine."""

from __future__ import annotations

import msgspec
import pytest

from services.contract.config import RewardConfig
from services.contract.transcript import ANSWER_ONLY_NOTICE, NOTICE, last_answer, observation
from services.reward.grade import BUILT_IN, Grade, grade
from tests.reward.goldens import golden_cases, golden_trajectory, trajectory_of

CASES = golden_cases("format_reward")
PAID = RewardConfig(structure_format_score=0.2)
ALL_PAID = RewardConfig(structure_format_score=0.2, final_format_score=0.1, retrieval_score=0.1)
SEARCH, PASSAGE = "<search>capital of France</search>", "\n\n<information>Doc 1(Title: x) <answer>Paris</answer></information>\n\n"


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_answer_and_match_are_the_intended_ones_of_the_goldens(case: dict) -> None:
    trajectory = golden_trajectory(case)
    answer = last_answer([span.text for span in trajectory.spans if span.kind == "model"])
    assert answer == case["intended"]["extracted_answer"]
    graded = grade(trajectory, PAID)
    assert graded.parts["exact_match"] == case["intended"]["em"]
    assert graded.parts["answered"] == (answer is not None)
    if case["intended"]["em"]:
        assert graded.reward == (1.0 if graded.parts["format"] else 0.8)


ALIKE = {"search_1", "search_2", "search_3", "direct_answer", "answer_contents", "empty_think", "no_action", "ends_on_search"}
ALIKE |= {"unclosed_answer", "unclosed_search", "unclosed_think", "text_between_tags", "nested_answer_tag", "several_answers"}
ALIKE |= {"odd_tags", "notice_then_answer", "close_without_open", "tag_in_think", "ends_on_information"}


@pytest.mark.parametrize("case", [c for c in CASES if c["category"] in ALIKE], ids=lambda case: case["id"])
def test_where_spans_make_no_difference_the_format_verdict_is_the_reference_graders(case: dict) -> None:
    assert grade(golden_trajectory(case), PAID).parts["format"] == case["peer"]["is_valid_sequence"]


@pytest.mark.parametrize(
    ("turn", "reward"),
    [
        ("<answer>the Paris!</answer>", 1.0),
        ("Surely <answer>Paris</answer>", 0.8),
        ("<answer>Rome</answer>", 0.2),
        ("Surely <answer>Rome</answer>", 0.0),
        ("<answer>Par", 0.0),
        ("<answer></answer>", 0.2),
    ],
)
def test_a_format_score_is_earned_by_a_wrong_answer_and_lost_by_a_right_one(turn: str, reward: float) -> None:
    assert grade(trajectory_of([("model", SEARCH), ("observation", PASSAGE), ("model", turn)], ["Paris"]), PAID).reward == reward


def test_without_a_bonus_only_a_match_is_paid() -> None:
    assert grade(trajectory_of([("model", "<answer>Rome</answer>")], ["Paris"]), RewardConfig()).reward == 0.0


def test_an_answer_in_a_passage_is_not_the_models() -> None:
    graded = grade(trajectory_of([("model", SEARCH), ("observation", PASSAGE), ("model", "I do not know.")], ["Paris"]), PAID)
    assert graded.reward == 0.0
    assert graded.parts == {
        "exact_match": 0.0,
        "sub_match": 0.0,
        "f1": 0.0,
        "format": 0.0,
        "retrieval": 1.0,
        "searches": 1.0,
        "answered": 0.0,
    }
    assert graded.parts.keys() == BUILT_IN


@pytest.mark.parametrize(
    ("passage", "turn", "reward"),
    [
        ("Paris", "<answer>Paris</answer>", 1.0),
        ("Rome", "<answer>Paris</answer>", 1.0),
        ("Paris", "So <answer>Paris</answer>", 0.8),
        ("Paris", "<answer>Rome</answer>", 0.2 + 0.1),
        ("Rome", "<answer>Rome</answer>", 0.2),
        ("Paris", "So <answer>Rome</answer>", 0.1),
        ("Paris", "I do not know.", 0.0),
    ],
)
def test_every_row_of_the_table(passage: str, turn: str, reward: float) -> None:
    parts = [("model", SEARCH), ("observation", observation([f'"Capitals"\n{passage} is one.'])), ("model", turn)]
    assert grade(trajectory_of(parts, ["Paris"]), ALL_PAID).reward == reward


@pytest.mark.parametrize(
    ("match", "answer", "reward"),
    [
        ("exact", "Paris, France", 0.2),
        ("sub", "Paris, France", 1.0),
        ("f1", "Paris, France", 2 / 3 + 0.2 / 3),
        ("f1", "Paris", 1.0),
        ("f1", "Rome", 0.2),
    ],
)
def test_what_is_right_is_configured(match: str, answer: str, reward: float) -> None:
    config = RewardConfig(match=match, structure_format_score=0.2)  # pyright: ignore[reportArgumentType]
    graded = grade(trajectory_of([("model", f"<answer>{answer}</answer>")], ["Paris"]), config)
    assert graded.reward == pytest.approx(reward)
    assert set(graded.parts) == BUILT_IN, "every part is stored, whichever pays"


@pytest.mark.parametrize(
    ("contents", "golds", "retrieved"),
    [
        (['"France"\nIts capital is Paris.'], ["Paris"], True),
        (['"Paris"\nA city.'], ["Paris"], True),
        (['"Rome"\nA city.', '"France"\nIts capital is the  PARIS!'], ["Lyon", "Paris"], True),
        (['"Rome"\nA city.'], ["Paris"], False),
        (['"Rome"\nA city.'], ["information"], False),
        (['"Rome"\nA city.'], ["Title"], False),
        (['"Rome"\nA city.', '"Oslo"\nA city.'], ["Doc 2"], False),
        (['"Rome"\nA city.'], ["the"], False),
        (['"Rome"\nA city.'], [], False),
        ([], ["Paris"], False),
    ],
)
def test_retrieval_is_right_when_a_gold_stands_in_a_passage(contents: list[str], golds: list[str], retrieved: bool) -> None:
    parts = [("model", SEARCH), ("observation", observation(contents)), ("model", "<answer>Oslo</answer>")]
    assert grade(trajectory_of(parts, golds), PAID).parts["retrieval"] == retrieved


def test_what_the_model_writes_as_retrieved_is_not() -> None:
    parts = [("model", "<information>Doc 1(Title: x) Paris</information><answer>Rome</answer>")]
    assert grade(trajectory_of(parts, ["Paris"]), PAID).parts["retrieval"] == 0.0


def test_an_answer_split_by_an_observation_is_none() -> None:
    parts = [("model", "<answer>Par"), ("observation", PASSAGE), ("model", "is</answer>")]
    assert grade(trajectory_of(parts, ["Paris"]), PAID).parts["answered"] == 0.0


def test_a_notice_is_no_search_and_a_turn_it_answers_breaks_the_format() -> None:
    parts = [("model", "Hm."), ("observation", NOTICE), ("model", "<answer>Rome</answer>")]
    graded = grade(trajectory_of(parts, ["Paris"]), PAID)
    assert graded.reward == graded.parts["format"] == graded.parts["searches"] == 0.0
    assert graded.parts["answered"] == 1.0


def test_being_asked_for_the_answer_after_the_last_search_keeps_the_format() -> None:
    parts = [("model", SEARCH), ("observation", PASSAGE), ("observation", ANSWER_ONLY_NOTICE), ("model", "<answer>Rome</answer>")]
    assert grade(trajectory_of(parts, ["Paris"]), PAID).reward == 0.2


def test_an_empty_answer_to_a_question_with_an_empty_gold_is_not_paid_as_right() -> None:
    assert grade(trajectory_of([("model", "<answer>the</answer>")], [""]), RewardConfig()).reward == 0.0


def test_grading_changes_nothing_and_gives_the_same_twice() -> None:
    trajectory = trajectory_of([("model", "<answer>Paris</answer>")], ["Paris"])
    assert grade(trajectory, PAID) == grade(trajectory, PAID)
    assert trajectory.reward is None


@pytest.mark.parametrize("config", [PAID, RewardConfig(legacy=True)], ids=["normal", "legacy"])
def test_a_sample_that_failed_earns_nothing_and_nobody_is_asked_about_it(config: RewardConfig) -> None:
    def never(episode: object) -> Grade:
        raise AssertionError("asked")

    failed = msgspec.structs.replace(trajectory_of([], ["Paris"]), status="failed", stop_reason="late")
    graded = grade(failed, config, None if config.legacy else never)
    assert graded.reward == 0.0 and not any(graded.parts.values())
