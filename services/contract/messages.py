"""What travels between the services: a question's group, a trajectory and its spans.

Bodies are msgpack of these structs; nothing is ever unpickled. Invariants are checked when a struct is made or decoded:

* spans tile ``response_ids`` with no gap, and kinds are only ``model`` and ``observation``;
* ``len(logprobs) == len(response_ids)``, all finite; observed tokens carry log-prob 0;
* every model token carries the policy version that the engine reported for it;
* the loss mask is derived from the spans and stored nowhere.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import msgspec

from services.contract.transcript import Layout

Purpose = Literal["train", "eval"]
Status = Literal["completed", "truncated", "aborted", "failed"]
SpanKind = Literal["model", "observation"]


class InvalidMessage(ValueError):
    """A message breaks one of the invariants above."""


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the episodes of a group are played: `[rollout]` as it was when the group was fed. Lengths in tokens, times in seconds."""

    temperature: float
    top_p: float
    max_turn_tokens: int
    max_response_tokens: int
    max_observation_tokens: int
    max_searches: int
    """Turns that may search; one more, in which only an answer counts, follows them."""
    topk: int
    max_invalid_actions: int = 0
    """The episode ends with so many; 0: only with its turns."""
    episode_deadline_s: float = 0.0
    """Time the engine may spend on one episode; 0: no limit."""
    slow_engine_tokens_per_s: float = 0.0
    """Below this rate an episode that is late was played by a slow engine."""
    layout: Layout = Layout()


class Question(msgspec.Struct, frozen=True, omit_defaults=True):
    """One row of a question file. `source` names the kind of question, `id` is unique within it."""

    id: str
    source: str
    question: str
    golden_answers: list[str]
    prompt: list[dict[str, str]] | str | None = None
    """Used instead of `data.instruction`, as chat messages (Search-R1's rows have it so) or as the user's text."""

    def __post_init__(self) -> None:
        if isinstance(self.prompt, list) and not all({"role", "content"} <= message.keys() for message in self.prompt):
            raise InvalidMessage(f"{self.example_id}: a message of its prompt has no role or no content")

    @property
    def example_id(self) -> str:
        return f"{self.source}:{self.id}"


class PromptGroup(msgspec.Struct, frozen=True):
    """One question to be sampled `samples` times: the unit that is fed, leased and trained on."""

    group_id: str
    purpose: Purpose
    example_id: str
    source: str
    question: str
    golden_answers: list[str]
    prompt: list[dict[str, str]] | str
    """Chat messages, rendered with the model's template, or plain text."""
    samples: int
    sampling: Sampling
    issued_version: int
    deadline_s: float
    """Seconds that one attempt may take, from the moment a worker takes the group. Waiting in the stream costs nothing."""
    attempt: int = 1

    def trajectory_ids(self) -> list[str]:
        return [f"{self.group_id}/{sample}" for sample in range(self.samples)]


