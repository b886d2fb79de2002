"""Keeps the engine at the current policy version. Episodes go on meanwhile: their later tokens carry the new version.

| state   | what it means here                              | what moves it on                                              |
|---------|-------------------------------------------------|---------------------------------------------------------------|
| loading | no engine that serves                           | `serves`, called once the engine has answered a generation    |
| ready   | the engine serves `version`, the current one    | a newer current version                                       |
| paused  | the engine is swapping weights                  | the engine reports the new version and has resumed            |
| stale   | the current version cannot be used; the former  | a retry that succeeds; until then no new group is taken       |
|         | one keeps serving the episodes in flight        |                                                               |

A published version is verified (every digest) before the engine is paused. If the load itself fails, the engine may hold half
of each policy: it is stopped rather than resumed and `supervisor.py` starts it anew; the turns it had are played again then.
A pause of an own engine cannot outlive the worker, because the engine cannot; for an attached one see `attached_engine.py`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from services.contract import weights
from services.contract.config import Config
from services.contract.policy import EngineReport, EngineState, PolicyBoard, PolicyVersion
from services.rollout.engine import Engine, EngineLoad
from services.rollout.failures import EngineError
from services.rollout.tasks import RunInThread

logger = logging.getLogger("policy")

FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 30.0
VERIFIED_KEPT = 3


class VersionFiles:
    """The folders of published versions as this worker sees them, each verified once however many engines load it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._verified: dict[int, tuple[Path, int]] = {}
        self._one_at_a_time = asyncio.Lock()

    def local(self, policy: PolicyVersion) -> Path:
        """The trainer may see the volume, or the starting model, at another path than this worker does."""
        published = weights.version_folder(self.config.weights_folder, policy.version)
        path = Path(policy.path)
        if path.name == published.name:
            return published
        return path if path.is_dir() or policy.version > 0 else self.config.model_path

    async def verify(self, policy: PolicyVersion) -> Path:
        """Its folder here, every digest checked, once for each manifest. Raises WeightsError, OSError."""
        path = self.local(policy)
        if path.parent != self.config.weights_folder:
            if not path.is_dir():
                raise weights.WeightsError(f"{path} is not a folder that this worker sees: mount it, or set model.path")
            return path
        async with self._one_at_a_time:
            stamp = (path, _modified(path / weights.MANIFEST))
            if self._verified.get(policy.version) != stamp:
                manifest = await asyncio.to_thread(weights.verify, path)
                if manifest.version != policy.version:
                    raise weights.WeightsError(f"{path} calls itself version {manifest.version}, the board says {policy.version}")
                kept = sorted(self._verified)[-VERIFIED_KEPT:]
                self._verified = {version: self._verified[version] for version in kept} | {policy.version: stamp}
        return path


