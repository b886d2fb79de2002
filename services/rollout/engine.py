"""The SGLang engine as the worker sees it: start, generate, swap the policy, stop.

Token ids go in and the sampled ids come back, each with the log-prob and the policy version that the engine itself reports.
An answer in which ids, log-probs and versions do not fit together is refused (`EngineError`), never repaired.

Log-probs are those of the temperature-scaled distribution, log softmax(logits / temperature), before top-p (SGLang's default;
SGLANG_RETURN_ORIGINAL_LOGPROB must stay unset): a trainer divides its logits by the temperature before it compares.
Temperature 0 is greedy; its log-probs are those of temperature 1.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from pathlib import Path
from typing import Any, Literal

import aiohttp
import msgspec

from services.contract.config import Config
from services.contract.messages import Sampling, VersionSpan
from services.contract.telemetry import format_seconds
from services.contract.transcript import STOPS
from services.rollout.engine_process import EngineProcess
from services.rollout.failures import EngineError, EngineStartError

logger = logging.getLogger("engine")

CONTROL_TIMEOUT_S = 300
"""For pause, load and resume: loading reads a whole model from the volume."""
START_PROBE_S = 0.5
REFUSED = 400
HARMLESS_TOKEN = 1
"""Any id of the vocabulary does for a health check."""

Finish = Literal["stop", "length", "abort"]


class Generation(msgspec.Struct, frozen=True):
    """One turn as sampled. Offsets in `versions` count from the turn's first token; they tile it."""

    ids: list[int]
    logprobs: list[float]
    finish: Finish
    versions: list[VersionSpan]


class EngineRefused(ValueError):
    """The engine says that the request itself is wrong; asking again would end alike."""


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


_decode_answer = msgspec.json.Decoder(_Answer).decode
_encode = msgspec.json.Encoder().encode


def read_answer(body: bytes) -> Generation:
    """Turn SGLang's reply to /generate into a Generation. Raises EngineError when its parts do not fit together."""
    try:
        answer = _decode_answer(body)
        meta, ids = answer.meta_info, answer.output_ids
        spans = meta.weight_versions or [_VersionEntry(meta.weight_version, 0, len(ids))]
        versions = [VersionSpan(int(span.version), span.start, span.end) for span in spans if span.end > span.start]
    except (msgspec.DecodeError, ValueError) as error:
        raise EngineError(f"the engine's answer cannot be read ({error}): {body[:200]!r}") from None
    if [entry[1] for entry in meta.output_token_logprobs] != ids:
        given = len(meta.output_token_logprobs)
        raise EngineError(f"the engine gave {given} log-probs that do not belong to its {len(ids)} tokens")
    bounds = [0, *(span.end for span in versions)]
    if bounds[-1] != len(ids) or [span.start for span in versions] != bounds[:-1]:
        raise EngineError(f"the engine's version report {versions} does not cover its {len(ids)} tokens")
    return Generation(ids, [entry[0] for entry in meta.output_token_logprobs], meta.finish_reason.type, versions)


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


