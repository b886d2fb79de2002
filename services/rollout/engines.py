"""The engines of one worker: which one an episode is played on, how many each gets, and what becomes of a turn that fails.

| a turn                                           | what follows                                                               |
|--------------------------------------------------|----------------------------------------------------------------------------|
| comes back                                       | it is the episode's                                                        |
| fails, or is broken off                          | asked for again after a pause, `generation_retries` times, then EngineError |
| … while its engine was swapped, lost or started  | asked for again, at no cost                                                |
| has no engine                                    | waits; moves to another engine of the worker that serves                   |
| is refused as wrong                              | EngineRefused at once: the request is the group's doing                    |

Token ids go in, so any engine can continue any episode: what has been sampled is kept, and only the turn is played again.
How long all this may take is bounded by the group's deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence

from services.contract.config import RolloutConfig
from services.contract.messages import Sampling
from services.rollout.concurrency import Window, next_window
from services.rollout.engine import Engine
from services.rollout.failures import EngineError
from services.rollout.generation import Generation
from services.rollout.policy_watcher import PolicyWatcher

LOOK_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0


class Member:
    """One engine, its policy watcher, and this worker's episodes on it."""

    def __init__(self, engine: Engine, watcher: PolicyWatcher, config: RolloutConfig) -> None:
        self.engine, self.watcher, self.config = engine, watcher, config
        self.in_flight = 0
        self.most = config.concurrency
        self.least = min(config.least_concurrency, config.concurrency)
        self.window = Window(self.least)

    @property
    def name(self) -> str:
        return self.engine.name

    @property
    def serves(self) -> bool:
        """Whether it may be sent a turn. During an update it queues them, unless it is to be drained first; a stale one
        finishes what it has."""
        return self.watcher.state != "loading" and not (self.watcher.state == "paused" and self.config.update_mode == "drain")

    def fit_for(self, version: int) -> bool:
        return self.watcher.state in ("ready", "paused") and self.watcher.version >= version

    async def look(self) -> None:
        """Fit the window to the engine's load. A look that fails says nothing: the supervisor will know."""
        with contextlib.suppress(EngineError):
            load = await self.engine.load_figures()
            self.window = next_window(self.window, load, self.in_flight, self.least, self.most)
            self.watcher.note_load(self.in_flight, self.window.limit, load)


class EnginePool:
    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self._changed = asyncio.Event()
        for member in members:
            member.watcher.on_change = self._changed.set

    @property
    def caught_up(self) -> bool:
        """Whether new groups may be taken. Behind a router any engine may get a turn, so none may be behind."""
        behind_a_router = self.members[0].config.engine.router is not None
        return (all if behind_a_router else any)(member.watcher.caught_up for member in self.members)

    @property
    def room(self) -> int:
        """Episodes that the engines which have caught up may play together."""
        return sum(member.window.limit for member in self.members if member.watcher.caught_up)

    @property
    def in_flight(self) -> int:
        return sum(member.in_flight for member in self.members)

    def describe(self) -> str:
        """For the heartbeat: the state of the only engine, or how many serve."""
        if len(self.members) == 1:
            return self.members[0].watcher.describe()
        words = [member.watcher.describe() for member in self.members]
        ready = [word for word in words if word.startswith("ready")]
        return f"{ready[0]}, {len(ready)} of {len(words)} engines serve" if ready else "starting: no engine answers yet"

    async def look(self) -> None:
        """Look at the engines' loads again and again, until cancelled; a slow one holds up no other."""
        await asyncio.gather(*(self._look_at(member) for member in self.members))

    async def _look_at(self, member: Member) -> None:
        while True:
            if member.serves:
                await member.look()
                self._changed.set()
            await asyncio.sleep(LOOK_S)

    async def can_play(self, version: int) -> bool:
        """Wait while an engine is on its way to `version`. False: that version, or a later one, cannot be used for now."""
        while not any(member.fit_for(version) for member in self.members):
            if all(member.watcher.state == "stale" for member in self.members):
                return False
            await self._change()
        return True

    @contextlib.asynccontextmanager
    async def seat(self, version: int) -> AsyncIterator[Seat]:
        """A place for one episode, on the engine with the most room among those that serve `version` or a later one."""
        while (member := self._roomiest(version)) is None:
            await self._change()
        seat = Seat(self, member)
        member.in_flight += 1
        try:
            yield seat
        finally:
            seat.member.in_flight -= 1
            self._changed.set()

    def _roomiest(self, version: int) -> Member | None:
        free = [m for m in self.members if m.fit_for(version) and m.in_flight < m.window.limit]
        return max(free, key=lambda m: m.window.limit - m.in_flight, default=None)

    def another(self, version: int) -> Member | None:
        """The least loaded engine that serves `version` or a later one, however full it is."""
        fit = [m for m in self.members if m.watcher.state == "ready" and m.fit_for(version)]
        return min(fit, key=lambda m: m.in_flight, default=None)

    async def wait_for_engine(self, seat: Seat) -> Member:
        """The seat's engine once it serves, or another one of the worker that serves sooner."""
        while not seat.member.serves:
            if member := self.another(seat.version):
                seat.move_to(member)
            else:
                await self._change()
        return seat.member

    async def _change(self) -> None:
        """Until an engine's state, a window or a seat has changed."""
        self._changed.clear()
        await self._changed.wait()


class Seat:
    """An episode's place at an engine. The episode stays with its engine, which has its prefix cached, while that one serves."""

    def __init__(self, pool: EnginePool, member: Member) -> None:
        self.pool, self.member = pool, member
        self.version = -1
        """The newest policy that has written in this episode: it never goes back to an older one."""

    def move_to(self, member: Member) -> None:
        self.member.in_flight -= 1
        member.in_flight += 1
        self.member = member

    async def generate(self, input_ids: list[int], sampling: Sampling, max_new_tokens: int) -> Generation:
        """One turn, as the table above says. Raises EngineError, EngineRefused."""
        failures = 0
        while True:
            member = await self.pool.wait_for_engine(self)
            changes = member.watcher.changes
            try:
                turn = await member.engine.generate(input_ids, sampling, max_new_tokens)
                if turn.finish != "abort":
                    self.version = max([self.version, *(span.version for span in turn.versions)])
                    return turn
                problem = EngineError("the engine broke off a turn")
            except EngineError as error:
                problem = error
            failures += member.watcher.changes == changes and member.watcher.state != "paused"
            if failures > member.config.generation_retries:
                raise problem
            await asyncio.sleep(pause_before_retry(max(failures, 1)))


def pause_before_retry(failures: int) -> float:
    """Doubling from a quarter of a second, spread so that many episodes do not come back together."""
    return min(FIRST_PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)
