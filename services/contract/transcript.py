"""What an episode looks like as text: the prompt, the tags, the observation. One definition for all who write or read it.

The rollout plays it, the reward grades it, `prepare` writes demonstrations in it. Tags and the default layout of passages are
Search-R1's, so that models and data made for it work here; the sentences are ours.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

SEARCH_STOP, ANSWER_STOP = "</search>", "</answer>"
STOPS = [SEARCH_STOP, ANSWER_STOP]
TAGS = ("think", "search", "information", "answer")
NOTICE = "\n\nThat step could not be used. Close a query with the search tag, or close the final answer with the answer tag.\n\n"
"""Appended when a turn holds no action. It contains no tag, so nothing in it can be read as an action."""
ANSWER_ONLY_NOTICE = "\n\nThat step could not be used, and no searches are left. Give the answer now.\n\n"
"""The same before the last turn, in which only an answer counts."""

_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ANY_TAG = re.compile(rf"<(/?)({'|'.join(TAGS)})>")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_OPEN_BEFORE, _OPEN_AFTER = re.compile(r"<[^>]*$"), re.compile(r"^[^<]*>")


class Layout(NamedTuple):
    """How passages are shown to the model; the default is Search-R1's. See `layout_problems` for what a template may hold."""

    passage: str = "Doc {number}(Title: {title}) {text}\n"
    """One passage; `{number}` counts from 1, best first."""
    whole: str = "\n\n<information>{passages}</information>\n\n"
    """The whole observation; the passages are joined, then stripped of white space at both ends."""


SEARCH_R1 = Layout()


class Action(NamedTuple):
    kind: Literal["search", "answer"]
    content: str
    """Stripped."""


def build_prompt(
    question: str, instruction: str, system: str | None, chat: bool, own: list[dict[str, str]] | str | None = None
) -> list[dict[str, str]] | str:
    """The prompt of one question: chat messages, or one text when `chat` is false (a model without a chat template).

    A row's `own` prompt (Search-R1's rows bring chat messages) takes the place of the instruction. `system` stands first, unless
    the row has a system message of its own.
    """
    user = own or instruction.replace("{question}", question.strip())
    messages = [{"role": "user", "content": user}] if isinstance(user, str) else user
    if system is not None and all(message["role"] != "system" for message in messages):
        messages = [{"role": "system", "content": system}, *messages]
    return messages if chat else "\n\n".join(message["content"] for message in messages)


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


def passages_text(contents: Sequence[str], layout: Layout = SEARCH_R1) -> str:
    """The passages one after the other, tags and all; by default ``Doc 1(Title: "T") text``, a line each."""
    return "".join(_passage_text(number, text, layout) for number, text in enumerate(contents, 1))


def _passage_text(number: int, contents: str, layout: Layout) -> str:
    title, text = split_contents(contents)
    values = {"number": str(number), "title": title, "text": text}
    return _PLACEHOLDER.sub(lambda match: values[match[1]], layout.passage)  # in one go: a passage may hold "{text}" itself


def neutralise_tags(text: str) -> str:
    """Write tags inside passages with other brackets, so that a corpus cannot speak as the model."""
    return _ANY_TAG.sub(r"[\1\2]", text)


def observation(contents: Sequence[str], layout: Layout = SEARCH_R1) -> str:
    """What is appended to the transcript after a search; `contents` best first, empty if nothing was found."""
    before, _, after = layout.whole.partition("{passages}")
    return before + neutralise_tags(passages_text(contents, layout)).strip() + after


def layout_problems(layout: Layout) -> list[str]:
    """What is wrong with a layout, in words; empty when it can be used."""
    found: list[str] = []
    if unknown := set(_PLACEHOLDER.findall(layout.passage)) - {"number", "title", "text"}:
        found.append(f"the passage template knows {{number}}, {{title}} and {{text}}, not {{{sorted(unknown)[0]}}}")
    if "{text}" not in layout.passage:
        found.append("the passage template has no {text}: the model would not see the passages")
    if _ANY_TAG.search(layout.passage):
        found.append("the passage template holds a tag of the protocol: put it into the observation template")
    if _PLACEHOLDER.findall(layout.whole) != ["passages"]:
        found.append("the observation template needs {passages} once and no other placeholder")
    if re.search(r"</?(search|answer|think)>", layout.whole):
        found.append("the observation template holds a tag that only the model may write")
    before, _, after = layout.whole.partition("{passages}")
    if _OPEN_BEFORE.search(before) or _OPEN_AFTER.search(after):
        found.append("{passages} stands inside angle brackets in the observation template: a passage could complete a tag there")
    return found


def shown_passages(observed: str, layout: Layout = SEARCH_R1) -> list[tuple[str, str]]:
    """(title line, text) of each passage in an observation, as far as it was shown: the inverse of `observation`.

    A text that itself has a line which begins like a passage is taken apart there; a title that was cut off is left out. A
    layout that marks no beginning has one passage without a title.
    """
    before, after = (part.strip() for part in layout.whole.split("{passages}"))
    inside = observed.strip()
    if not (inside.startswith(before) and inside.endswith(after)):
        return []
    inside = inside[len(before) : len(inside) - len(after)].strip()
    head, _, tail = layout.passage.partition("{text}")
    if not head.strip():
        return [("", inside)] if inside else []
    pieces = _beginning(head).split(inside)
    return [(title, text.strip().removesuffix(tail.strip())) for title, text in zip(pieces[1::2], pieces[2::2], strict=True)]


@functools.cache
def _beginning(head: str) -> re.Pattern[str]:
    """What stands before each passage's text; its only group is the title."""
    pieces = {"{number}": r"\d+", "{title}": r"(\".*?\"|.*?)"}
    pattern = "".join(pieces.get(piece, re.escape(piece)) for piece in re.split(r"(\{number\}|\{title\})", head.rstrip()))
    title = "" if "{title}" in head else "()"
    return re.compile(rf"^{pattern}{title}" + (r"(?: |$)" if head != head.rstrip() else ""), re.MULTILINE)
