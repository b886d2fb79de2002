"""What an episode looks like as text: the prompt, the tags, the observation. One definition for all who write or read it.

The rollout plays it, the reward grades it, `prepare` writes demonstrations in it. Tags and the layout of passages are
Search-R1's, so that models and data made for it work here; the sentences are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

SEARCH_STOP, ANSWER_STOP = "</search>", "</answer>"
STOPS = [SEARCH_STOP, ANSWER_STOP]
TAGS = ("think", "search", "information", "answer")
INFORMATION_CLOSE = "</information>\n\n"
NOTICE = "\n\nThat step could not be used. Close a query with the search tag, or close the final answer with the answer tag.\n\n"
"""Appended when a turn holds no action. It contains no tag, so nothing in it can be read as an action."""
ANSWER_ONLY_NOTICE = "\n\nNo searches are left. Give the answer now.\n\n"

_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_INFORMATION = re.compile(r"<information>(.*?)</information>", re.DOTALL)
_SHOWN = re.compile(r"^Doc \d+\(Title: (\".*?\"|.*?)\)(?: |$)", re.MULTILINE)
_ANY_TAG = re.compile(rf"<(/?)({'|'.join(TAGS)})>")


class Action(NamedTuple):
    kind: Literal["search", "answer"]
    content: str
    """Stripped."""


def build_prompt(question: str, instruction: str, system: str | None, chat: bool) -> list[dict[str, str]] | str:
    """Chat messages, or one text when the model has no chat template."""
    user = instruction.replace("{question}", question.strip())
    if not chat:
        return user if system is None else f"{system}\n\n{user}"
    return [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": user}]


def parse_action(turn: str) -> Action | None:
    """The first complete search or answer block of one model turn; None if there is none."""
    match = _ACTION.search(turn)
    return Action(match[1], match[2].strip()) if match else None  # type: ignore[arg-type]


def last_answer(model_spans: Sequence[str]) -> str | None:
    """The stripped content of the last answer block that lies wholly inside one model span."""
    found = [match[1] for text in model_spans for match in _ANSWER.finditer(text)]
    return found[-1].strip() if found else None


def split_contents(contents: str) -> tuple[str, str]:
    """(title line, text) of a passage's `contents`."""
    title, _, text = contents.partition("\n")
    return title, text


def passages_text(contents: Sequence[str]) -> str:
    """Passages as Search-R1 shows them: ``Doc 1(Title: "T") text``, a line each."""
    parts = (split_contents(c) for c in contents)
    return "".join(f"Doc {i}(Title: {title}) {text}\n" for i, (title, text) in enumerate(parts, 1))


def neutralise_tags(text: str) -> str:
    """Write tags inside passages with other brackets, so that a corpus cannot speak as the model."""
    return _ANY_TAG.sub(r"[\1\2]", text)


def observation(contents: Sequence[str]) -> str:
    """What is appended to the transcript after a search; `contents` best first, empty if nothing was found."""
    return f"\n\n<information>{neutralise_tags(passages_text(contents)).strip()}{INFORMATION_CLOSE}"


def shown_passages(observed: str) -> list[tuple[str, str]]:
    """(title line, text) of each passage in an observation, as far as it was shown: the inverse of `observation`.

    A text that itself has a line which begins like a passage is taken apart there; a title that was cut off is left out.
    """
    pieces = _SHOWN.split("".join(_INFORMATION.findall(observed)))
    return [(title, text.strip()) for title, text in zip(pieces[1::2], pieces[2::2], strict=True)]
