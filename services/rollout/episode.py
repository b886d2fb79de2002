"""One search episode, top to bottom: generate a turn; search, answer or be told; again.

Token in, token out: each turn is sampled from the prompt's ids and all response ids so far, and the ids that come back are
kept as they are, also those that run on behind a closing tag. What is observed is tokenized on its own and appended.

| stop_reason    | the episode ended because                                                     | status    | trained on |
|----------------|-------------------------------------------------------------------------------|-----------|------------|
| answered       | a turn held a whole answer block                                              | completed | yes        |
| no_answer      | the turns ran out: `max_searches` that may search, one that can only answer   | completed | yes        |
| invalid_limit  | `max_invalid_actions` turns held no usable action                             | completed | yes        |
| length         | a turn reached max_turn_tokens, or the response max_response_tokens           | truncated | yes        |
| context        | prompt and response fill the model's context                                  | truncated | yes        |
| deadline       | the engine, which was not slow, spent `episode_deadline_s` on what was written | truncated | yes       |
| aborted        | the engine broke a turn off; the worker plays the sample again                | aborted   | never      |
| infrastructure | engine or retriever failed, or the engine was slow (failures.py): raised as   | not       | never      |
|                | `InfrastructureError`, and the worker plays the sample again                  | stored    |            |

The policy may change during an episode: it goes on, and its tokens carry the versions that the engine reported.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from services.contract import transcript
from services.contract.codec import Codec
from services.contract.messages import PromptGroup, Sampling, Status, Trajectory
from services.rollout.engine import Generation
from services.rollout.failures import EngineError
from services.rollout.response import NOTHING_FOUND, Response
from services.rollout.retrieval import Passages
from services.rollout.tokens import fit_observation

Generate = Callable[[list[int], Sampling, int], Awaitable[Generation]]
"""(input ids, sampling, max_new_tokens) -> one turn."""
Retrieve = Callable[[str, int], Awaitable[Passages | None]]
"""(query, topk) -> passages, or None for a query that cannot be used."""

STATUS: dict[str, Status] = {
    "answered": "completed",
    "no_answer": "completed",
    "invalid_limit": "completed",
    "length": "truncated",
    "context": "truncated",
    "deadline": "truncated",
    "aborted": "aborted",
}


class Player(NamedTuple):
    """What an episode is played with."""

    generate: Generate
    retrieve: Retrieve
    codec: Codec
    context: int
    """Tokens of prompt and response together."""


async def play_episode(group: PromptGroup, sample: int, prompt_ids: list[int], player: Player) -> Trajectory:
    """Play one sample of `group` to its end. `prompt_ids` must leave room in the context (see `tokens.prompt_ids`).

    Raises InfrastructureError when a part of the suite fails, ValueError when the group itself cannot be played.
    """
    started = time.monotonic()
    response = Response(prompt_ids, group.sampling, player.context, group.issued_version)
    stop_reason = await _play(response, player)
    return Trajectory(
        id=f"{group.group_id}/{sample}",
        group_id=group.group_id,
        prompt_ids=prompt_ids,
        response_ids=response.response_ids,
        logprobs=response.logprobs,
        spans=response.spans,
        status=STATUS[stop_reason],
        stop_reason=stop_reason,
        temperature=group.sampling.temperature,
        prompt_text=player.codec.decode(prompt_ids),
        question=group.question,
        source=group.source,
        golden_answers=group.golden_answers,
        answer=response.answer,
        timings={
            "generate_s": response.generate_s,
            "retrieve_s": response.retrieve_s,
            "total_s": time.monotonic() - started,
        },
        attempt=group.attempt,
    )


async def _play(response: Response, player: Player) -> str:
    """Turn by turn; returns the stop reason."""
    for searches_left in range(response.sampling.max_searches, -1, -1):  # this turn's included; at 0 only an answer counts
        if response.room <= 0:
            return response.filled_by
        if _is_late(response):
            return "deadline"
        text, finish = await _generate_turn(response, player)
        if finish == "abort":
            return "aborted"
        action = transcript.parse_action(text)  # before looking at `finish`: the last token that was allowed may close the block
        if action and action.kind == "answer":
            response.answer = action.content
            return "answered"
        if action is None and finish == "length":
            return "length" if response.room > 0 else response.filled_by
        response.invalid_actions += action is None
        if response.sampling.max_invalid_actions and response.invalid_actions >= response.sampling.max_invalid_actions:
            return "invalid_limit"
        if searches_left and not await _respond(response, action, searches_left, player):
            return response.filled_by
    return "no_answer"


def _is_late(response: Response) -> bool:
    """Whether the engine has spent the time for one episode, by the model's doing. Raises EngineError when by the engine's.

    Looked at between turns: a turn is bounded by its tokens, and by `request_timeout_s` if the engine hangs. Time spent on
    searches does not count, it is the retriever's. In doubt the engine is blamed: what it slowed down is played again.
    """
    sampling, seconds = response.sampling, response.generate_s
    if not sampling.episode_deadline_s or seconds < sampling.episode_deadline_s:
        return False
    if response.sampled < seconds * sampling.slow_engine_tokens_per_s:
        raise EngineError(f"the engine is slow: it sampled {response.sampled} tokens of an episode in {seconds:.0f} s")
    return True


async def _generate_turn(response: Response, player: Player) -> tuple[str, str]:
    """Sample one turn within the budgets. Returns its text and how it finished."""
    started = time.monotonic()
    limit = min(response.sampling.max_turn_tokens, response.room)
    turn = await player.generate(response.ids, response.sampling, limit)
    text = player.codec.decode(turn.ids)
    response.add_turn(turn, text, time.monotonic() - started)
    return text, turn.finish


async def _respond(response: Response, action: transcript.Action | None, searches_left: int, player: Player) -> bool:
    """Append what the model gets to see after a turn without an answer. False: it does not fit any more."""
    if action is None:
        return _tell(response, transcript.NOTICE if searches_left > 1 else transcript.ANSWER_ONLY_NOTICE, player)
    return await _search(response, action.content, player)


def _tell(response: Response, notice: str, player: Player) -> bool:
    ids = player.codec.encode(notice)
    if len(ids) > response.room:
        return False
    response.add_observation(ids, player.codec.decode(ids))
    return True


async def _search(response: Response, query: str, player: Player) -> bool:
    """Append the passages. A blank query, or one the retriever cannot use, finds nothing and is no answered search."""
    found = await player.retrieve(query, response.sampling.topk) if query else None
    passages = found or NOTHING_FOUND
    limit = min(response.sampling.max_observation_tokens, response.room)
    ids, shown = fit_observation(passages.contents, response.sampling.layout, player.codec.encode, limit)
    if len(ids) > response.room:
        return False
    visible = Passages(passages.contents[:shown], passages.refs[:shown], passages.latency_s)
    response.add_observation(ids, player.codec.decode(ids), query if found else None, visible)
    return True
