"""What Search-R1 and slime read in an episode, to the letter, so that a run can be compared with theirs (`reward.legacy`).

They look at one text, prompt and response together. Known faults, kept here and mended in grade.py and its helpers:

* blocks of the prompt count: with an example in the prompt, an episode without an answer has answered that example;
* blocks that stand in retrieved passages count as the model's answer;
* a single answer block in the whole text counts as none, whoever wrote it;
* without ChatML's assistant marker no format is right, and with it a notice, a stray tag in a passage, or anything after the
  answer makes it wrong for good;
* an information block of the prompt counts as retrieved;
* an answer of which normalisation leaves nothing equals a gold of which it leaves nothing, and such a gold stands everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from services.contract.messages import Trajectory
from services.contract.transcript import TAGS
from services.reward.matching import normalise

_ASSISTANT = re.compile(r"<\|im_start\|>assistant\s*")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_INFORMATION = re.compile(r"<information>(.*?)</information>", re.DOTALL)
_TAG = re.compile(rf"(</?(?:{'|'.join(TAGS)})>)")
_NEXT = {
    ("start", "<think>"): "in_think",
    ("in_think", "</think>"): "after_think",
    ("after_think", "<search>"): "in_search",
    ("after_think", "<answer>"): "in_answer",
    ("in_search", "</search>"): "after_search",
    ("after_search", "<information>"): "in_information",
    ("in_information", "</information>"): "information",
    ("information", "<think>"): "in_think",
    ("in_answer", "</answer>"): "end",
}


class UngradableTrajectory(ValueError):
    """This trajectory can never be graded, however often it is tried."""


class Verdict(NamedTuple):
    """In the order of `grade.pay`'s arguments."""

    match: float
    answered: bool
    in_format: bool
    retrieved: bool


def judge(trajectory: Trajectory, match: Literal["exact", "sub", "f1"]) -> Verdict:
    """Raises UngradableTrajectory when the trajectory carries no text of its prompt."""
    if not trajectory.prompt_text:
        raise UngradableTrajectory(
            "reward.legacy reads the prompt too, and this trajectory carries none: update the rollout worker"
        )
    text = trajectory.prompt_text + "".join(span.text for span in trajectory.spans)
    answer, golds = extract_answer(text), trajectory.golden_answers
    matches = exact_match if match == "exact" else sub_match
    right = answer is not None and matches(answer, golds)
    return Verdict(float(right), answer is not None, is_valid_sequence(text), is_retrieval_correct(text, golds))


def parts_of(verdict: Verdict) -> dict[str, float]:
    return {
        "legacy_match": verdict.match,
        "legacy_answered": float(verdict.answered),
        "legacy_format": float(verdict.in_format),
        "legacy_retrieval": float(verdict.retrieved),
    }


def extract_answer(text: str) -> str | None:
    """The last answer block of prompt and response, stripped; None when there are fewer than two."""
    found = _ANSWER.findall(text)
    return found[-1].strip() if len(found) > 1 else None


def exact_match(answer: str, golds: Sequence[str]) -> bool:
    return normalise(answer) in map(normalise, golds)


def sub_match(answer: str, golds: Sequence[str]) -> bool:
    found = normalise(answer)
    return any(normalise(gold) in found for gold in golds)


def is_retrieval_correct(text: str, golds: Sequence[str]) -> bool:
    """Whether a gold stands in any information block of prompt and response."""
    return any(sub_match(block, golds) for block in _INFORMATION.findall(text))


def is_valid_sequence(text: str) -> bool:
    """Whether what follows the first assistant marker is think, search, information and so on, ending in think, answer."""
    marker = _ASSISTANT.search(text)
    if marker is None:
        return False
    content = text[marker.end() :]
    if any(content.count(f"<{tag}>") != content.count(f"</{tag}>") for tag in TAGS):
        return False
    state = "start"
    for piece in _TAG.split(content):
        if _TAG.fullmatch(piece):
            state = _NEXT.get((state, piece), "")
        elif piece.strip() and not state.startswith("in_"):
            return False
        if not state:
            return False
    return state == "end"
