"""One turn as the engine sampled it: SGLang's reply to /generate read strictly, and the parameters sent to it.

An answer in which ids, log-probs and versions do not fit together is refused (`EngineError`), never repaired.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from services.contract.messages import Sampling, VersionSpan
from services.contract.transcript import STOPS
from services.rollout.failures import EngineError

Finish = Literal["stop", "length", "abort"]


class Generation(msgspec.Struct, frozen=True):
    """One turn as sampled. Offsets in `versions` count from the turn's first token; they tile it."""

    ids: list[int]
    logprobs: list[float]
    finish: Finish
    versions: list[VersionSpan]


class ForeignVersion(EngineError):
    """The engine names its policy otherwise than by a number of ours: somebody else started it or gave it weights."""


class _VersionEntry(msgspec.Struct):
    version: str
    start: int
    end: int


class _FinishReason(msgspec.Struct):
    type: Finish
    message: str | None = None


class _Meta(msgspec.Struct):
    finish_reason: _FinishReason
    output_token_logprobs: list[tuple[float, int, Any]]
    weight_version: str
    weight_versions: list[_VersionEntry] | None = None


class _Answer(msgspec.Struct):
    meta_info: _Meta
    output_ids: list[int]


class _AbortedMeta(msgspec.Struct):
    finish_reason: _FinishReason


class _AbortedAnswer(msgspec.Struct):
    meta_info: _AbortedMeta


_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_aborted = msgspec.json.Decoder(_AbortedAnswer).decode
ABORTED = Generation([], [], "abort", [])
"""What is left of a turn that was broken off: nothing of it is used, and a request that was still queued has no log-probs."""


def read_answer(body: bytes) -> Generation:
    """Turn SGLang's reply to /generate into a Generation. Raises EngineError when its parts do not fit together."""
    if b'"abort"' in body and _is_abort(body):
        return ABORTED
    try:
        answer = _decode_answer(body)
        meta, ids = answer.meta_info, answer.output_ids
    except msgspec.DecodeError as error:
        raise EngineError(f"the engine's answer cannot be read ({error}): {body[:200]!r}") from None
    spans = meta.weight_versions or [_VersionEntry(meta.weight_version, 0, len(ids))]
    versions = [VersionSpan(_number(span.version), span.start, span.end) for span in spans if span.end > span.start]
    if [entry[1] for entry in meta.output_token_logprobs] != ids:
        given = len(meta.output_token_logprobs)
        raise EngineError(f"the engine gave {given} log-probs that do not belong to its {len(ids)} tokens")
    bounds = [0, *(span.end for span in versions)]
    if bounds[-1] != len(ids) or [span.start for span in versions] != bounds[:-1]:
        raise EngineError(f"the engine's version report {versions} does not cover its {len(ids)} tokens")
    return Generation(ids, [entry[0] for entry in meta.output_token_logprobs], meta.finish_reason.type, versions)


def _number(version: str) -> int:
    try:
        return int(version)
    except ValueError:
        raise ForeignVersion(
            f"the engine says that policy version {version!r} wrote a turn, which is no version of this run"
        ) from None


def _is_abort(body: bytes) -> bool:
    try:
        return _decode_aborted(body).meta_info.finish_reason.type == "abort"
    except msgspec.DecodeError:
        return False


def sampling_params(sampling: Sampling, max_new_tokens: int) -> dict[str, object]:
    """Everything that shapes the distribution is said outright, so that no default of the model's files can creep in."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_new_tokens": max_new_tokens,
        "stop": STOPS,
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }
