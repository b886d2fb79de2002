"""Engines that run elsewhere: attached, updated by one worker at a time, never left frozen. A fake engine over HTTP, real Redis."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import redis

from services.contract.config import Config
from services.contract.policy import PolicyBoard, PolicyVersion
from services.rollout.attached_engine import AttachedEngine
from services.rollout.engine import EngineGone
from services.rollout.failures import EngineError, EngineStartError
from services.rollout.generation import ABORTED
from services.rollout.own_engine import OwnEngine
from services.rollout.tasks import run_in
from tests.factories import make_sampling
from tests.rollout.conftest import RUN, make_config
from tests.rollout.fake_engine import FakeEngine
from tests.rollout.tiny_model import make_variant

LEASE_S = 0.6
Attach = Callable[..., AttachedEngine]


@pytest.fixture
def board(redis_client: redis.Redis) -> PolicyBoard:
    return PolicyBoard(redis_client, RUN)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """As much of a model folder as a worker looks into."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 1024}))
    return folder


@pytest_asyncio.fixture
async def fake() -> AsyncIterator[FakeEngine]:
    engine = FakeEngine([[5, 6, 7, 8]])
    async with engine.serve() as engine.url:
        yield engine


@pytest_asyncio.fixture
async def attach(fake: FakeEngine, board: PolicyBoard, model: Path, tmp_path: Path) -> AsyncIterator[Attach]:
    made: list[AttachedEngine] = []

    def make(worker: str = "w", mode: str = "in_place", **engine: Any) -> AttachedEngine:
        settings = {"urls": [fake.url], "pause_lease_s": LEASE_S, "start_timeout_s": 1} | engine
        config: Config = make_config(model, tmp_path, engine=settings, update_mode=mode)
        made.append(AttachedEngine(config, config.rollout.engine.urls[0], board, worker, run_in(ThreadPoolExecutor(4))))
        return made[-1]

    yield make
    await asyncio.gather(*(engine.stop() for engine in made))


def generate(engine: AttachedEngine) -> asyncio.Task[Any]:
    return asyncio.create_task(engine.generate([1, 2], make_sampling(), 8))


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


async def test_an_engine_is_brought_to_the_policy_when_it_is_attached(attach: Attach, fake: FakeEngine, model: Path) -> None:
    engine = attach()
    await engine.start(str(model), 3)
    assert (fake.version, fake.control) == ("3", ["pause", "load 3", "resume"])
    assert {span.version for span in (await generate(engine)).versions} == {3}
    await engine.stop()
    assert not engine.running and not fake.paused


async def test_an_engine_that_has_the_policy_is_left_as_it_is(attach: Attach, fake: FakeEngine, model: Path) -> None:
    fake.version = "3"
    await attach().start(str(model), 3)
    assert fake.control == []


async def test_two_workers_update_an_engine_once(attach: Attach, fake: FakeEngine, model: Path) -> None:
    fake.version, fake.load_s = "0", 0.2
    first, second = attach("first"), attach("second")
    await asyncio.gather(first.start(str(model), 0), second.start(str(model), 0))
    await asyncio.gather(first.update(str(model), 1), second.update(str(model), 1))
    assert fake.control == ["pause", "load 1", "resume"]
    assert first.version == second.version == 1


async def test_a_worker_that_decided_long_ago_does_not_take_the_engine_back(
    attach: Attach, fake: FakeEngine, board: PolicyBoard, model: Path
) -> None:
    """While the current version was not on the volume yet, both decided on an older one; the first has gone on meanwhile."""
    first, second = attach("first"), attach("second")
    board.commit(PolicyVersion(1, str(model)))
    await first.start(str(model), 1)
    await second.start(str(model), 0)
    assert fake.version == "1" and second.version == 1
    assert {span.version for span in (await generate(first)).versions} == {1}


@pytest.mark.parametrize(
    ("hold", "note", "loads"),
    [
        ("free", False, 0),
        ("free", True, 1),
        ("expired", False, 0),
        ("expired", True, 1),
    ],
)
async def test_whoever_holds_the_engine_next_ends_a_pause_that_was_left(
    attach: Attach, fake: FakeEngine, board: PolicyBoard, model: Path, hold: str, note: bool, loads: int
) -> None:
    """The table in services/contract/policy.py, with the version that is wanted already there."""
    fake.version, fake.paused = "1", note
    url = fake.url
    if hold == "expired":
        assert board.hold(url, "dead", LEASE_S)
    if note:
        board.note_pause(url, "dead")
    await attach().start(str(model), 1)
    assert not fake.paused and not board.may_be_paused(url)
    assert fake.control.count("load 1") == loads


async def test_a_live_holder_is_waited_for(attach: Attach, fake: FakeEngine, board: PolicyBoard, model: Path) -> None:
    fake.version = "0"
    first, second = attach("first"), attach("second")
    await asyncio.gather(first.start(str(model), 0), second.start(str(model), 0))
    fake.load_s = 3 * LEASE_S  # longer than the lease: it is renewed
    updating = asyncio.create_task(first.update(str(model), 1))
    await until(lambda: "load 1" in fake.control)
    await second.update(str(model), 1)
    await updating
    assert fake.control == ["pause", "load 1", "resume"]


