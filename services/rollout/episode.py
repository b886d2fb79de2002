"""One search episode, top to bottom: generate a turn; search, answer or be told; again.

Token in, token out: each turn is sampled from the prompt's ids and all response ids so far, and the ids that come back are
kept as they are. What is observed is tokenized on its own and appended.

| stop_reason | status    | the episode ended because                                                         |
|-------------|-----------|-----------------------------------------------------------------------------------|
| answered    | completed | a turn held a whole answer block                                                  |
| no_answer   | completed | the turns ran out: max_searches + 2, of which the last can only answer            |
| length      | truncated | a turn reached max_turn_tokens, or the response max_response_tokens               |
| context     | truncated | prompt and response fill the model's context                                      |
| aborted     | aborted   | the engine broke the turn off; for the worker to play again, not to train on      |

A failing engine or retriever raises `InfrastructureError` and leaves no trajectory.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from services.contract import transcript
from services.contract.codec import Codec
from services.contract.messages import PromptGroup, Sampling, Span, Status, Trajectory, VersionSpan
from services.rollout.engine import Generation
from services.rollout.retrieval import Passages
from services.rollout.tokens import fit_observation

Generate = Callable[[list[int], Sampling, int], Awaitable[Generation]]
"""(input ids, sampling, max_new_tokens) -> one turn."""
Retrieve = Callable[[str, int], Awaitable[Passages | None]]
"""(query, topk) -> passages, or None for a query that cannot be used."""

NOTHING_FOUND = Passages([], [])
STATUS: dict[str, Status] = {
    "answered": "completed",
    "no_answer": "completed",
    "length": "truncated",
    "context": "truncated",
    "aborted": "aborted",
}


class Player(NamedTuple):
    """What an episode is played with."""

    generate: Generate
    retrieve: Retrieve
    codec: Codec
    context: int
    """Tokens of prompt and response together."""


@dataclasses.dataclass
class Episode:
    """The response so far. Spans are added in order, so they tile it by construction."""

    prompt_ids: list[int]
    sampling: Sampling
    context: int
    response_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    spans: list[Span] = dataclasses.field(default_factory=list)
    searches: int = 0
    answer: str | None = None
    generate_s: float = 0.0
    retrieve_s: float = 0.0

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return min(self.sampling.max_response_tokens, self.context - len(self.prompt_ids)) - len(self.response_ids)

    @property
    def room_ends_by(self) -> str:
        """Which limit is met first as the response grows."""
        return "length" if self.sampling.max_response_tokens <= self.context - len(self.prompt_ids) else "context"

    def add_turn(self, turn: Generation, text: str, seconds: float) -> None:
        start = len(self.response_ids)
        self.response_ids += turn.ids
        self.logprobs += turn.logprobs
        versions = [VersionSpan(v.version, start + v.start, start + v.end) for v in turn.versions]
        if turn.ids:
            self.spans.append(Span("model", start, start + len(turn.ids), text, versions, latency_s=seconds))

    def add_observation(self, ids: list[int], text: str, query: str | None = None, passages: Passages = NOTHING_FOUND) -> None:
        start = len(self.response_ids)
        self.response_ids += ids
        self.logprobs += [0.0] * len(ids)
        end, latency_s = start + len(ids), passages.latency_s
        self.spans.append(Span("observation", start, end, text, query=query, passages=passages.refs, latency_s=latency_s))


async def play_episode(group: PromptGroup, sample: int, prompt_ids: list[int], player: Player) -> Trajectory:
    """Play one sample of `group` to its end. `prompt_ids` must leave room in the context (see `tokens.prompt_ids`)."""
    started = time.monotonic()
    episode = Episode(prompt_ids, group.sampling, player.context)
    stop_reason = await _play(episode, player)
    return Trajectory(
        id=f"{group.group_id}/{sample}",
        group_id=group.group_id,
        prompt_ids=prompt_ids,
        response_ids=episode.response_ids,
        logprobs=episode.logprobs,
        spans=episode.spans,
        status=STATUS[stop_reason],
        stop_reason=stop_reason,
        temperature=group.sampling.temperature,
        prompt_text=player.codec.decode(prompt_ids),
        question=group.question,
        source=group.source,
        golden_answers=group.golden_answers,
        answer=episode.answer,
        timings={
            "generate_s": episode.generate_s,
            "retrieve_s": episode.retrieve_s,
            "total_s": time.monotonic() - started,
        },
        attempt=group.attempt,
    )


async def _play(episode: Episode, player: Player) -> str:
    """Turn by turn; returns the stop reason."""
    last_turn = episode.sampling.max_searches + 1
    for turn in range(last_turn + 1):
        if episode.room <= 0:
            return episode.room_ends_by
        text, finish = await _generate_turn(episode, player)
        if finish == "abort":
            return "aborted"
        action = transcript.parse_action(text)  # before looking at `finish`: the last token that was allowed may close the block
        if action and action.kind == "answer":
            episode.answer = action.content
            return "answered"
        if action is None and finish == "length":
            return "length" if episode.room > 0 else episode.room_ends_by
        if turn == last_turn:
            break
        if not await _respond(episode, action, player):
            return episode.room_ends_by
    return "no_answer"


async def _generate_turn(episode: Episode, player: Player) -> tuple[str, str]:
    """Sample one turn within the budgets. Returns its text and how it finished."""
    started = time.monotonic()
    limit = min(episode.sampling.max_turn_tokens, episode.room)
    turn = await player.generate(episode.prompt_ids + episode.response_ids, episode.sampling, limit)
    seconds = time.monotonic() - started
    text = player.codec.decode(turn.ids)
    episode.add_turn(turn, text, seconds)
    episode.generate_s += seconds
    return text, turn.finish


async def _respond(episode: Episode, action: transcript.Action | None, player: Player) -> bool:
    """Append what the model gets to see after a turn without an answer. False: it does not fit any more."""
    if action is None:
        return _tell(episode, transcript.NOTICE, player)
    if episode.searches >= episode.sampling.max_searches:
        return _tell(episode, transcript.ANSWER_ONLY_NOTICE, player)
    return await _search(episode, action.content, player)


def _tell(episode: Episode, notice: str, player: Player) -> bool:
    ids = player.codec.encode(notice)
    if len(ids) > episode.room:
        return False
    episode.add_observation(ids, player.codec.decode(ids))
    return True


async def _search(episode: Episode, query: str, player: Player) -> bool:
    """Append the passages. A blank query, or one the retriever cannot use, finds nothing and is no answered search."""
    found = await player.retrieve(query, episode.sampling.topk) if query else None
    passages = found or NOTHING_FOUND
    limit = min(episode.sampling.max_observation_tokens, episode.room)
    ids, shown = fit_observation(passages.contents, player.codec.encode, limit)
    if len(ids) > episode.room:
        return False
    visible = Passages(passages.contents[:shown], passages.refs[:shown], passages.latency_s)
    episode.add_observation(ids, player.codec.decode(ids), query if found else None, visible)
    episode.searches += found is not None
    episode.retrieve_s += passages.latency_s
    return True
