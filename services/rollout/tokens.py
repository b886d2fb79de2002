"""Text to token ids and back, for the parts of an episode that are not sampled: prompts and observations.

Observations are tokenized on their own, without special tokens; nothing that was sampled is ever tokenized again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.contract.codec import Codec
from services.contract.messages import PromptGroup
from services.contract.transcript import Layout, observation

LONGEST_WORD = 40
"""Characters. A passage is cut between words where it has any; a script without spaces is cut where it must be."""

Encode = Callable[[str], list[int]]


def prompt_ids(group: PromptGroup, codec: Codec, context: int) -> list[int]:
    """The group's prompt as ids. Raises ValueError when the group cannot be played: no room for a response, or for a passage."""
    ids = codec.prompt(group.prompt)
    if len(ids) >= context:
        found = f"the prompt of {group.example_id} has {len(ids)} tokens"
        raise ValueError(f"{found}, prompt and response together may have {context}: raise model.max_context")
    empty, limit = len(codec.encode(observation([], group.sampling.layout))), group.sampling.max_observation_tokens
    if empty >= limit:
        found = f"an observation has {empty} tokens before it shows a passage"
        raise ValueError(f"{found}, and may have {limit} in all: raise rollout.max_observation_tokens")
    return ids


def fit_observation(contents: Sequence[str], layout: Layout, encode: Encode, limit: int) -> tuple[list[int], int]:
    """Ids of the longest observation within `limit` tokens, and how many passages it shows; the closing tag is always there.

    Whole passages are left out from the worst up; if the best one alone is too long, its end is. An observation is never shorter
    than the empty one, whatever the limit.
    """
    for shown in range(len(contents), 0, -1):
        ids = encode(observation(contents[:shown], layout))
        if len(ids) <= limit:
            return ids, shown
    best = _beginning(contents[0], lambda text: len(encode(observation([text], layout))) <= limit) if contents else ""
    cut = [best] if best else []
    return encode(observation(cut, layout)), len(cut)


def _beginning(text: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning of `text` that fits, without half a word at its end; "" when none does. All of `text` must not fit."""
    low, high = 0, len(text)  # `low` characters fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(text[:middle]) else (low, middle)
    words = text[: _word_end(text, low)]
    return words if fits(words) else text[:low]  # a shorter text may, rarely, have a token more


def _word_end(text: str, end: int) -> int:
    """The last place up to `end` where a word ends; `end` itself when there is none near."""
    space = max(text.rfind(space, 0, end + 1) for space in " \n\t")
    return space if space > max(0, end - LONGEST_WORD) else end
