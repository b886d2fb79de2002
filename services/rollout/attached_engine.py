"""An engine that runs elsewhere. The worker neither starts nor ends it; it checks it and brings it to the current policy.

Several workers may be attached to one engine. They update it one at a time (the table in `services/contract/policy.py`): the
first to hold it does the work, the others wait and find the version there. A worker that died in the middle of a pause, or a
load that failed, leaves a note; whoever holds the engine next pauses, loads and resumes, so no engine stays frozen while a
worker is attached to it, and none serves half of two policies.

An engine that was started anew under the same URL, or that somebody else gave other weights, answers with a version below the
one that this worker brought it to. Such an answer is refused and the engine counts as gone until it has been attached again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

from services.contract.config import Config
from services.contract.messages import Sampling
from services.contract.policy import PolicyBoard
from services.contract.telemetry import format_seconds
from services.rollout.engine import Engine, EngineGone
from services.rollout.engine_process import RESERVED, usable_context
from services.rollout.failures import EngineError, EngineStartError
from services.rollout.generation import ForeignVersion, Generation
from services.rollout.tasks import RunInThread, to_the_end

logger = logging.getLogger("engine")

PROBE_S = 0.5


class AttachedEngine(Engine):
    def __init__(self, config: Config, url: str, board: PolicyBoard, worker: str, run: RunInThread) -> None:
        self._url = url.rstrip("/")
        super().__init__(config.rollout, f"{worker}@{self._url.partition('://')[2]}")
        self._context = usable_context(config)
        self.board, self.worker, self._run = board, worker, run
        self.url = self._url
        self._trouble = ""
        """Why this engine must be attached anew."""

    @property
    def running(self) -> bool:
        return self._session is not None and not self._trouble

    async def start(self, model: str, version: int) -> None:
        """Wait until it answers, bring it to `version`, see that it samples. Raises EngineStartError."""
        started = time.monotonic()
        self._trouble = ""
        self._open()
        try:
            await self._answers(started + self.config.engine.start_timeout_s)
            await self._fits()
            await self.update(model, version)
            if not await self.health(self.config.engine.health_timeout_s):
                raise EngineStartError(f"{self.url} answers but does not sample a token: look into that engine's own log")
        except BaseException:
            await self.stop()
            raise
        seconds = time.monotonic() - started
        logger.info("engine attached in %s: %s, policy version %d", format_seconds(seconds), self.url, self.version)

    async def _answers(self, deadline: float) -> None:
        while True:
            try:
                await self.reported_version()
                return
            except EngineError as error:
                if time.monotonic() > deadline:
                    raise EngineStartError(f"no engine: {error}. Is rollout.engine.urls right, and is it running?") from error
            await asyncio.sleep(PROBE_S)

    async def _fits(self) -> None:
        """The engine must hold a whole episode, and prompt and response of `model.max_context` tokens are never cut."""
        info = await self._ask("/server_info")
        limits = [limit for key in ("context_length", "max_total_num_tokens") if (limit := info.get(key))]
        room = min(limits, default=self._context + RESERVED) - RESERVED
        if room < self._context:
            more = "start it with a larger --context-length or --max-total-tokens, or lower model.max_context"
            raise EngineStartError(f"{self.url} holds {room} tokens, an episode may have {self._context}: {more}")

    def post_mortem(self) -> str:
        return f"{self.url} runs elsewhere: {self._trouble or 'see its own log'}"

    async def stop(self) -> None:
        """Let go of it; the engine itself goes on."""
        self.version = -1
        await self._close()

    async def generate(self, input_ids: list[int], sampling: Sampling, max_new_tokens: int) -> Generation:
        oldest = self.version
        try:
            turn = await super().generate(input_ids, sampling, max_new_tokens)
        except (EngineGone, ForeignVersion) as error:
            self._trouble = str(error)
            raise
        if self.config.engine.router is None and turn.versions and (found := min(v.version for v in turn.versions)) < oldest:
            self._trouble = f"it answered with version {found} after version {oldest}: it was started anew or changed by another"
            raise EngineGone(f"{self.url} is not the engine it was: {self._trouble}")
        return turn

    async def health(self, timeout_s: float) -> bool:
        """Whether it samples a token in time and is still the engine that this worker brought to its version."""
        if not await super().health(timeout_s):
            return False
        with contextlib.suppress(EngineError):
            reported = await self.reported_version()
            if self.version >= 0 and (not reported.isdigit() or int(reported) < self.version):
                self._trouble = (
                    f"it reports version {reported} instead of {self.version}: it was started anew or changed by another"
                )
                return False
        return True

    # -- updates, one worker at a time ---------------------------------------------------------------------------------

    async def update(self, model: str, version: int) -> None:
        """As `Engine.update`; nothing is done when another worker has done it, or has gone on to the current policy: what this
        one decided on may be old by the time it holds the engine. Not broken off by a shutdown."""
        async with self.alone():
            await to_the_end(self._update_held(model, version))

    async def _update_held(self, model: str, version: int) -> None:
        current = await self._run(self.board.current)
        for done in {version, current.version if current else version}:
            if await self.has_served(done):
                self.version = done
                return
        # Nothing drains from a paused engine; its requests are broken off and played again.
        left_paused = await self._run(self.board.may_be_paused, self.url)
        mode = "abort" if left_paused and self.config.update_mode == "drain" else self.config.update_mode
        await self._update(model, version, mode)

    async def has_served(self, version: int) -> bool:
        paused = await self._run(self.board.may_be_paused, self.url)
        return not paused and await self.reported_version() == str(version)

    async def pause(self) -> None:
        await self._run(self.board.note_pause, self.url, self.worker)
        await super().pause()

    async def resume(self) -> None:
        await super().resume()
        await self._run(self.board.note_resume, self.url)

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Hold the engine, waiting for whoever holds it now: that one finishes, or dies and its hold runs out."""
        seconds = self.config.engine.pause_lease_s
        while not await self._run(self.board.hold, self.url, self.worker, seconds):
            await asyncio.sleep(min(PROBE_S, seconds / 4))
        renewing = asyncio.create_task(self._renew(seconds))
        try:
            yield
        finally:
            renewing.cancel()
            await to_the_end(self._run(self.board.let_go, self.url, self.worker))

    async def _renew(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds / 3)
            await self._run(self.board.hold, self.url, self.worker, seconds)