class VersionSpan(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [start, end) of the response came from policy `version`."""

    version: int
    start: int
    end: int


class PassageRef(msgspec.Struct, frozen=True, array_like=True):
    """A passage shown in an observation; its text stands there. "" and 0 where the retriever tells no id or score."""

    id: str
    score: float


class Span(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens [start, end) of the response, written by the model or observed from the retriever."""

    kind: SpanKind
    start: int
    end: int
    text: str
    versions: list[VersionSpan] = []
    """Model spans: which policy wrote which tokens, tiling [start, end)."""
    query: str | None = None
    passages: list[PassageRef] = []
    latency_s: float = 0.0


class Trajectory(msgspec.Struct, omit_defaults=True):
    """One finished episode. `response_ids` are the very tokens sampled and observed; they are never made from text again."""

    id: str
    group_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    spans: list[Span]
    status: Status
    stop_reason: str
    """answered, no_answer, invalid_limit, length, context, deadline, aborted (see services/rollout/episode.py); or late: the
    sample of a group that was released without it (see services/rollout/worker.py)."""
    temperature: float
    prompt_text: str = ""
    """`prompt_ids` as text, special tokens included."""
    question: str = ""
    source: str = ""
    """The kind of question, as in its group."""
    golden_answers: list[str] = []
    """The group's, carried along: its body is deleted once all samples are stored, before the grader needs them."""
    answer: str | None = None
    reward: float | None = None
    """None until graded. In Redis it stands beside the body (`Reward`)."""
    reward_parts: dict[str, float] = {}
    timings: dict[str, float] = {}
    worker: str = ""
    engine: str = ""
    attempt: int = 1

    def __post_init__(self) -> None:
        check_trajectory(self)

    @property
    def loss_mask(self) -> list[int]:
        """1 where the model wrote the token; as long as `response_ids`."""
        return [int(span.kind == "model") for span in self.spans for _ in range(span.start, span.end)]

    @property
    def lowest_version(self) -> int:
        """Of any model token; -1 if the model wrote none."""
        return min((v.version for span in self.spans for v in span.versions), default=-1)

    @property
    def searches(self) -> int:
        """Searches that the retriever answered."""
        return sum(span.kind == "observation" and span.query is not None for span in self.spans)


def check_trajectory(trajectory: Trajectory) -> None:
    """Raise InvalidMessage when an invariant of the module's docstring does not hold."""
    length = len(trajectory.response_ids)
    if len(trajectory.logprobs) != length:
        raise InvalidMessage(f"{trajectory.id}: {len(trajectory.logprobs)} log-probs for {length} response tokens")
    if not _tiles([(span.start, span.end) for span in trajectory.spans], 0, length):
        raise InvalidMessage(f"{trajectory.id}: spans do not tile the {length} response tokens")
    if not all(map(math.isfinite, trajectory.logprobs)):
        raise InvalidMessage(f"{trajectory.id}: a log-prob is not a finite number")
    for span in trajectory.spans:
        if span.kind not in get_args(SpanKind):
            raise InvalidMessage(f"{trajectory.id}: a span of kind {span.kind!r}")
        if span.kind == "model":
            if not _tiles([(v.start, v.end) for v in span.versions], span.start, span.end):
                raise InvalidMessage(f"{trajectory.id}: versions do not tile the model tokens [{span.start}, {span.end})")
        elif span.versions or any(trajectory.logprobs[span.start : span.end]):
            raise InvalidMessage(f"{trajectory.id}: an observation carries versions or log-probs")


def _tiles(ranges: list[tuple[int, int]], start: int, end: int) -> bool:
    """Whether the ranges, none empty, cover [start, end) in order without gap or overlap."""
    for low, high in ranges:
        if low != start or high <= low:
            return False
        start = high
    return start == end


class Reward(msgspec.Struct, frozen=True, array_like=True):
    """What a trajectory earned, kept beside its body, which is written once and never changed."""

    total: float
    parts: dict[str, float]


class GradedNotice(msgspec.Struct, frozen=True):
    """An entry of the `graded` stream."""

    trajectory_id: str
    group_id: str
    reward: float


class DeadLetter(msgspec.Struct, frozen=True):
    """A group that was given up: why, and after how many attempts."""

    group_id: str
    purpose: Purpose | None
    """None when a grader gave the group up: a trajectory does not say what it was played for."""
    reason: str
    attempts: int
    """Of the rollout to play the group, or of the graders to grade one trajectory of it."""


class Segment(msgspec.Struct, frozen=True):
    """A piece of a demonstration's response, tokenized on its own, as an episode would have made it."""

    kind: SpanKind
    text: str


class Demonstration(msgspec.Struct, frozen=True):
    """A worked example for the warm start: the prompt's question and the response as segments."""

    example_id: str
    question: str
    segments: list[Segment]


encode = msgspec.msgpack.Encoder().encode
decode_group = msgspec.msgpack.Decoder(PromptGroup).decode
decode_trajectory = msgspec.msgpack.Decoder(Trajectory).decode
decode_reward = msgspec.msgpack.Decoder(Reward).decode
decode_dead = msgspec.msgpack.Decoder(DeadLetter).decode


def read_trajectory(body: bytes, reward: bytes | None) -> Trajectory:
    """A stored body with the reward that is kept beside it, if it has one. Raises msgspec.DecodeError or InvalidMessage."""
    trajectory = decode_trajectory(body)
    if reward is not None:
        earned = decode_reward(reward)
        trajectory.reward, trajectory.reward_parts = earned.total, earned.parts
    return trajectory
