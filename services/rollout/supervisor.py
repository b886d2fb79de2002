"""Starts the engine, watches it, starts it again when it is gone; between that, lets the policy watcher look at the board.

One loop does all of it, so a restart, a health check and a weight swap never overlap. The engine counts as gone when its
process has ended, when `health_failures` checks in a row failed, or when a weight swap failed half-way.

| the engine           | own                                       | attached                                                      |
|----------------------|-------------------------------------------|---------------------------------------------------------------|
| is gone              | started again after a pause that grows    | attached again as soon as it answers                          |
| answers no check     | ended, then as above                      | as above                                                      |
| has another version  | cannot be                                 | counts as gone; brought to the current version when attached  |
| starts or is attached| with the current version, once it verifies | the same                                                     |
"""

from __future__ import annotations

import asyncio
import logging
import time

from services.contract.config import EngineConfig
from services.rollout.engine import Engine
from services.rollout.failures import EngineError
from services.rollout.policy_watcher import PolicyWatcher

logger = logging.getLogger("engine")

POLL_S = 0.25
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
LASTED_S = 120.0
"""An engine that served for so long starts again without a growing pause."""


class Supervisor:
    def __init__(self, engine: Engine, watcher: PolicyWatcher, config: EngineConfig) -> None:
        self.engine, self.watcher, self.config = engine, watcher, config
        self._probe: asyncio.Task[bool] | None = None
        self._failures = 0
        self._checked = 0.0

    async def run(self) -> None:
        """Until cancelled. Raises RedisAway."""
        pause_s = FIRST_PAUSE_S
        while True:
            started = time.monotonic()
            try:
                await self._serve()
            except EngineError as error:
                if time.monotonic() - started > LASTED_S:
                    pause_s = FIRST_PAUSE_S
                logger.error("engine lost, starting it again in %.0f s: %s", pause_s, error)
            await self._end_probe()
            await self.engine.stop()
            await self.watcher.lost()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _serve(self) -> None:
        """Start the engine and keep it at the current policy; raises EngineError when it must be started anew."""
        path, version = await self.watcher.starting_policy()
        await self.engine.start(str(path), version)
        self._failures, self._checked = 0, time.monotonic()
        await self.watcher.serves(version)
        while True:
            self._check_health()
            await self.watcher.follow()
            await asyncio.sleep(POLL_S)

    def _check_health(self) -> None:
        """A dead process shows at once. A silent engine is asked for a token in the background; a busy one need not be asked."""
        if not self.engine.running:
            raise EngineError(f"it does not run any more. {self.engine.post_mortem()}")
        if self._probe and self._probe.done():
            self._count(self._probe.result())
            self._probe = None
        silent_since = max(self.engine.last_answer, self._checked)
        if self._probe is None and time.monotonic() - silent_since > self.config.health_interval_s:
            self._probe = asyncio.create_task(self.engine.health(self.config.health_timeout_s))

    def _count(self, healthy: bool) -> None:
        self._checked = time.monotonic()
        self._failures = 0 if healthy else self._failures + 1
        if self._failures:
            logger.warning("engine failed health check %d of %d", self._failures, self.config.health_failures)
        if self._failures >= self.config.health_failures:
            raise EngineError(f"the server failed {self._failures} health checks in a row. {self.engine.post_mortem()}")

    async def _end_probe(self) -> None:
        if self._probe:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
            self._probe = None
