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

With `weights.transport = "collective"` versions are pushed (`receiver.py`), and the current one need not be on the volume. An
engine that starts then loads the newest version that is; it is `stale` until the trainer, who sees that, has written the current
one there, or until the next push.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from services.contract import weights
from services.contract.policy import EngineReport, EngineState, PolicyBoard, PolicyVersion
from services.contract.push import Push
from services.rollout.engine import Engine, EngineLoad
from services.rollout.failures import EngineError
from services.rollout.receiver import Receiver
from services.rollout.tasks import RunInThread, to_the_end
from services.rollout.version_files import VersionFiles

logger = logging.getLogger("policy")

FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 30.0


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
        self._trouble = ""
        """Why the last version that was looked at cannot be used."""
        self.changes = 0
        """How often the state has changed: who sees the same number twice knows that nothing happened between."""
        self.on_change: Callable[[], None] = lambda: None
        self._receiver = Receiver(files.config, board, engine, run)
        self._receiver.report, self._receiver.pausing = self.report, self._pausing
        self._load: tuple[int, int, EngineLoad] = (0, 0, EngineLoad(0, 0, 0.0))
        self._reporting, self._left = threading.Lock(), False

    @property
    def caught_up(self) -> bool:
        """Whether new groups may be taken."""
        return self.state == "ready" and self.version == self.wanted

    async def starting_policy(self) -> tuple[Path, int]:
        """What a starting engine is to load: the current version once it verifies, or the configured model as version 0.

        The trainer does not delete it until `serves` or `lost` is called: starting takes a while, and it may publish meanwhile.
        """
        while True:
            current = await self._run(self.board.current)
            if current is None:
                return self.config.model_path, 0
            self.wanted = current.version
            usable = self.files.newest(current.version) if self.files.is_absent(current) else current
            if path := await self._verify(usable):
                self._target = usable.version
                await self.report()
                return path, usable.version
            await asyncio.sleep(max(self._retry_at - time.monotonic(), 0))

    async def serves(self, version: int) -> None:
        """The engine has started with `version` and answers."""
        self.version, self._target = version, -1
        self.staged, self.wanted = max(self.staged, version), max(self.wanted, version)
        await self._become("ready")

    async def lost(self) -> None:
        """There is no engine any more."""
        self.version, self._target = -1, -1
        self._receiver.forget()
        await self._become("loading")

    async def follow(self) -> None:
        """One look at the board, and what follows from it. Raises EngineError when a verified version could not be loaded."""
        if self.config.weights.transport == "collective" and (push := await self._push()):
            await self._take_part(push)
            return
        current, staged = await self._run(self.board.current), await self._run(self.board.staged)
        if staged and staged.version != self.staged and not self.files.is_absent(staged) and await self._verify(staged):
            self.staged = staged.version
            await self.report()
        if current:
            self.wanted = current.version
        if current is None or current.version == self.version:
            if self.state != "ready":
                await self._become("ready")
        elif path := await self._available(current):
            await self._swap(path, current.version)
        elif self.state != "stale":
            await self._become("stale")

    async def _available(self, current: PolicyVersion) -> Path | None:
        """Its folder, for `_swap`: the engine will not open it if another worker has brought it to `current` by a push."""
        if self.files.is_absent(current):
            return self.files.local(current) if await self.engine.has_served(current.version) else None
        return await self._verify(current)

    async def _push(self) -> Push | None:
        """The push under way, if this engine is to take part in it and has not refused."""
        push = await self._run(self.board.pushes.alive)
        ours = push and self.engine.name in push.group.ranks and push.version > self.version
        return push if ours and push.version != self._receiver.refused else None

    async def _take_part(self, push: Push) -> None:
        """Until the push is over. Raises EngineError when the engine could not be brought back to a whole version."""
        try:
            async with self.engine.alone():
                await to_the_end(self._receive(push))
        except EngineError:
            await self.engine.stop()
            raise

    async def _receive(self, push: Push) -> None:
        outcome = await self._receiver.take_part(push)
        if outcome == "committed":
            self.version = self.staged = self.wanted = push.version
        elif outcome == "torn":
            await self._go_back()
        if outcome != "unpaused":
            await self.engine.resume()
            self.engine.version = self.version
            await self._become("ready")
            logger.info("policy version %d serves after a push of %d", self.version, push.version)

    async def _pausing(self) -> None:
        await self._become("paused")

    async def _go_back(self) -> None:
        """Load the newest whole version of the volume into the paused engine; none that never became current."""
        await self._receiver.leave()
        with contextlib.suppress(EngineError):
            await self.engine.control("/end_weight_update", {})
        current = await self._run(self.board.current)
        newest = self.files.newest(current.version if current else 0)
        path = await self._verify(newest)
        if path is None:
            raise EngineError(f"a push failed and version {newest.version} on the volume cannot be used")
        self._target = newest.version
        try:
            await self.engine.load(str(path), newest.version)
        finally:
            self._target = -1
        self.version = newest.version

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
            path = None
            self._trouble = f"version {policy.version}: {error}"
            self._retry_at = time.monotonic() + self._retry_s
            logger.error("policy version %d cannot be used, trying again in %.0f s: %s", policy.version, self._retry_s, error)
            self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)
        finally:
            self._target = -1
        if path is None:
            await self.report()
        else:
            self._retry_s, self._trouble = FIRST_RETRY_S, ""
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
            staged=max(self.staged, self._receiver.received),
            reading=sorted({self.version, self._target} - {-1}),
            tensor_parallel=self.config.rollout.engine.tensor_parallel,
            worker=self.worker,
            in_flight=in_flight,
            limit=limit,
            running=load.running,
            queued=load.queued,
            kv_use=load.kv_use,
            group=self._receiver.group,
            following=self._receiver.following,
            receiving=self._receiver.receiving,
            refused=self._receiver.refused,
            trouble=self._trouble,
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
