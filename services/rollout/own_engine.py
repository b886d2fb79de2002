"""An engine that this worker starts, watches and ends: a child process that cannot outlive it."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from services.contract.config import Config
from services.contract.telemetry import format_seconds
from services.rollout.engine import Engine
from services.rollout.engine_process import EngineProcess
from services.rollout.failures import EngineStartError

logger = logging.getLogger("engine")

START_PROBE_S = 0.5


class OwnEngine(Engine):
    def __init__(self, config: Config, log: Path, name: str = "engine") -> None:
        super().__init__(config.rollout, name)
        self.run_config, self._log = config, log
        self._process: EngineProcess | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.exit_code() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self, model: str, version: int) -> None:
        """Start the server with `model` as `version`; returns once it has answered a generation. Raises EngineStartError."""
        started = time.monotonic()
        self._process = EngineProcess.spawn(self.run_config, model, version, self._log)
        self.url = self._process.url
        self._open()
        try:
            await self._answers_first(started + self.config.engine.start_timeout_s)
        except BaseException:
            await self.stop()
            raise
        self.version = version
        seconds, gibibytes = time.monotonic() - started, self._process.memory_bytes() / 2**30
        logger.info("engine ready in %s: %s, policy version %d, %.1f GiB", format_seconds(seconds), self.url, version, gibibytes)

    async def _answers_first(self, deadline: float) -> None:
        assert self._process
        while not await self.health(timeout_s=max(deadline - time.monotonic(), 1.0)):
            if (code := self._process.exit_code()) is not None:
                raise EngineStartError(f"SGLang ended with code {code} while starting. {self.post_mortem()}")
            if time.monotonic() > deadline:
                patience = format_seconds(self.config.engine.start_timeout_s)
                raise EngineStartError(
                    f"SGLang has not answered within {patience} (rollout.engine.start_timeout_s). {self.post_mortem()}"
                )
            await asyncio.sleep(START_PROBE_S)

    def post_mortem(self) -> str:
        """How it ended, if it has, and the end of the server's log."""
        code = self._process.exit_code() if self._process else None
        ending = "" if code is None else f"The server process ended with code {code}. "
        return f"{ending}The end of its log ({self._log}):\n{self._process.tail() if self._process else ''}"

    async def stop(self) -> None:
        """End the server and everything it started."""
        process, self._process = self._process, None
        self.url, self.version = "", -1
        if process:
            await asyncio.to_thread(process.stop)
        await self._close()
