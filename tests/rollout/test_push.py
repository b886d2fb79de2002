"""Weights pushed by the trainer's own code into two real engines over gloo, and every party killed in the middle of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from services.contract import weights
from services.contract.policy import PolicyVersion
from services.contract.push import PushBoard
from services.rollout import receiver
from services.rollout.generation import Generation
from services.rollout.own_engine import OwnEngine
from services.trainer.publishing.collective import EngineGroup
from tests.factories import make_sampling
from tests.rollout.conftest import make_config
from tests.rollout.fleet import PROMPT, Fleet, Minded, until_written
from tests.rollout.tiny_model import reference_logprobs

pytestmark = pytest.mark.asyncio(loop_scope="session")
TOLERANCE = 1e-3


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def second(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OwnEngine]:
    folder = tmp_path_factory.mktemp("second")
    engine = OwnEngine(make_config(tiny_model, folder), folder / "engine.log", "second")
    await engine.start(str(tiny_model), 0)
    yield engine
    await engine.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def pair(fleet: Fleet, engine: OwnEngine, second: OwnEngine) -> AsyncIterator[tuple[Minded, Minded]]:
    """Two engines that serve version 0."""
    async with fleet.worker(engine, "a") as a, fleet.worker(second, "b") as b:
        await asyncio.gather(a.until_serves(0, 300), b.until_serves(0, 300))
        yield a, b


async def test_a_push_brings_both_engines_the_policy_that_the_volume_would(
    fleet: Fleet, pair: tuple[Minded, Minded], variants: list[Path]
) -> None:
    await fleet.publish(1, variants[1])
    assert fleet.board.current().version == 1 and weights.published_versions(fleet.publisher.root) == []
    for minded in pair:
        await minded.until_serves(1)
        assert await minded.gap(variants[1], 1) < TOLERANCE
        pushed = await minded.engine.generate(PROMPT, make_sampling(temperature=0.0), 24)
        await minded.engine.update(str(variants[0]), 1)
        await minded.engine.update(str(variants[1]), 1)
        loaded = await minded.engine.generate(PROMPT, make_sampling(temperature=0.0), 24)
        assert (pushed.ids, pushed.logprobs) == (loaded.ids, loaded.logprobs)


async def test_running_turns_go_on_with_the_pushed_policy_and_none_of_the_olds_kv(
    fleet: Fleet, pair: tuple[Minded, Minded], variants: list[Path]
) -> None:
    over = asyncio.Event()

    async def play(minded: Minded) -> list[Generation]:
        turns = []
        while not over.is_set():
            turns.append(await minded.engine.generate(PROMPT, make_sampling(temperature=5.0), 400))
        return turns

    playing = [asyncio.create_task(play(minded)) for minded in pair * 4]
    await asyncio.sleep(0.3)
    await fleet.publish(1, variants[1])
    over.set()
    split = [turn for turns in await asyncio.gather(*playing) for turn in turns if len(turn.versions) == 2]
    assert split
    for turn in split:
        new = turn.versions[1]
        since = reference_logprobs(variants[1], PROMPT, turn.ids, 5.0)
        assert new.version == 1
        assert max(abs(a - b) for a, b in zip(turn.logprobs[new.start :], since[new.start :], strict=True)) < TOLERANCE


async def test_the_group_is_kept_from_push_to_push(fleet: Fleet, pair: tuple[Minded, Minded], variants: list[Path]) -> None:
    names = []
    for version in (1, 2):
        await fleet.publish(version, variants[version])
        names += [{report.group for report in fleet.board.live_engines()}]
    for minded in pair:
        await minded.until_serves(2)
        assert await minded.gap(variants[2], 2) < TOLERANCE
    assert names[0] == names[1] and len(names[0]) == 1


async def test_an_engine_that_joins_between_versions_catches_up_from_the_volume_and_is_pushed_to_next(
    fleet: Fleet, engine: OwnEngine, second: OwnEngine, variants: list[Path]
) -> None:
    async with fleet.worker(engine, "a") as a:
        await a.until_serves(0, 300)
        await fleet.publish(1, variants[1])
        await a.until_serves(1)
        async with fleet.worker(second, "b") as b:
            async with asyncio.timeout(300):
                while b.watcher.state != "stale":  # version 1 went to the other one only
                    await asyncio.sleep(0.05)
            assert not weights.is_published(fleet.publisher.root, 1)
            await until_written(fleet, 1)
            await b.until_serves(1)
            assert await b.gap(variants[1], 1) < TOLERANCE
            await fleet.publish(2, variants[2])
            for minded in (a, b):
                await minded.until_serves(2)
                assert await minded.gap(variants[2], 2) < TOLERANCE
            assert not weights.is_published(fleet.publisher.root, 2), "both had it by the push, in a group made anew"


async def test_what_came_otherwise_than_it_was_sent_is_not_served_and_the_volume_brings_the_version(
    fleet: Fleet, pair: tuple[Minded, Minded], variants: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    send = EngineGroup.broadcast
    monkeypatch.setattr(EngineGroup, "broadcast", lambda group, flat: send(group, altered(flat)))
    await fleet.publish(1, variants[1])
    assert weights.is_published(fleet.publisher.root, 1)
    for minded in pair:
        await minded.until_serves(1)
        assert await minded.gap(variants[1], 1) < TOLERANCE


def altered(flat: torch.Tensor) -> torch.Tensor:
    copy = flat.clone()
    copy[100] ^= 1
    return copy


async def test_an_engine_killed_in_a_push_leaves_the_other_one_whole_and_the_next_group_has_both_again(
    fleet: Fleet, pair: tuple[Minded, Minded], variants: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    sent = []
    send = EngineGroup.broadcast

    def kill_before_the_second(group: EngineGroup, flat: torch.Tensor) -> None:
        sent.append(flat)
        if len(sent) == 2:
            os.killpg(b.engine.pid, signal.SIGKILL)
        send(group, flat)

    monkeypatch.setattr(EngineGroup, "broadcast", kill_before_the_second)
    turn = asyncio.create_task(a.engine.generate(PROMPT, make_sampling(temperature=5.0), 400))
    await fleet.publish(1, variants[1])
    await a.until_serves(1)
    assert await a.gap(variants[1], 1) < TOLERANCE
    assert {span.version for span in (await turn).versions} <= {0, 1}
    await b.until_serves(1, 300)
    await fleet.publish(2, variants[2])
    for minded in pair:
        await minded.until_serves(2)
        assert await minded.gap(variants[2], 2) < TOLERANCE
    assert not weights.is_published(fleet.publisher.root, 2), "the push went through"


@pytest.mark.parametrize("moment", ["before the first bucket", "before the second bucket", "before the commit"])
async def test_a_trainer_killed_in_a_push_leaves_every_engine_with_a_whole_version(
    fleet: Fleet, pair: tuple[Minded, Minded], variants: list[Path], tmp_path: Path, moment: str
) -> None:
    config = tmp_path / "config.json"
    config.write_text(fleet.config.model_dump_json())
    command = [sys.executable, "-m", "tests.rollout.push_trainer", str(config), str(variants[1]), moment]
    ended = await asyncio.to_thread(subprocess.run, command, timeout=300)
    assert ended.returncode == -signal.SIGKILL
    for minded in pair:
        await minded.until_serves(0, 60)
        assert await minded.gap(variants[0], 0) < TOLERANCE
    assert fleet.board.current() == PolicyVersion(0, str(variants[0]))
    assert fleet.publisher.next_version() == 2, "the number is used up"
    await fleet.publish(2, variants[2])
    for minded in pair:
        await minded.until_serves(2)
        assert await minded.gap(variants[2], 2) < TOLERANCE


async def test_a_trainer_that_falls_silent_in_a_push_costs_its_engine_no_more_than_a_new_start(
    fleet: Fleet, second: OwnEngine, variants: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sockets stay open, so nothing but the lease tells; the engine is stuck in SGLang's receive."""
    monkeypatch.setattr(receiver, "LET_GO_S", 1.0)
    send = EngineGroup.broadcast
    monkeypatch.setattr(EngineGroup, "broadcast", lambda group, flat: (time.sleep(8), send(group, flat)))
    monkeypatch.setattr(PushBoard, "renew", lambda *_: False)
    async with fleet.worker(second, "b") as minded:
        await minded.until_serves(0, 300)
        former = minded.engine.pid
        await fleet.publish(1, variants[1])
        await minded.until_serves(1, 300)
        assert await minded.gap(variants[1], 1) < TOLERANCE
        assert minded.engine.pid != former
