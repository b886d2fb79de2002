"""Text to token ids and back, for the parts of an episode that are not sampled: prompts and observations.

Observations are tokenized on their own, without special tokens; nothing that was sampled is ever tokenized again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.contract import transcript
from services.contract.codec import Codec
from services.contract.messages import PromptGroup


def prompt_ids(group: PromptGroup, codec: Codec, context: int) -> list[int]:
    """The group's prompt as ids. Raises ValueError when it leaves no room for a response."""
    ids = codec.prompt(group.prompt)
    if len(ids) >= context:
        found = f"the prompt of {group.example_id} has {len(ids)} tokens"
        raise ValueError(f"{found}, prompt and response together may have {context}: raise model.max_context")
    return ids


def fit_observation(contents: Sequence[str], encode: Callable[[str], list[int]], limit: int) -> tuple[list[int], int]:
    """Ids of the longest observation within `limit` tokens, and how many passages it shows; the closing tag is always there.

    Whole passages are left out from the worst up; if the best one alone is too long, its last words are. An observation is
    never shorter than the empty one, whatever the limit.
    """
    for shown in range(len(contents), 0, -1):
        ids = encode(transcript.observation(contents[:shown]))
        if len(ids) <= limit:
            return ids, shown
    words = contents[0].split(" ") if contents else []
    low, high, best = 0, len(words), encode(transcript.observation([]))  # `low` words fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        ids = encode(transcript.observation([" ".join(words[:middle])]))
        low, high, best = (middle, high, ids) if len(ids) <= limit else (low, middle, best)
    return best, int(low > 0)