async def test_a_worker_that_is_cancelled_in_an_update_still_ends_its_pause(attach: Attach, fake: FakeEngine, model: Path) -> None:
    fake.version = "0"
    engine = attach()
    await engine.start(str(model), 0)
    fake.load_s = 0.3
    updating = asyncio.create_task(engine.update(str(model), 1))
    await until(lambda: "load 1" in fake.control)
    updating.cancel()
    await asyncio.gather(updating, return_exceptions=True)
    assert not fake.paused and fake.version == "1"


async def test_after_a_failed_load_it_does_not_serve_until_one_succeeds(
    attach: Attach, fake: FakeEngine, board: PolicyBoard, model: Path
) -> None:
    fake.version, fake.fail_loads = "0", 1
    engine = attach()
    await engine.start(str(model), 0)
    with pytest.raises(EngineError, match="400|did not load"):
        await engine.update(str(model), 1)
    assert fake.paused and board.may_be_paused(engine.url)
    await engine.start(str(model), 1)
    assert not fake.paused and not board.may_be_paused(engine.url)


@pytest.mark.parametrize("version", ["0", "default"])
async def test_an_engine_that_was_started_anew_counts_as_gone(attach: Attach, fake: FakeEngine, model: Path, version: str) -> None:
    engine = attach()
    await engine.start(str(model), 1)
    fake.version = version
    with pytest.raises(EngineError):
        await generate(engine)
    assert not engine.running
    await engine.stop()
    await engine.start(str(model), 1)
    assert engine.running and fake.version == "1"


async def test_a_silent_engine_that_was_started_anew_fails_its_health_check(attach: Attach, fake: FakeEngine, model: Path) -> None:
    engine = attach()
    await engine.start(str(model), 1)
    assert await engine.health(5)
    fake.version = "0"
    assert not await engine.health(5) and not engine.running
    assert "it reports version 0 instead of 1" in engine.post_mortem()


async def test_an_engine_too_small_for_an_episode_is_refused_with_the_mend(attach: Attach, fake: FakeEngine, model: Path) -> None:
    fake.context = 300
    with pytest.raises(
        EngineStartError, match="holds 292 tokens, an episode may have 512: start it with a larger --context-length"
    ):
        await attach().start(str(model), 0)


async def test_an_engine_that_is_not_there_is_one_clear_error(attach: Attach, model: Path) -> None:
    engine = attach(urls=["http://127.0.0.1:1"], start_timeout_s=0.1)
    with pytest.raises(EngineStartError, match="rollout.engine.urls right"):
        await engine.start(str(model), 0)
    with pytest.raises(EngineGone):
        await generate(engine)


@pytest.mark.parametrize(
    ("mode", "control", "versions"),
    [
        ("in_place", ["pause", "load 1", "resume"], [0, 1]),
        ("drain", ["pause", "abort", "load 1", "resume"], [0]),
        ("abort", ["pause", "abort", "load 1", "resume"], []),
    ],
)
async def test_what_each_mode_does_to_a_running_turn(
    attach: Attach, fake: FakeEngine, model: Path, mode: str, control: list[str], versions: list[int]
) -> None:
    fake.version = "0"
    engine = attach(mode=mode)
    await engine.start(str(model), 0)
    fake.hold = True
    turn = generate(engine)
    await until(lambda: len(fake.requests) == 2)  # the first was the health check
    updating = asyncio.create_task(engine.update(str(model), 1))
    if mode == "drain":
        await asyncio.sleep(0.3)
        assert fake.control == [], "the turn is waited for"
    else:
        await updating
    fake.hold = False
    await fake._tell_waiters()
    await updating
    assert fake.control == control
    assert [span.version for span in (await turn).versions] == versions
    assert ((await turn) == ABORTED) == (mode == "abort")


async def test_a_pause_that_a_dead_worker_left_is_ended_also_when_engines_are_to_be_drained(
    attach: Attach, fake: FakeEngine, board: PolicyBoard, model: Path
) -> None:
    fake.version = "0"
    engine = attach(mode="drain")
    await engine.start(str(model), 0)
    fake.hold = True
    turn = generate(engine)
    await until(lambda: len(fake.requests) == 2)
    fake.hold, fake.paused = False, True
    board.note_pause(engine.url, "dead")
    await engine.update(str(model), 1)
    assert not fake.paused and await turn == ABORTED


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("mode", ["in_place", "drain", "abort"])
async def test_the_real_engine_is_attached_and_updated(
    served: OwnEngine, board: PolicyBoard, tiny_model: Path, tmp_path: Path, mode: str
) -> None:
    config = make_config(tiny_model, tmp_path, engine={"urls": [served.url]}, update_mode=mode)
    engine = AttachedEngine(config, served.url, board, "w", run_in(ThreadPoolExecutor(4)))
    await engine.start(str(tiny_model), 0)
    make_variant(tiny_model, tmp_path, scale=0.9)
    await engine.update(str(tmp_path), 5)
    turn = await engine.generate(list(range(10, 40)), make_sampling(), 8)
    assert {span.version for span in turn.versions} == {5}
    load = await engine.load_figures()
    assert load and load.running >= 0
    await engine.stop()
    assert await served.reported_version() == "5"
