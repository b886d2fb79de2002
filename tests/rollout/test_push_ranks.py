"""Trainers of two ranks push into a real engine over gloo; one that loses a rank in a push leaves the engine whole."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from services.contract import weights
from services.rollout.own_engine import OwnEngine
from tests.factories import make_sampling
from tests.rollout.fleet import PROMPT, Fleet, Minded
from tests.rollout.push_ranks import Death, Job

pytestmark = pytest.mark.asyncio(loop_scope="session")
TOLERANCE = 1e-3
TENSOR_PARALLEL, DATA_PARALLEL = {"processes": 2, "tensor_parallel": 2}, {"processes": 2}
Run = Callable[[Job], list[int]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs a job of `push_ranks` to its end; the exit codes of its ranks."""
    command = [sys.executable, "-m", "tests.rollout.push_ranks"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin and process.stdout
    lines = process.stdout

    def ask(job: Job) -> list[int]:
        assert process.stdin
        process.stdin.write(msgspec.json.encode(job) + b"\n")
        process.stdin.flush()
        return msgspec.json.decode(lines.readline())

    yield ask
    process.stdin.close()
    process.wait()


@pytest_asyncio.fixture(loop_scope="session")
async def minded(fleet: Fleet, engine: OwnEngine) -> AsyncIterator[Minded]:
    """An engine that serves version 0."""
    async with fleet.worker(engine, "a") as minded:
        await minded.until_serves(0, 300)
        yield minded


def make_job(fleet: Fleet, layout: dict[str, Any], model: Path, version: int, rank_1_dies: Death = "") -> Job:
    config = fleet.trainer_config(volume_every=1, **layout)
    return Job(config.model_dump_json(), str(model), version, rank_1_dies)


@pytest.mark.parametrize("layout", [TENSOR_PARALLEL, DATA_PARALLEL], ids=["tensor-parallel", "data-parallel"])
async def test_two_ranks_push_the_policy_that_the_volume_would_bring(
    fleet: Fleet, minded: Minded, variants: list[Path], run: Run, layout: dict[str, Any]
) -> None:
    assert await asyncio.to_thread(run, make_job(fleet, layout, variants[1], 1)) == [0, 0]
    published = weights.version_folder(fleet.publisher.root, 1)
    assert fleet.board.current().pushed, "it did not have to go out over the volume"
    await minded.until_serves(1)
    assert await minded.gap(variants[1], 1) < TOLERANCE
    pushed = await minded.engine.generate(PROMPT, make_sampling(temperature=0.0), 24)
    await minded.engine.update(str(variants[0]), 1)
    await minded.engine.update(str(published), 1)
    loaded = await minded.engine.generate(PROMPT, make_sampling(temperature=0.0), 24)
    assert (pushed.ids, pushed.logprobs) == (loaded.ids, loaded.logprobs)


@pytest.mark.parametrize(
    ("death", "served"),
    [("and the push is over before that is noticed", 1), ("and the lead is asked to stop", 0)],
)
async def test_a_rank_that_dies_in_a_push_ends_the_trainer_and_the_next_one_pushes_again(
    fleet: Fleet, minded: Minded, variants: list[Path], run: Run, death: Death, served: int
) -> None:
    codes = await asyncio.to_thread(run, make_job(fleet, TENSOR_PARALLEL, variants[1], 1, death))
    assert codes == [1, -9], "the lead ends on its own account: it can tell nobody how the push went"
    assert fleet.board.current().version == served
    await minded.until_serves(served)
    assert await minded.gap(variants[served], served) < TOLERANCE
    assert fleet.publisher.next_version() == 2, "the number is used up"
    assert await asyncio.to_thread(run, make_job(fleet, TENSOR_PARALLEL, variants[2], 2)) == [0, 0]
    await minded.until_serves(2)
    assert await minded.gap(variants[2], 2) < TOLERANCE