class PolicyWatcher:
    """What this worker's engine serves and has verified, and the moves that change it."""

    def __init__(self, files: VersionFiles, board: PolicyBoard, engine: Engine, worker: str, run: RunInThread) -> None:
        self.files, self.board, self.engine, self.worker, self._run = files, board, engine, worker, run
        self.config = files.config
        self.state: EngineState = "loading"
        self.version = -1
        self.staged = -1
        self.wanted = -1
        """The version that is current, as last seen on the board."""
        self._target = -1
        """A version whose files are being read."""
        self._retry_s, self._retry_at = FIRST_RETRY_S, 0.0
        self.changes = 0
        """How often the state has changed: who sees the same number twice knows that nothing happened between."""
        self.on_change: Callable[[], None] = lambda: None
        self._load: tuple[int, int, EngineLoad] = (0, 0, EngineLoad(0, 0, 0.0))
        self._reporting, self._left = threading.Lock(), False

    @property
    def caught_up(self) -> bool:
        """Whether new groups may be taken."""
        return self.state == "ready" and self.version == self.wanted

    async def starting_policy(self) -> tuple[Path, int]:
        """What a starting engine is to load: the current version once it verifies, or the configured model as version 0."""
        while True:
            current = await self._run(self.board.current)
            if current is None:
                return self.config.model_path, 0
            self.wanted = current.version
            if path := await self._verify(current):
                return path, current.version
            await asyncio.sleep(max(self._retry_at - time.monotonic(), 0))

    async def serves(self, version: int) -> None:
        """The engine has started with `version` and answers."""
        self.version = version
        self.staged, self.wanted = max(self.staged, version), max(self.wanted, version)
        await self._become("ready")

    async def lost(self) -> None:
        """There is no engine any more."""
        self.version, self._target = -1, -1
        await self._become("loading")

    async def follow(self) -> None:
        """One look at the board, and what follows from it. Raises EngineError when a verified version could not be loaded."""
        current, staged = await self._run(self.board.current), await self._run(self.board.staged)
        if staged and staged.version != self.staged and await self._verify(staged):
            self.staged = staged.version
            await self.report()
        if current:
            self.wanted = current.version
        if current is None or current.version == self.version:
            if self.state != "ready":
                await self._become("ready")
        elif path := await self._verify(current):
            await self._swap(path, current.version)
        elif self.state != "stale":
            await self._become("stale")

    async def _swap(self, path: Path, version: int) -> None:
        started = time.monotonic()
        self._target = version
        await self._become("paused")
        try:
            await self.engine.update(str(path), version)
        except EngineError:
            await self.engine.stop()
            raise
        finally:
            self._target = -1
        former, self.version = self.version, version
        self.staged = version
        await self._become("ready")
        logger.info("policy version %d loaded after %d in %.1f s", version, former, time.monotonic() - started)

    async def _verify(self, policy: PolicyVersion) -> Path | None:
        """Its folder here, if it can be loaded. After a failure the next attempt waits, and until then the answer is None."""
        if time.monotonic() < self._retry_at:
            return None
        self._target = policy.version
        await self.report()  # from here on the trainer must not delete it
        try:
            path = await self.files.verify(policy)
        except (weights.WeightsError, OSError) as error:
            self._retry_at = time.monotonic() + self._retry_s
            logger.error("policy version %d cannot be used, trying again in %.0f s: %s", policy.version, self._retry_s, error)
            self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)
            return None
        finally:
            self._target = -1
        self._retry_s = FIRST_RETRY_S
        return path

    async def _become(self, state: EngineState) -> None:
        self.state = state
        self.changes += 1
        self.on_change()
        await self.report()

    def note_load(self, in_flight: int, limit: int, load: EngineLoad | None) -> None:
        """For the next report: this worker's episodes on the engine, its window, and what the engine says."""
        self._load = (in_flight, limit, load or EngineLoad(0, 0, 0.0))

    async def report(self) -> None:
        """This engine's line in the registry; also its sign of life."""
        await self._run(self._report_now)

    def _report_now(self) -> None:
        """In a thread. One at a time and with what is true now, so that an older report never overwrites a newer one."""
        with self._reporting:
            if not self._left:
                self.board.report(self._snapshot())

    def _snapshot(self) -> EngineReport:
        in_flight, limit, load = self._load
        return EngineReport(
            engine_id=self.engine.name,
            url=self.engine.url,
            state=self.state,
            version=self.version,
            staged=self.staged,
            reading=sorted({self.version, self._target} - {-1}),
            tensor_parallel=self.config.rollout.engine.tensor_parallel,
            worker=self.worker,
            in_flight=in_flight,
            limit=limit,
            running=load.running,
            queued=load.queued,
            kv_use=load.kv_use,
        )

    async def leave(self) -> None:
        """Take the engine off the registry, for good."""
        await self._run(self._leave_now)

    def _leave_now(self) -> None:
        with self._reporting:
            self._left = True
            self.board.remove(self.engine.name)

    def describe(self) -> str:
        """The state in words, for the heartbeat; a health check fails while it begins with "starting"."""
        if self.state == "loading":
            return "starting: the engine does not answer yet"
        behind = f", behind version {self.wanted}" if self.version != self.wanted else ""
        return f"ready: policy version {self.version}{behind}"


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return -1
