"""The response of one episode as it grows, turn by turn: ids, log-probs, spans, and the budgets they count against.

Spans are added in order and never changed, so they tile the response by construction. That a turn fits together in itself is
the engine's client's to check; here it is held against what came before: an engine that went back to an older policy is at fault.
"""

from __future__ import annotations

import dataclasses

from services.contract.messages import Sampling, Span, VersionSpan
from services.rollout.engine import Generation
from services.rollout.failures import EngineError
from services.rollout.retrieval import Passages

NOTHING_FOUND = Passages([], [])


@dataclasses.dataclass
class Response:
    """`prompt_ids` and `response_ids` together are what the next turn is sampled from."""

    prompt_ids: list[int]
    sampling: Sampling
    context: int
    """Tokens that prompt and response may have together."""
    version: int = 0
    """The newest policy seen so far; at first, the one that the group was issued for."""
    response_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    spans: list[Span] = dataclasses.field(default_factory=list)
    sampled: int = 0
    """Tokens that the model wrote."""
    invalid_actions: int = 0
    answer: str | None = None
    generate_s: float = 0.0
    retrieve_s: float = 0.0

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.response_ids

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return min(self.sampling.max_response_tokens, self.context - len(self.prompt_ids)) - len(self.response_ids)

    @property
    def filled_by(self) -> str:
        """The stop reason of a response that cannot grow: which of its two limits is met first."""
        return "length" if self.sampling.max_response_tokens <= self.context - len(self.prompt_ids) else "context"

    def add_turn(self, turn: Generation, text: str, seconds: float) -> None:
        """What the model wrote. Raises EngineError when its policy is older than one that wrote before it."""
        self.version = self._newest_version(turn)
        start = len(self.response_ids)
        self.response_ids += turn.ids
        self.logprobs += turn.logprobs
        self.sampled += len(turn.ids)
        self.generate_s += seconds
        versions = [VersionSpan(v.version, start + v.start, start + v.end) for v in turn.versions]
        if turn.ids:
            self.spans.append(Span("model", start, start + len(turn.ids), text, versions, latency_s=seconds))

    def add_observation(self, ids: list[int], text: str, query: str | None = None, passages: Passages = NOTHING_FOUND) -> None:
        """What the model gets to see. `query` is None for a notice, and for a search that the retriever did not answer."""
        start = len(self.response_ids)
        self.response_ids += ids
        self.logprobs += [0.0] * len(ids)
        self.retrieve_s += passages.latency_s
        end, latency_s = start + len(ids), passages.latency_s
        self.spans.append(Span("observation", start, end, text, query=query, passages=passages.refs, latency_s=latency_s))

    def _newest_version(self, turn: Generation) -> int:
        newest = self.version
        for span in turn.versions:
            if span.version < newest:
                raise EngineError(f"the engine went back from policy version {newest} to {span.version} within an episode")
            newest = span.version
        return newest
