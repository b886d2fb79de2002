"""Staleness 1 and 4 against 0: the real queue, worker, grader, feed and collect; engine and learner are simulated.

The simulated learner takes as long for a batch as the engine takes for one when nothing else is asked of it. Lengths of turns are
log-normal, so a synchronous step waits for its longest episode.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.rollout_parts import Parts, worker
from services.contract.config import Config
from services.contract.groups import GroupStore
from services.contract.messages import Question
from services.contract.policy import PolicyBoard, PolicyVersion
from services.trainer.durable.ledger import Ledger
from services.trainer.feeding.batch import Batches
from services.trainer.feeding.collect import Collector
from services.trainer.feeding.questions import TrainingOrder
from services.trainer.feeding.staleness import staleness_metrics
from tests.rollout.tiny_model import QUESTION, TURNS

GROUPS, SAMPLES = 8, 8
MEDIAN_TURN_S, SPREAD = 0.5, 0.7
STALENESS = (0, 1, 4)


async def run_overlap(parts: Parts, steps: int) -> None:
    parts.simulate([parts.codec.encode(turn) for turn in TURNS], MEDIAN_TURN_S, SPREAD)
    config = parts.configure(concurrency=512, least_concurrency=512, retrieval_concurrency=512, max_turn_tokens=64)
    store, board = parts.streams(config)
    parts.start_service("reward", config)
    async with worker(config, board):
        generation_s, _ = await asyncio.to_thread(learn, parts, config, store, board, 4, 0, 0.0)
        train_s = generation_s / 4
        print(f"a batch of {GROUPS} x {SAMPLES} is generated in {train_s:.1f} s; the learner takes as long")
        seconds: dict[int, float] = {}
        for staleness in STALENESS:
            wall, idle = await asyncio.to_thread(learn, parts, config, store, board, steps or 12, staleness, train_s)
            seconds[staleness] = wall
            print(f"staleness {staleness}: {wall:.1f} s for {steps or 12} steps, learner idle {idle:.0%}")
    for staleness in STALENESS[1:]:
        print(f"staleness {staleness}: {seconds[0] / seconds[staleness]:.2f} x as fast as the synchronous run")


def learn(
    parts: Parts, config: Config, store: GroupStore, board: PolicyBoard, steps: int, staleness: int, train_s: float
) -> tuple[float, float]:
    """The trainer's loop with a sleep for the optimizer step. Returns wall seconds and the learner's idle share."""
    batches = make_batches(config, store, board, staleness)
    started, idle = time.perf_counter(), 0.0
    for _ in range(steps):
        waiting = time.perf_counter()
        groups = batches.next_batch()
        idle += time.perf_counter() - waiting
        time.sleep(train_s)
        figures = staleness_metrics(groups, batches.ledger, staleness)
        assert figures["staleness/over"] == 0, f"a group was above the bound of {staleness}: {figures}"
        batches.consume(groups)
        batches.ledger.unpublished = True
        batches.ledger.publish(batches.ledger.version + 1, policies_kept=staleness + 1)
        board.commit(PolicyVersion(batches.ledger.version, str(parts.model)))
        batches.release(groups)
    return time.perf_counter() - started, idle / (time.perf_counter() - started)


def make_batches(config: Config, store: GroupStore, board: PolicyBoard, staleness: int) -> Batches:
    """Goes on where the last run of this benchmark stopped: versions and question numbers only rise."""
    trainer: Any = {"groups_per_step": GROUPS, "samples_per_prompt": SAMPLES, "max_staleness": staleness}
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update=trainer)})
    current = board.current()
    taken = 1000 * (1 + STALENESS.index(staleness) + (current.version if current else 0))
    ledger = Ledger(version=current.version if current else 0, next_index=taken)
    questions = [Question(str(i), "capital", QUESTION, ["Paris"]) for i in range(100)]
    collector = Collector(store, 600, check_stop=lambda: None)
    return Batches(config, store, collector, TrainingOrder(questions, seed=0), ledger)
