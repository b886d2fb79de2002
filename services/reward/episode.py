"""An episode as a reward sees it: the texts, who wrote them, and what the built-in rules make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from services.contract.messages import Status, Trajectory
from services.contract.transcript import Layout, last_answer, shown_passages


class Passage(NamedTuple):
    title: str
    """Without the quotes that a corpus in Search-R1's form puts around it."""
    text: str


@dataclass(frozen=True)
class Episode:
    """What `reward.function` is called with. Nothing in it can be changed."""

    id: str
    """`{group}/{sample}`."""
    source: str
    """The kind of question."""
    question: str
    golden_answers: tuple[str, ...]
    turns: tuple[str, ...]
    """What the model wrote, turn by turn, tags included."""
    passages: tuple[Passage, ...]
    """What it was shown, search by search, best first, as far as it was shown."""
    answer: str | None
    """The last answer block that lies inside one turn, stripped; None if there is none."""
    searches: int
    """Searches that the retriever answered."""
    status: Status
    stop_reason: str
    """Why it ended: answered, no_answer, invalid_limit, length, context, deadline."""
    reward: float = 0.0
    """What the built-in rules give."""
    parts: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """exact_match, sub_match, f1, format, retrieval and answered from 0 to 1; searches as a count."""


def episode_of(trajectory: Trajectory, layout: Layout) -> Episode:
    """Without `reward` and `parts`, which `grade` fills in."""
    turns = tuple(span.text for span in trajectory.spans if span.kind == "model")
    observed = [span.text for span in trajectory.spans if span.kind == "observation" and span.query is not None]
    return Episode(
        id=trajectory.id,
        source=trajectory.source,
        question=trajectory.question,
        golden_answers=tuple(trajectory.golden_answers),
        turns=turns,
        passages=tuple(Passage(title.strip('"'), text) for shown in observed for title, text in shown_passages(shown, layout)),
        answer=last_answer(turns),
        searches=trajectory.searches,
        status=trajectory.status,
        stop_reason=trajectory.stop_reason,
    )
