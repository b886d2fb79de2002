"""One episode as a person looks at it, from either place that keeps it.

| place                            | what it has                                                                          |
|----------------------------------|--------------------------------------------------------------------------------------|
| Redis, until the trainer releases | everything: tokens, log-probs, versions of every span, passages' ids, timings        |
| the trainer's transcripts, after | texts, reward and its parts, which versions wrote it; the rest is listed in `missing` |
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from services.contract.messages import PassageRef, Span, SpanKind, Trajectory, VersionSpan

NOT_IN_TRANSCRIPTS = [
    "tokens and log-probs",
    "the policy version of each span",
    "queries as they were sent, passages' ids and scores",
    "timings",
    "the attempt",
]


class Logprobs(msgspec.Struct, frozen=True):
    """Of the model's tokens of a span or an episode, in nats."""

    tokens: int
    mean: float
    lowest: float

    @property
    def perplexity(self) -> float:
        return math.exp(-self.mean)


class Turn(msgspec.Struct, frozen=True):
    """One span: what the model wrote, or what it was shown. None: not kept."""

    kind: SpanKind
    text: str
    tokens: int | None = None
    versions: list[VersionSpan] | None = None
    logprobs: Logprobs | None = None
    query: str | None = None
    passages: list[PassageRef] | None = None
    latency_s: float | None = None


class Token(msgspec.Struct, frozen=True):
    """A token of the response; an observed one has neither log-prob nor version."""

    place: int
    id: int
    kind: SpanKind
    logprob: float | None
    version: int | None
    text: str | None
    """None where the tokenizer is not at hand."""


class Episode(msgspec.Struct, frozen=True):
    id: str
    place: str
    """Where it was found."""
    kept: Literal["whole", "transcript"]
    question: str
    source: str
    golden_answers: list[str]
    answer: str | None
    reward: float | None
    parts: dict[str, float]
    stop_reason: str
    turns: list[Turn]
    versions: list[int]
    """That wrote any of it."""
    worker: str
    searches: int
    """That the retriever answered."""
    status: str | None = None
    attempt: int | None = None
    temperature: float | None = None
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    logprobs: Logprobs | None = None
    timings: dict[str, float] = {}
    missing: list[str] = []
    tokens: list[Token] = []
    """Only when asked for."""


class TranscriptTurn(msgspec.Struct, frozen=True):
    kind: SpanKind
    text: str


class TranscriptRow(msgspec.Struct, frozen=True):
    """A line of `<run folder>/transcripts/*.jsonl` or `<run folder>/evaluations/*.jsonl`."""

    id: str
    source: str = ""
    question: str = ""
    golden_answers: list[str] = []
    answer: str | None = None
    reward: float | None = None
    parts: dict[str, float] = {}
    stop_reason: str = ""
    worker: str = ""
    versions: list[int] = []
    response: list[TranscriptTurn] = []


def from_trajectory(trajectory: Trajectory, place: str) -> Episode:
    own = [logprob for logprob, mine in zip(trajectory.logprobs, trajectory.loss_mask, strict=True) if mine]
    return Episode(
        id=trajectory.id,
        place=place,
        kept="whole",
        question=trajectory.question,
        source=trajectory.source,
        golden_answers=trajectory.golden_answers,
        answer=trajectory.answer,
        reward=trajectory.reward,
        parts=trajectory.reward_parts,
        stop_reason=trajectory.stop_reason,
        turns=[_turn(trajectory, span) for span in trajectory.spans],
        versions=sorted({v.version for span in trajectory.spans for v in span.versions}),
        worker=trajectory.worker,
        searches=trajectory.searches,
        status=trajectory.status,
        attempt=trajectory.attempt,
        temperature=trajectory.temperature,
        prompt_tokens=len(trajectory.prompt_ids),
        response_tokens=len(trajectory.response_ids),
        logprobs=summary(own),
        timings=trajectory.timings,
    )


def _turn(trajectory: Trajectory, span: Span) -> Turn:
    observed = span.kind == "observation"
    return Turn(
        kind=span.kind,
        text=span.text,
        tokens=span.end - span.start,
        versions=span.versions,
        logprobs=None if observed else summary(trajectory.logprobs[span.start : span.end]),
        query=span.query,
        passages=span.passages,
        latency_s=span.latency_s,
    )


def from_transcript(row: TranscriptRow, place: str) -> Episode:
    return Episode(
        id=row.id,
        place=place,
        kept="transcript",
        question=row.question,
        source=row.source,
        golden_answers=row.golden_answers,
        answer=row.answer,
        reward=row.reward,
        parts=row.parts,
        stop_reason=row.stop_reason,
        turns=[Turn(turn.kind, turn.text) for turn in row.response],
        versions=row.versions,
        worker=row.worker,
        searches=int(row.parts.get("searches", 0)),
        missing=NOT_IN_TRANSCRIPTS,
    )


def summary(logprobs: list[float]) -> Logprobs | None:
    """None of no tokens."""
    if not logprobs:
        return None
    return Logprobs(len(logprobs), sum(logprobs) / len(logprobs), min(logprobs))


def tokens_of(trajectory: Trajectory, texts: list[str] | None) -> list[Token]:
    """Every token of the response; `texts` are theirs, one each."""
    versions = {i: v.version for span in trajectory.spans for v in span.versions for i in range(v.start, v.end)}
    kinds: list[SpanKind] = [span.kind for span in trajectory.spans for _ in range(span.start, span.end)]
    return [
        Token(
            place=i,
            id=token,
            kind=kinds[i],
            logprob=trajectory.logprobs[i] if kinds[i] == "model" else None,
            version=versions.get(i),
            text=texts[i] if texts else None,
        )
        for i, token in enumerate(trajectory.response_ids)
    ]
