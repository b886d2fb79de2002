"""The format verdict, turn by turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.reward.format import keeps_format, turn_action

SEARCH, ANSWER = "<search>capital of France</search>", "<answer>Paris</answer>"
THINK = "<think>I should look it up.</think>"


@pytest.mark.parametrize(
    "turns",
    [
        [ANSWER],
        [SEARCH, ANSWER],
        [SEARCH, SEARCH, ANSWER],
        [THINK + SEARCH, ANSWER],
        [f"\n {THINK}\n\n{SEARCH}\n", f" {THINK} {ANSWER} \n"],
        ["<think></think><answer></answer>"],
        ["<think>a < b, x > y, <b>bold</b></think><answer>1 < 2</answer>"],
        ["<answer>two\nlines</answer>"],
    ],
)
def test_these_keep_the_format(turns: list[str]) -> None:
    assert keeps_format(turns)


@pytest.mark.parametrize(
    ("turns", "why"),
    [
        ([], "nothing was written"),
        ([""], "an empty turn"),
        ([SEARCH], "no answer at the end"),
        ([ANSWER, SEARCH], "the answer is not the last"),
        ([ANSWER, ANSWER], "two answers"),
        ([SEARCH + ANSWER], "two actions in one turn"),
        ([SEARCH + SEARCH, ANSWER], "two searches in one turn"),
        ([f"Well, {ANSWER}"], "text before the action"),
        ([f"{ANSWER} I hope."], "text after the action"),
        ([f"{THINK} so {ANSWER}"], "text between the blocks"),
        ([THINK], "a thought without an action"),
        ([THINK + THINK + ANSWER], "two thoughts"),
        ([ANSWER + THINK], "a thought after the action"),
        (["<think>I see" + ANSWER], "an open thought"),
        (["I see</think>" + ANSWER], "a thought that was never opened"),
        ([f"<think>{SEARCH}</think>{ANSWER}"], "an action inside a thought"),
        (["<answer><answer>Paris</answer></answer>"], "nested tags"),
        (["<search><answer>Paris</search>", ANSWER], "a stray tag in a query"),
        (["<answer>Par"], "cut off"),
        (["<answer>Paris</search>"], "closed with another tag"),
        (["<Answer>Paris</Answer>"], "tags in capitals"),
        (["<answer >Paris</answer>"], "a space in the tag"),
        (["<information>Paris</information>" + ANSWER], "the model plays the retriever"),
        (["I do not know.", SEARCH, ANSWER], "a turn without an action"),
    ],
)
def test_these_break_the_format(turns: list[str], why: str) -> None:
    assert not keeps_format(turns), why


def test_a_thought_is_asked_for_in_every_turn_when_required() -> None:
    assert keeps_format([THINK + SEARCH, THINK + ANSWER], require_think=True)
    assert not keeps_format([THINK + SEARCH, ANSWER], require_think=True)
    assert not keeps_format([SEARCH, THINK + ANSWER], require_think=True)


@given(st.text(alphabet="<>/abtheinrcw \n", max_size=60), st.sampled_from(["search", "answer"]))
def test_any_text_without_tags_may_stand_inside_a_block(text: str, action: str) -> None:
    assert turn_action(f"<think>{text}</think><{action}>{text}</{action}>") == action


def test_a_long_turn_of_almost_tags_is_judged_at_once() -> None:
    """A pattern that backtracks would need hours for this one; the test's time limit is the assertion."""
    assert turn_action("<think>" + "<search" * 40_000 + "</think>" * 2 + " " * 40_000) is None
    assert turn_action("<think>" + "<think " * 40_000 + "</think>" + " " * 40_000 + ANSWER) == "answer"
