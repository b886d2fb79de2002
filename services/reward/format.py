"""Whether an episode keeps the format, read from the model's own spans only: what was retrieved can neither break nor mend it.

Every model span must be one turn and nothing else but white space around its parts:

    [<think> text </think>]  <search> text </search>     all spans but the last
    [<think> text </think>]  <answer> text </answer>     the last span

The text inside a block holds no tag of the protocol, so tags are balanced and nothing is nested. Tags are matched exactly:
lower case, without spaces or attributes. A turn that was cut off, or answered by a notice, is not one of these.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.contract.transcript import TAGS

_TEXT = rf"(?:(?!</?(?:{'|'.join(TAGS)})>).)*"
_TURN = re.compile(rf"\s*(?P<think><think>{_TEXT}</think>\s*)?<(?P<action>search|answer)>{_TEXT}</(?P=action)>\s*", re.DOTALL)


def keeps_format(model_spans: Sequence[str], require_think: bool = False) -> bool:
    """Whether all spans but the last are search turns and the last is an answer turn; False when there is none."""
    actions = [turn_action(text, require_think) for text in model_spans]
    return bool(actions) and actions == ["search"] * (len(actions) - 1) + ["answer"]


def turn_action(text: str, require_think: bool = False) -> str | None:
    """Which action the text is, when it is exactly one turn; else None."""
    turn = _TURN.fullmatch(text)
    if turn is None or (require_think and turn["think"] is None):
        return None
    return turn["action"]
