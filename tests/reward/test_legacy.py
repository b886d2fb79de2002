"""The originals to the letter, by their own values; and each of their defects, with what the normal rules make of it instead."""

from __future__ import annotations

import pytest

from services.contract.config import RewardConfig
from services.contract.transcript import NOTICE, observation
from services.reward import legacy
from services.reward.grade import BUILT_IN, Grade, grade
from services.reward.legacy import UngradableTrajectory
from tests.reward.goldens import golden_cases, golden_trajectory, trajectory_of

CASES = golden_cases("format_reward")
MATCHES = golden_cases("answer_match")
WEIGHTS = [(0.0, 0.0, 0.0), (0.2, 0.1, 0.0), (0.2, 0.1, 0.1)]
PROMPT = "<|im_start|>user\nAnswer as in <answer> and </answer>, <answer> Beijing </answer>.<|im_end|>\n<|im_start|>assistant\n"


def configured(structure: float = 0.2, final: float = 0.1, retrieval: float = 0.1, legacy: bool = True) -> RewardConfig:
    return RewardConfig(
        structure_format_score=structure, final_format_score=final, retrieval_score=retrieval, require_think=True, legacy=legacy
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_legacy_rewards_are_the_originals_bit_for_bit(case: dict) -> None:
    trajectory = golden_trajectory(case, case["prompt"])
    peer = case["peer"]
    assert [(s["structure"], s["final"], s["retrieval"]) for s in peer["scores"]] == WEIGHTS
    for weights, golden in zip(WEIGHTS, peer["scores"], strict=True):
        assert grade(trajectory, configured(*weights)).reward == golden["score"]
    assert grade(trajectory, configured(0, 0, 0)).reward == peer["plain_em_score"]
    parts = grade(trajectory, configured()).parts
    assert legacy.extract_answer(case["prompt"] + case["response"]) == peer["extracted_answer"]
    assert parts["legacy_answered"] == (peer["extracted_answer"] is not None)
    assert parts["legacy_match"] == (peer["em"] or 0)
    assert parts["legacy_format"] == peer["is_valid_sequence"]
    assert parts["legacy_retrieval"] == peer["is_retrieval_correct"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_the_honest_parts_are_stored_beside_a_legacy_reward(case: dict) -> None:
    trajectory = golden_trajectory(case, case["prompt"])
    honest, compared = grade(trajectory, configured(legacy=False)), grade(trajectory, configured())
    assert {part: compared.parts[part] for part in BUILT_IN} == honest.parts
    assert honest.parts["exact_match"] == case["intended"]["em"]


@pytest.mark.parametrize("case", MATCHES, ids=lambda case: case["id"])
def test_legacy_matches_are_the_originals(case: dict) -> None:
    golds = [case["golds"]] if isinstance(case["golds"], str) else case["golds"]
    assert legacy.exact_match(case["prediction"], golds) == case["expected"]["em"]
    assert legacy.sub_match(case["prediction"], golds) == case["expected"]["subem"]


def test_legacy_sub_match_pays_a_gold_inside_the_answer() -> None:
    config = RewardConfig(legacy=True, match="sub")
    assert grade(trajectory_of([("model", "<answer>in Paris</answer>")], ["Paris"], PROMPT), config).reward == 1.0
    assert grade(trajectory_of([("model", "<answer>in Rome</answer>")], ["Paris"], PROMPT), config).reward == 0.0


def test_legacy_without_the_prompts_text_is_refused_rather_than_guessed() -> None:
    with pytest.raises(UngradableTrajectory, match="update the rollout worker"):
        grade(trajectory_of([("model", "<answer>Paris</answer>")], ["Paris"]), configured())


# -- each defect of the originals, and its mend ----------------------------------------------------------------------------

THINK, SEARCH = "<think>Hm.</think>", "<think>Hm.</think><search>q</search>"


def both(parts: list[tuple[str, str]], golds: list[str], prompt: str = PROMPT) -> tuple[Grade, Grade]:
    """(as the originals, as we do)."""
    trajectory = trajectory_of(parts, golds, prompt)
    return grade(trajectory, configured()), grade(trajectory, configured(legacy=False))


def test_the_prompts_example_is_no_answer_of_the_model() -> None:
    theirs, ours = both([("model", "I do not know.")], ["Beijing"])
    assert (theirs.reward, ours.reward) == (0.8, 0.0)
    assert (theirs.parts["legacy_answered"], ours.parts["answered"]) == (1.0, 0.0)


def test_no_answer_is_told_from_a_wrong_one() -> None:
    theirs, ours = both([("model", "I do not know.")], ["Paris"])
    assert (theirs.reward, ours.reward) == (0.1, 0.0), "the originals pay final_format_score for an answer never given"


def test_an_answer_block_in_a_retrieved_passage_is_not_the_models() -> None:
    passage = "\n\n<information>Doc 1(Title: x) <answer>Paris</answer></information>\n\n"
    theirs, ours = both([("model", SEARCH), ("observation", passage), ("model", "Hm.")], ["Paris"])
    assert (theirs.parts["legacy_match"], ours.parts["exact_match"]) == (1.0, 0.0)


def test_a_passage_after_the_models_answer_does_not_replace_it() -> None:
    passage = "\n\n<information>Doc 1(Title: x) <answer>Rome</answer></information>\n\n"
    theirs, ours = both([("model", "<answer>Paris</answer>"), ("observation", passage)], ["Paris"])
    assert (theirs.parts["legacy_match"], ours.parts["exact_match"]) == (0.0, 1.0)


def test_a_single_answer_counts_when_the_prompt_has_no_example() -> None:
    prompt = "<|im_start|>assistant\n"
    theirs, ours = both([("model", f"{THINK}<answer>Paris</answer>")], ["Paris"], prompt)
    assert (theirs.reward, ours.reward) == (0.2, 1.0)


def test_a_model_without_chatml_can_keep_the_format() -> None:
    theirs, ours = both([("model", f"{THINK}<answer>Rome</answer>")], ["Paris"], PROMPT.replace("<|im_start|>assistant", "[/INST]"))
    assert (theirs.parts["legacy_format"], ours.parts["format"]) == (0.0, 1.0)


def test_a_tag_in_a_passage_does_not_break_the_models_format() -> None:
    passage = "\n\n<information>Doc 1(Title: x) see <search></information>\n\n"
    theirs, ours = both([("model", SEARCH), ("observation", passage), ("model", f"{THINK}<answer>Rome</answer>")], ["Paris"])
    assert (theirs.parts["legacy_format"], ours.parts["format"]) == (0.0, 1.0)


def test_tags_in_a_notice_are_not_the_models() -> None:
    notice = NOTICE + "<answer> and </answer>"
    theirs, ours = both([("model", "Hm."), ("observation", notice)], ["and"])
    assert (theirs.parts["legacy_match"], ours.parts["exact_match"]) == (1.0, 0.0)


def test_an_information_block_of_the_prompt_was_not_retrieved() -> None:
    prompt = f"Between <information> and </information> stands Paris. {PROMPT}"
    theirs, ours = both([("model", f"{THINK}<answer>Rome</answer>")], ["and"], prompt)
    assert (theirs.parts["legacy_retrieval"], ours.parts["retrieval"]) == (1.0, 0.0)


def test_the_layout_of_passages_is_no_retrieved_text() -> None:
    parts = [("model", SEARCH), ("observation", observation(['"Rome"\nA city.'])), ("model", f"{THINK}<answer>x</answer>")]
    theirs, ours = both(parts, ["Doc 1"])
    assert (theirs.parts["legacy_retrieval"], ours.parts["retrieval"]) == (1.0, 0.0)


def test_an_answer_of_which_nothing_is_left_is_not_right() -> None:
    theirs, ours = both([("model", f"{THINK}<answer>the</answer>")], ["a"])
    assert (theirs.parts["legacy_match"], ours.parts["exact_match"]) == (1.0, 0.0)


def test_format_scores_take_effect() -> None:
    """slime passes its format score under a name that its scorer never reads: every wrong answer earns 0 there."""
    _, ours = both([("model", f"{THINK}<answer>Rome</answer>")], ["Paris"])
    assert ours.reward == 0.2
