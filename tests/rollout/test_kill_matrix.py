"""Kill each part of the rollout half at each stage of a group: in the end every sample was graded exactly once, unattended.

Real Redis, real workers and graders as processes; the engine is a fake one over HTTP, attached by URL, except in the last test.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.contract.codec import Codec
from services.contract.messages import PromptGroup
from services.rollout.own_engine import OwnEngine
from tests.factories import make_group, make_sampling
from tests.rollout.suite_to_kill import Suite
from tests.rollout.tiny_model import TURNS

SAMPLES = 3
TARGETS = ("worker", "engine", "retriever", "grader", "redis")
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def suite(tiny_model: Path, codec: Codec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    made = Suite(tmp_path_factory.mktemp("matrix"), tiny_model, [codec.encode(turn) for turn in TURNS])
    yield made
    made.close()


@contextmanager
def while_waiting(suite: Suite, feed: Callable[[], object]) -> Iterator[None]:
    """The group lies in the stream: both workers are frozen before they can take it."""
    frozen = list(suite.workers)
    for worker in frozen:
        os.kill(worker.pid, signal.SIGSTOP)
    feed()
    yield
    for worker in frozen:
        if worker.process.poll() is None:
            os.kill(worker.pid, signal.SIGCONT)


@contextmanager
def mid_turn(suite: Suite, feed: Callable[[], object]) -> Iterator[None]:
    """The engine is decoding every sample."""
    suite.ask("engine", hold=True)
    feed()
    suite.until(lambda: (suite.ask("engine") or {}).get("running", 0) >= SAMPLES, "all samples in the engine")
    yield
    suite.until(lambda: suite.ask("engine", hold=False) is not None, "the engine lets go")


@contextmanager
def between_turns(suite: Suite, feed: Callable[[], object]) -> Iterator[None]:
    """Every sample waits for its passages."""
    suite.ask("retriever", hold=True)
    feed()
    suite.until(lambda: (suite.ask("retriever") or {}).get("waiting") == SAMPLES, "all samples at the retriever")
    yield
    suite.until(lambda: suite.ask("retriever", hold=False) is not None, "the retriever lets go")


@contextmanager
def after_storing_before_the_task(suite: Suite, feed: Callable[[], object]) -> Iterator[None]:
    suite.hold("before_task")
    feed()
    suite.until(lambda: suite.held_at("before_task"), "a worker has stored a sample")
    yield
    suite.let_go("before_task")


@contextmanager
def after_grading_before_the_ack(suite: Suite, feed: Callable[[], object]) -> Iterator[None]:
    suite.hold("before_ack")
    feed()
    suite.until(lambda: suite.held_at("before_ack"), "a grader has graded a sample")
    yield
    suite.let_go("before_ack")


STAGES = [while_waiting, mid_turn, between_turns, after_storing_before_the_task, after_grading_before_the_ack]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
@pytest.mark.parametrize("target", TARGETS)
def test_every_sample_is_graded_exactly_once(suite: Suite, target: str, stage: Callable) -> None:
    suite.wait_until_ready()
    group, started = sent(f"{target}-{stage.__name__}"), time.monotonic()
    with stage(suite, lambda: suite.store.feed(group)):
        suite.kill(target)
    check(suite, group, started)


def sent(name: str) -> PromptGroup:
    return make_group(name, SAMPLES, sampling=make_sampling(temperature=0.0))


def check(suite: Suite, group: PromptGroup, started: float) -> None:
    """Prints the counts of the cell."""
    suite.until(lambda: suite.settled(), f"{group.group_id} settled; {suite.store.accounts()}")
    counts = {name: times for name, times in suite.graded().items() if name.startswith(f"{group.group_id}/")}
    trajectories = [trajectory for trajectory in suite.store.load_many(group.trajectory_ids()) if trajectory]
    seconds = time.monotonic() - started
    print(f"{group.group_id}: fed {SAMPLES}, graded {len(counts)}, times each {set(counts.values())}, {seconds:.1f} s")
    assert counts == dict.fromkeys(group.trajectory_ids(), 1)
    assert [(t.status, t.searches, t.reward) for t in trajectories] == [("completed", 1, 1.0)] * SAMPLES
    accounts = suite.store.accounts()
    accounts.check()
    assert accounts.dead == 0


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("target", ["worker", "retriever", "redis"])
async def test_with_the_real_engine(served: OwnEngine, tiny_model: Path, tmp_path: Path, target: str) -> None:
    """SGLang is paused in mid-turn while the other part is killed; it is attached by two worker processes."""
    suite = await asyncio.to_thread(Suite, tmp_path, tiny_model, [], served.url)
    try:
        group, started = sent(f"real-{target}"), time.monotonic()
        await served.pause()
        suite.store.feed(group)
        await asyncio.to_thread(suite.until, lambda: suite.store.accounts().leased, "the group is taken")
        await asyncio.sleep(0.5)
        await asyncio.to_thread(suite.kill, target)
        await served.resume()
        await asyncio.to_thread(check, suite, group, started)
    finally:
        await served.resume()
        suite.close()
