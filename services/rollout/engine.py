"""An SGLang engine over HTTP: generate, swap the policy, tell how loaded it is. `own_engine.py` and `attached_engine.py` say how
one begins and ends.

Token ids go in and the sampled ids come back, each with the log-prob and the policy version that the engine itself reports.
Log-probs are those of the temperature-scaled distribution, log softmax(logits / temperature), before top-p (SGLang's default;
SGLANG_RETURN_ORIGINAL_LOGPROB must stay unset): a trainer divides its logits by the temperature before it compares.
Temperature 0 is greedy; its log-probs are those of temperature 1.

| update_mode | running turns                       | a turn's policy | what it costs         | how                              |
|-------------|-------------------------------------|-----------------|-----------------------|----------------------------------|
| in_place    | go on where they stand, by the new  | one or both     | their KV, built anew  | pause (`retract`), load, resume  |
| abort       | are thrown away and played again    | one             | the tokens they had   | pause, abort all, load, resume   |
| drain       | are finished by the old one first   | one             | slots that stand idle | wait for the last, then as abort |

SGLang has a pause mode of its own called `in_place`. It keeps the running requests' KV, so that new weights would attend to
keys and values of the old ones; and a load that flushes the cache fails under it. `retract` drops that KV and computes it
anew from the tokens, so every token after the swap has the new policy's log-prob on its whole prefix.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec

from services.contract.config import RolloutConfig
from services.contract.messages import Sampling
from services.rollout.failures import EngineError
from services.rollout.generation import Finish, Generation, read_answer, sampling_params

__all__ = ["Engine", "EngineGone", "EngineLoad", "EngineRefused", "EngineUnable", "Finish", "Generation", "read_answer"]

CONTROL_TIMEOUT_S = 300
"""For pause, load and resume: loading reads a whole model from the volume."""
QUESTION_TIMEOUT_S = 30
DRAIN_LOOK_S = 0.05
REFUSED, UNKNOWN_PATH = 400, 404
HARMLESS_TOKEN = 1
"""Any id of the vocabulary does for a health check."""


class EngineRefused(ValueError):
    """The engine says that the request itself is wrong; asking again would end alike."""


class EngineGone(EngineError):
    """Nobody listens there any more, or not the engine that this worker knew."""


class EngineUnable(EngineError):
    """It has no such endpoint: another version of SGLang, or another service."""


class EngineLoad(msgspec.Struct, frozen=True):
    """What the engine has on its hands, of all workers."""

    running: int
    """Requests being decoded."""
    queued: int
    """Requests that wait for room in the KV cache or in the batch."""
    kv_use: float
    """Share of the KV cache that they hold; cached prefixes that nobody uses do not count."""


class _RankLoad(msgspec.Struct):
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    token_usage: float = 0.0


class _Loads(msgspec.Struct):
    loads: list[_RankLoad]


_encode = msgspec.json.Encoder().encode
_decode_loads = msgspec.json.Decoder(_Loads).decode


class Engine:
    """What every engine can do once it has been started; `start` and `stop` are the subclasses'."""

    def __init__(self, config: RolloutConfig, name: str) -> None:
        self.config, self.name = config, name
        self.url = ""
        self.version = -1
        """The policy that this worker brought it to; it may serve that or a later one, never one before."""
        self.last_answer = 0.0
        """time.monotonic() of the last answered generation: a busy engine needs no health check."""
        self._session: aiohttp.ClientSession | None = None
        self._under_way = 0
        """Turns that this worker waits for."""

    # -- its life, in the subclasses -----------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """False once it is known to be gone; an engine that only stays silent still counts as running."""
        raise NotImplementedError

    async def start(self, model: str, version: int) -> None:
        """Returns once the engine has answered a generation with `model` as `version`. Raises EngineError."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Be done with it; may be repeated."""
        raise NotImplementedError

    def post_mortem(self) -> str:
        """What a person should know when it is gone."""
        raise NotImplementedError

    # -- playing -------------------------------------------------------------------------------------------------------

    async def generate(self, input_ids: list[int], sampling: Sampling, max_new_tokens: int) -> Generation:
        """Sample one turn. Raises EngineError when the engine fails, EngineRefused when it calls the request wrong."""
        body = {
            "rid": uuid.uuid4().hex,
            "input_ids": input_ids,
            "sampling_params": sampling_params(sampling, max_new_tokens),
            "return_logprob": True,
        }
        base = self.config.engine.router or self.url
        self._under_way += 1
        try:
            answer = await self._request("POST", base + "/generate", _encode(body))
        finally:
            self._under_way -= 1
        generation = read_answer(answer)
        if generation.finish != "abort" and not 0 < len(generation.ids) <= max_new_tokens:
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

    async def load_figures(self) -> EngineLoad | None:
        """Read from shared memory by SGLang's HTTP process, so it costs the scheduler nothing. None: this engine tells no load."""
        path = self.url + "/v1/loads?include=core"
        try:
            ranks = _decode_loads(await self._request("GET", path, None, QUESTION_TIMEOUT_S)).loads
        except (EngineUnable, msgspec.DecodeError):
            return None
        running, queued = sum(rank.num_running_reqs for rank in ranks), sum(rank.num_waiting_reqs for rank in ranks)
        return EngineLoad(running, queued, max((rank.token_usage for rank in ranks), default=0.0))

    # -- the policy ----------------------------------------------------------------------------------------------------

    async def update(self, model: str, version: int) -> None:
        """Bring the serving engine from one policy to the next, as `update_mode` says. Raises EngineError.

        After an error the engine may hold half of each policy: it must not serve until it has been started anew.
        """
        await self._update(model, version, self.config.update_mode)

    async def _update(self, model: str, version: int, mode: str) -> None:
        await self.pause_as(mode)
        await self.load(model, version)
        await self.resume()
        self.version = version

    async def pause_as(self, mode: str) -> None:
        """Stop it from decoding, with the running turns dealt with as the table says."""
        if mode == "drain":
            await self._drained()
        await self.pause()
        if mode != "in_place":
            await self.abort()

    async def _drained(self) -> None:
        """Wait for the turns that are under way, for as long as one may take. Nobody must send new ones (`Member.serves`)."""
        deadline = time.monotonic() + self.config.request_timeout_s
        while time.monotonic() < deadline:
            load = await self.load_figures()
            if not self._under_way and (load is None or not load.running + load.queued):
                return
            await asyncio.sleep(DRAIN_LOOK_S)

    async def pause(self) -> None:
        """Stop decoding; running requests go back to the engine's queue and lose their KV, so none of it outlives its policy."""
        await self._post("/pause_generation", {"mode": "retract"}, CONTROL_TIMEOUT_S)

    async def abort(self) -> None:
        """Break off every request; those of a paused engine are all in its queue and come back at once."""
        await self._post("/abort_request", {"abort_all": True}, CONTROL_TIMEOUT_S)

    async def load(self, model: str, version: int) -> None:
        """Load `model` as `version` into the paused engine, drop all cached KV, see that it reports it. Raises EngineError.

        Not without a pause: SGLang then waits for its requests too, but counts the last one as running for a moment more,
        refuses to drop the cache and goes on with new weights on old KV.
        """
        body = {"model_path": model, "weight_version": str(version), "flush_cache": True}
        answer = msgspec.json.decode(await self._post("/update_weights_from_disk", body, CONTROL_TIMEOUT_S))
        if not answer.get("success"):
            raise EngineError(f"the engine did not load {model}: {answer.get('message')}")
        if (reported := await self.reported_version()) != str(version):
            raise EngineError(f"the engine reports version {reported} after loading version {version} from {model}")

    async def resume(self) -> None:
        await self._post("/continue_generation", {}, CONTROL_TIMEOUT_S)

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """While nobody else changes its policy."""
        yield

    async def has_served(self, version: int) -> bool:
        """Whether somebody else has brought it to `version`, and it serves."""
        return False

    async def reported_version(self) -> str:
        """The version that the engine says it serves."""
        return str((await self._ask("/model_info")).get("weight_version"))

    # -- HTTP ----------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """A pool of connections without a bound of its own: `EnginePool` bounds the episodes."""
        key = self.config.engine.api_key
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Authorization": f"Bearer {key.get_secret_value()}"} if key else None,
        )

    async def _close(self) -> None:
        session, self._session = self._session, None
        if session:
            await session.close()

    async def _ask(self, path: str) -> dict[str, Any]:
        return msgspec.json.decode(await self._request("GET", self.url + path, None, QUESTION_TIMEOUT_S))

    async def control(self, path: str, body: dict[str, Any], timeout_s: float = CONTROL_TIMEOUT_S) -> dict[str, Any]:
        """One of SGLang's control endpoints. Raises EngineError when it fails or says that it has not succeeded."""
        answer = msgspec.json.decode(await self._post(path, body, timeout_s))
        if not answer.get("success"):
            raise EngineError(f"{path} failed: {answer.get('message')}")
        return answer

    async def _post(self, path: str, body: dict[str, Any], timeout_s: float) -> bytes:
        return await self._request("POST", self.url + path, _encode(body), timeout_s)

    async def _request(self, method: str, url: str, body: bytes | None, timeout_s: float | None = None) -> bytes:
        if self._session is None:
            raise EngineGone("the engine is not running")
        timeout = aiohttp.ClientTimeout(total=timeout_s or self.config.request_timeout_s, sock_connect=10)
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.request(method, url, data=body, headers=headers, timeout=timeout) as response:
                text = await response.read()
        except aiohttp.ClientConnectorError as error:
            raise EngineGone(f"{url} cannot be reached: {error}") from error
        except (aiohttp.ClientError, TimeoutError, OSError, RuntimeError) as error:
            raise EngineError(f"{url} failed: {type(error).__name__} {error}".rstrip()) from error
        if response.status == REFUSED and url.endswith("/generate"):
            raise EngineRefused(f"the engine refused the request: {text[:500].decode(errors='replace')}")
        if response.status == UNKNOWN_PATH:
            raise EngineUnable(f"{url} does not exist: is it an SGLang engine, of version 0.5.23?")
        if response.status != 200:
            raise EngineError(f"{url} answered {response.status}: {text[:500].decode(errors='replace')}")
        return text
