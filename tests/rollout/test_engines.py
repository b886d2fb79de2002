"""Which engine an episode gets, and what becomes of a turn that fails: each row of the table in services/rollout/engines.py."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from services.contract.config import RolloutConfig
from services.contract.messages import VersionSpan
from services.rollout import engines as module
from services.rollout.concurrency import Window
from services.rollout.engine import EngineRefused
from services.rollout.engines import EnginePool, Member
from services.rollout.failures import EngineError
from services.rollout.generation import ABORTED, Generation
from tests.factories import make_sampling

CONFIG = RolloutConfig(concurrency=4, least_concurrency=2, generation_retries=2)
GONE = EngineError("the engine is gone")


def turn(version: int = 0) -> Generation:
    return Generation([5], [-0.5], "stop", [VersionSpan(version, 0, 1)])


class WatcherStandIn:
    """A policy watcher whose state a test decides."""

    def __init__(self, state: str = "ready", version: int = 0) -> None:
        self.state, self.version, self.changes = state, version, 0
        self.on_change: Any = lambda: None

    @property
    def caught_up(self) -> bool:
        return self.state == "ready"

    def become(self, state: str, version: int | None = None) -> None:
        self.state, self.version = state, self.version if version is None else version
        self.changes += 1
        self.on_change()


class EngineStandIn:
    """Answers with what a test wrote down, in turn; the last of it for ever."""

    def __init__(self, name: str, answers: Sequence[Generation | Exception | Any]) -> None:
        self.name, self.answers, self.calls = name, list(answers), 0

    async def generate(self, *_: object) -> Generation:
        self.calls += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            answer = answer()
        if isinstance(answer, Exception):
            raise answer
        return answer


def member(name: str = "a", answers: Sequence[Any] = (turn(),), state: str = "ready", version: int = 0) -> Any:
    return Member(EngineStandIn(name, answers), WatcherStandIn(state, version), CONFIG)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.001)


async def ask(pool: EnginePool, seats: int = 1) -> Generation:
    async with pool.seat(0) as seat:
        return await seat.generate([1], make_sampling(), 8)


@pytest.mark.parametrize("answers", [[turn()], [GONE, turn()], [GONE, ABORTED, turn()]])
async def test_a_turn_is_asked_for_again_within_the_budget(answers: list[Any]) -> None:
    one = member(answers=answers)
    assert await ask(EnginePool([one])) == turn()
    assert one.engine.calls == len(answers) or len(answers) == 1


@pytest.mark.parametrize(("answer", "reason"), [(GONE, "the engine is gone"), (ABORTED, "broke off a turn")])
async def test_beyond_the_budget_it_is_an_engine_error(answer: Any, reason: str) -> None:
    one = member(answers=[answer])
    with pytest.raises(EngineError, match=reason):
        await ask(EnginePool([one]))
    assert one.engine.calls == 1 + CONFIG.generation_retries and one.in_flight == 0


async def test_a_turn_lost_to_an_update_costs_nothing() -> None:
    one = member()

    def updated() -> Generation:
        one.watcher.become("ready", one.watcher.version + 1)
        return ABORTED

    one.engine.answers = [updated] * 10 + [turn(10)]
    assert await ask(EnginePool([one])) == turn(10)


async def test_a_request_that_is_wrong_is_not_asked_again() -> None:
    one = member(answers=[EngineRefused("top_p")])
    with pytest.raises(EngineRefused):
        await ask(EnginePool([one]))
    assert one.engine.calls == 1


async def test_a_turn_waits_for_its_engine_to_start() -> None:
    one = member()
    pool = EnginePool([one])
    async with pool.seat(0) as seat:
        one.watcher.become("loading", -1)
        asking = asyncio.create_task(seat.generate([1], make_sampling(), 8))
        await asyncio.sleep(0.05)
        assert not asking.done()
        one.watcher.become("ready", 3)
        assert await asking == turn()


async def test_an_episode_moves_to_another_engine_when_its_own_is_lost_but_never_back_to_an_older_policy() -> None:
    old, own, new = member("old", [turn(1)], version=1), member("own", [turn(2)], version=2), member("new", [turn(2)], version=2)
    own.window = Window(100)
    pool = EnginePool([old, own, new])
    async with pool.seat(0) as seat:
        assert seat.member is own
        await seat.generate([1], make_sampling(), 8)
        own.watcher.become("loading", -1)
        await seat.generate([1], make_sampling(), 8)
        assert seat.member is new and (old.in_flight, own.in_flight, new.in_flight) == (0, 0, 1)
    assert pool.in_flight == 0


async def test_an_episode_stays_with_its_engine_while_that_one_updates() -> None:
    one, other = member("one"), member("other")
    one.window = Window(100)
    pool = EnginePool([one, other])
    async with pool.seat(0) as seat:
        one.watcher.become("paused")
        await seat.generate([1], make_sampling(), 8)
        assert seat.member is one


async def test_an_engine_that_is_to_be_drained_gets_no_turn_during_its_update() -> None:
    one = member()
    one.config = CONFIG.model_copy(update={"update_mode": "drain"})
    pool = EnginePool([one])
    async with pool.seat(0) as seat:
        one.watcher.become("paused")
        asking = asyncio.create_task(seat.generate([1], make_sampling(), 8))
        await asyncio.sleep(0.05)
        assert one.engine.calls == 0
        one.watcher.become("ready", 1)
        assert await asking == turn()


async def test_seats_go_to_the_engine_with_the_most_room_and_wait_when_all_are_full() -> None:
    small, large = member("small"), member("large")
    small.window, large.window = Window(1), Window(2)
    pool = EnginePool([small, large])
    taken: list[str] = []
    leave = asyncio.Event()

    async def sit() -> None:
        async with pool.seat(0) as seat:
            taken.append(seat.member.name)
            await leave.wait()

    sitting = [asyncio.create_task(sit()) for _ in range(4)]
    await asyncio.sleep(0.01)
    assert sorted(taken) == ["large", "large", "small"] and pool.room == 3
    leave.set()
    await asyncio.gather(*sitting)
    assert len(taken) == 4 and pool.in_flight == 0


async def test_a_group_is_played_only_by_engines_with_its_version() -> None:
    behind, ready = member("behind", version=1), member("ready", version=2)
    behind.window = Window(100)
    async with EnginePool([behind, ready]).seat(2) as seat:
        assert seat.member is ready


async def test_it_waits_for_a_version_that_is_coming_and_says_no_when_none_can() -> None:
    one, other = member(version=1), member(state="stale", version=1)
    pool = EnginePool([one, other])
    waiting = asyncio.create_task(pool.can_play(2))
    await asyncio.sleep(0.01)
    one.watcher.become("paused")
    await asyncio.sleep(0.01)
    assert not waiting.done()
    one.watcher.become("ready", 2)
    assert await waiting
    one.watcher.become("stale", 1)
    assert not await pool.can_play(2)


async def test_behind_a_router_every_engine_must_have_caught_up() -> None:
    one, other = member(), member(state="paused")
    assert EnginePool([one, other]).caught_up
    engine = {"urls": ["http://a:1", "http://b:1"], "router": "http://r:1"}
    one.config = RolloutConfig.model_validate({"engine": engine})
    assert not EnginePool([one, other]).caught_up