class Engine:
    """One SGLang server. `start` and `stop` may be repeated; everything else needs a started engine."""

    def __init__(self, config: Config, log: Path) -> None:
        self.config, self._log = config, log
        self._process: EngineProcess | None = None
        self._session: aiohttp.ClientSession | None = None
        self.last_answer = 0.0
        """time.monotonic() of the last answered generation: a busy engine needs no health check."""

    @property
    def url(self) -> str:
        return self._process.url if self._process else ""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.exit_code() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self, model: str, version: int) -> None:
        """Start the server with `model` as `version`; returns once it has answered a generation. Raises EngineStartError."""
        started = time.monotonic()
        self._process = EngineProcess.spawn(self.config, model, version, self._log)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=self.config.rollout.request_timeout_s, sock_connect=10),
        )
        try:
            await self._answers_first(started + self.config.rollout.engine.start_timeout_s)
        except BaseException:
            await self.stop()
            raise
        seconds, gibibytes = time.monotonic() - started, self._process.memory_bytes() / 2**30
        logger.info("engine ready in %s: %s, policy version %d, %.1f GiB", format_seconds(seconds), self.url, version, gibibytes)

    async def _answers_first(self, deadline: float) -> None:
        assert self._process
        while not await self.health(timeout_s=max(deadline - time.monotonic(), 1.0)):
            if (code := self._process.exit_code()) is not None:
                raise EngineStartError(f"SGLang ended with code {code} while starting. {self.post_mortem()}")
            if time.monotonic() > deadline:
                patience = format_seconds(self.config.rollout.engine.start_timeout_s)
                raise EngineStartError(
                    f"SGLang has not answered within {patience} (rollout.engine.start_timeout_s). {self.post_mortem()}"
                )
            await asyncio.sleep(START_PROBE_S)

    def post_mortem(self) -> str:
        """The end of the server's log."""
        return f"The end of its log ({self._log}):\n{self._process.tail() if self._process else ''}"

    async def stop(self) -> None:
        """End the server and everything it started."""
        session, self._session = self._session, None
        process, self._process = self._process, None
        if process:
            await asyncio.to_thread(process.stop)
        if session:
            await session.close()

    async def generate(self, input_ids: list[int], sampling: Sampling, max_new_tokens: int) -> Generation:
        """Sample one turn. Raises EngineError when the engine fails, EngineRefused when it calls the request wrong."""
        body = {
            "rid": uuid.uuid4().hex,
            "input_ids": input_ids,
            "sampling_params": sampling_params(sampling, max_new_tokens),
            "return_logprob": True,
        }
        generation = read_answer(await self._post("/generate", body))
        if len(generation.ids) > max_new_tokens or (not generation.ids and generation.finish != "abort"):
            raise EngineError(f"the engine sampled {len(generation.ids)} tokens where 1 to {max_new_tokens} were asked for")
        self.last_answer = time.monotonic()
        return generation

    async def health(self, timeout_s: float) -> bool:
        """Whether the engine samples a token in time. False while it is paused: ask only an engine that should be serving."""
        params = {"max_new_tokens": 1, "temperature": 0.0}
        try:
            await self._post("/generate", {"input_ids": [HARMLESS_TOKEN], "sampling_params": params}, timeout_s)
        except (EngineError, EngineRefused):
            return False
        self.last_answer = time.monotonic()
        return True

    async def pause(self) -> None:
        """Stop decoding; running requests go back to the engine's queue and lose their KV, so none of it outlives its policy."""
        await self._post("/pause_generation", {"mode": "retract"}, CONTROL_TIMEOUT_S)

    async def load(self, model: str, version: int) -> None:
        """Load `model` as `version` into the paused engine, and see that the engine reports it. Raises EngineError."""
        body = {"model_path": model, "weight_version": str(version), "flush_cache": True}
        answer = msgspec.json.decode(await self._post("/update_weights_from_disk", body, CONTROL_TIMEOUT_S))
        if not answer.get("success"):
            raise EngineError(f"the engine did not load {model}: {answer.get('message')}")
        if (reported := await self.reported_version()) != str(version):
            raise EngineError(f"the engine reports version {reported} after loading version {version} from {model}")

    async def resume(self) -> None:
        await self._post("/continue_generation", {}, CONTROL_TIMEOUT_S)

    async def reported_version(self) -> str:
        """The version that the engine says it serves."""
        return str(msgspec.json.decode(await self._request("GET", "/model_info", None, 30)).get("weight_version"))

    async def _post(self, path: str, body: dict[str, Any], timeout_s: float | None = None) -> bytes:
        return await self._request("POST", path, _encode(body), timeout_s)

    async def _request(self, method: str, path: str, body: bytes | None, timeout_s: float | None) -> bytes:
        if self._session is None or self._process is None:
            raise EngineError("the engine is not running")
        timeout = aiohttp.ClientTimeout(total=timeout_s or self.config.rollout.request_timeout_s, sock_connect=10)
        url, headers = self._process.url + path, {"Content-Type": "application/json"}
        try:
            async with self._session.request(method, url, data=body, headers=headers, timeout=timeout) as response:
                text = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError, RuntimeError) as error:
            raise EngineError(f"{url} failed: {type(error).__name__} {error}".rstrip()) from error
        if response.status == REFUSED and path == "/generate":
            raise EngineRefused(f"the engine refused the request: {text[:500].decode(errors='replace')}")
        if response.status != 200:
            raise EngineError(f"{url} answered {response.status}: {text[:500].decode(errors='replace')}")
        return text
