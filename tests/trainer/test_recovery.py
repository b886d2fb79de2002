"""Kill the trainer at every point of its loop: the run that goes on ends with the very weights of one that was never killed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.contract.messages import PromptGroup
from services.contract.policy import EngineReport, PolicyVersion
from services.trainer.durable.checkpoints import Checkpoints
from tests.conftest import RedisServer
from tests.trainer.run_to_kill import (
    GROUPS,
    HELD_OUT,
    SAMPLES,
    STEPS,
    Nursery,
    Outcome,
    RunToKill,
    json_lines,
    make_config,
    write_inputs,
)
from tests.trainer.trainer_nursery import Point

EVERY_GROUP = [[f"t{step * GROUPS + place:08d}" for place in range(GROUPS)] for step in range(STEPS)]
TRAIN_STEP = "services.trainer.megatron.learner:Learner.train_step"
PUBLISH, CHECKPOINT = "services.trainer.run:Run.publish", "services.trainer.run:Run.checkpoint"
SEAL = "services.contract.weights:_seal"
COMMIT, STAGE = "services.contract.policy:PolicyBoard.commit", "services.contract.policy:PolicyBoard.stage"
COPY = "services.trainer.run:copy_durably"
IN_STEP_2, AT_THE_CHECKPOINT = Point(PUBLISH, 3), Point(CHECKPOINT, 5)
"""Publications: the warm start, then each step. Checkpoints: evaluation, half and whole warm start, evaluation, step 2."""

LOAD = "services.trainer.feeding.collect:Collector._load"
FEED_ONE, NEXT_BATCH = "services.trainer.feeding.batch:Batches._feed_one", "services.trainer.feeding.batch:Batches.next_batch"
KEEP = "services.trainer.evaluation.answer_book:AnswerBook.keep"
SAVE = "services.trainer.megatron.learner:Learner.save"

CELLS: dict[str, list[Point]] = {
    "evaluating": [Point("services.trainer.evaluation.evaluate:Evaluator.evaluate", 2), Point(LOAD, 1, "after")],
    "in the warm start": [Point(TRAIN_STEP, 3)],
    "warm start published, not recorded": [Point(PUBLISH, 1), Point(COMMIT, 1, "after")],
    "feeding": [Point(FEED_ONE, 3, "after")],
    "collecting": [Point(NEXT_BATCH, 2), Point(LOAD, 1, "after")],
    "mid-backward": [Point(TRAIN_STEP, 6), Point("megatron.core.pipeline_parallel.schedules:backward_step", 2)],
    "between the optimizer steps of a batch": [Point(TRAIN_STEP, 7)],
    "publishing, before the manifest": [IN_STEP_2, Point(SEAL)],
    "publishing, after the manifest": [IN_STEP_2, Point(SEAL, 1, "after")],
    "published, not staged": [IN_STEP_2, Point(STAGE)],
    "staged, not current": [IN_STEP_2, Point(COMMIT)],
    "current, not recorded": [IN_STEP_2, Point(COMMIT, 1, "after")],
    "the new reference written, not recorded": [Point(COPY, 2, "after")],
    "checkpoint, before its state": [AT_THE_CHECKPOINT, Point(SAVE)],
    "checkpoint, after its state": [AT_THE_CHECKPOINT, Point(SAVE, 1, "after")],
    "checkpoint, before the manifest": [AT_THE_CHECKPOINT, Point(SEAL)],
    "checkpoint, before the rename": [AT_THE_CHECKPOINT, Point(SEAL, 1, "after")],
    "checkpoint, after the rename": [AT_THE_CHECKPOINT, Point("services.trainer.durable.checkpoints:publish", 1, "after")],
    "acknowledging": [AT_THE_CHECKPOINT, Point("services.contract.groups:GroupStore.release", 1, "after")],
    "evaluating between two steps": [AT_THE_CHECKPOINT, Point(LOAD, 1, "after")],
    "learned the last step, saved the one before": [Point(PUBLISH, 4, "after")],
    "writing the final model": [Point(COPY, 3)],
}
"""Where the trainer is killed: the calls of these functions, one after another."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(scope="module")
def make_run(
    nursery: Nursery, inputs: Path, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable]:
    made: list[RunToKill] = []

    def make(folder: Path | None = None, **trainer: object) -> RunToKill:
        own = tmp_path_factory.mktemp("run")
        config = make_config(f"run{len(made)}", folder or own, inputs, redis_server.url, **trainer)
        made.append(RunToKill(nursery, config, own))
        return made[-1]

    yield make
    for run in made:
        run.close()


@pytest.fixture(scope="module")
def never_killed(make_run: Callable[..., RunToKill]) -> Outcome:
    outcome = make_run().finish()
    assert outcome.trained == EVERY_GROUP
    return outcome


def check(run: RunToKill, outcome: Outcome, never_killed: Outcome) -> None:
    """Prints the counts of the cell."""
    trained = Counter(group for step in outcome.trained for group in step)
    accounts = outcome.accounts
    print(f"trained {len(trained)} groups, times each {set(trained.values())}; played {run.stand_in.played}; {accounts}")
    assert outcome.trained == EVERY_GROUP
    assert (outcome.ledger.next_index, outcome.ledger.consumed_beyond) == (STEPS * GROUPS, [])
    assert outcome.answers == never_killed.answers
    assert outcome.rows == never_killed.rows
    assert outcome.weights == never_killed.weights
    accounts.check()
    assert accounts.fed == accounts.released and accounts.dead == 0
    assert run.bodies() == []


@pytest.mark.parametrize("cell", CELLS)
def test_killed_and_started_again_it_ends_with_the_same_weights(
    cell: str, make_run: Callable[..., RunToKill], never_killed: Outcome
) -> None:
    run, started = make_run(), time.monotonic()
    assert run.start(*CELLS[cell]) == [-9], run.log.read_text()[-4000:]
    killed = time.monotonic()
    check(run, run.finish(), never_killed)
    print(f"killed after {killed - started:.1f} s, ended {time.monotonic() - killed:.1f} s later")


def test_killed_in_an_evaluation_beside_training_it_asks_for_nothing_twice(
    make_run: Callable[..., RunToKill], never_killed: Outcome
) -> None:
    """Of the evaluation of step 1 one answer is in its file, not released, the other has not come; that of step 2 is fed."""
    run = make_run(eval_waits=False, eval_every=1, checkpoint_every=1)
    asked: Counter[str] = Counter()
    killed = threading.Event()

    def takes(group: PromptGroup) -> bool:
        first = group.group_id.startswith("e-step1-")
        too_early = run.stand_in.played <= GROUPS  # step 2 is played once a checkpoint lists the evaluation
        if first and not killed.is_set() and (too_early or not group.group_id.endswith("-00000")):
            return False
        asked[group.group_id] += 1
        return True

    run.stand_in.takes = takes
    assert run.start(Point(KEEP, 2 * HELD_OUT + 1, "after")) == [-9], run.log.read_text()[-4000:]
    file = run.folder / "evaluations" / "step1-step000001.jsonl"
    written = json_lines(file)
    assert [row["id"] for row in written] == [group_id + "/0" for group_id in asked if group_id.startswith("e-step1-")]
    killed.set()
    outcome = run.finish()
    assert json_lines(file)[0] == written[0]
    of_step_1 = {group_id: times for group_id, times in asked.items() if group_id.startswith("e-step1-")}
    assert list(of_step_1.values()) == [1] * HELD_OUT, "what was answered before the kill is not asked again"
    assert sorted(row["id"] for row in json_lines(file)) == sorted(group_id + "/0" for group_id in of_step_1)
    assert [(e.label, e.questions, e.lost) for e in sorted(outcome.ledger.evaluations, key=lambda e: e.step)] == [
        (label, HELD_OUT, 0) for label in ("start", "warm", "step1", "step2", "grpo")
    ]
    assert (outcome.trained, outcome.weights) == (EVERY_GROUP, never_killed.weights)
    outcome.accounts.check()
    assert outcome.accounts.fed == outcome.accounts.released and run.bodies() == []


def test_a_stop_saves_what_was_learned(make_run: Callable[..., RunToKill], never_killed: Outcome) -> None:
    run = make_run()
    assert run.start(Point(NEXT_BATCH, 2), by=signal.SIGTERM) == [0]
    found = Checkpoints(run.folder / "checkpoints", keep=2).latest()
    assert found and found[1].step == 1, "between two checkpoints"
    check(run, run.finish(), never_killed)


def test_a_stop_while_a_version_is_published_leaves_no_gap_in_the_journal(
    make_run: Callable[..., RunToKill], never_killed: Outcome
) -> None:
    """An engine that is slow to read the version of step 1 is waited for when the stop comes."""
    run = make_run()
    slow = EngineReport("slow", "http://127.0.0.1:1", "ready", version=1, staged=1)
    run.stand_in.before_playing = lambda: run.stand_in.board.report(slow)
    assert run.start(Point(PUBLISH, 2), Point(STAGE), by=signal.SIGTERM) == [0]
    assert run.stand_in.board.current() == PolicyVersion(1, str(run.config.weights_folder / "v000001")), (
        "the next was not published"
    )
    assert [row["step"] for row in json_lines(run.folder / "metrics.jsonl") if row["kind"] == "grpo"] == [1]
    run.stand_in.before_playing = lambda: None
    run.stand_in.board.remove("slow")
    check(run, run.finish(), never_killed)


def test_two_ranks_are_killed_in_a_checkpoint_and_go_on(make_run: Callable[..., RunToKill]) -> None:
    measure = make_run(processes=2).finish(ranks=2)
    run = make_run(processes=2)
    assert run.start(*CELLS["checkpoint, after its state"], ranks=2) == [-9, -9], run.log.read_text()[-4000:]
    check(run, run.finish(ranks=2), measure)


def test_a_critic_goes_on_as_the_policy_does(make_run: Callable[..., RunToKill]) -> None:
    measure = make_run(objective={"advantage": "gae", "reference_every": 0}).finish()
    assert all("objective/value_loss" in row for row in measure.rows if row["kind"] == "grpo")
    run = make_run(objective={"advantage": "gae", "reference_every": 0})
    assert run.start(Point(PUBLISH, 4, "after")) == [-9], run.log.read_text()[-4000:]
    check(run, run.finish(), measure)


def test_a_torn_checkpoint_costs_the_steps_since_the_one_before(make_run: Callable[..., RunToKill], never_killed: Outcome) -> None:
    run = make_run()
    assert run.start(*CELLS["learned the last step, saved the one before"]) == [-9]
    newest = max((run.folder / "checkpoints").glob("v*"))
    tensors = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    with tensors.open("r+b") as file:
        file.truncate(tensors.stat().st_size // 2)
    outcome = run.finish()
    assert run.said(f"checkpoint {newest.name} is damaged")
    check(run, outcome, never_killed)


def test_redis_is_killed_and_comes_back_while_a_batch_is_collected(
    make_run: Callable[..., RunToKill], never_killed: Outcome, redis_server: RedisServer
) -> None:
    run = make_run()

    def restart() -> None:
        if run.stand_in.played == 3:
            redis_server.kill()
            time.sleep(1)
            redis_server.start()

    run.stand_in.before_playing = restart
    outcome = run.finish()
    assert run.said("Redis is back")
    check(run, outcome, never_killed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real volume of 3 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("mounting a small volume needs root")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


@pytest.mark.parametrize("room_for_versions", [0, 2])
def test_a_full_volume_is_waited_for(
    make_run: Callable[..., RunToKill], never_killed: Outcome, small_disk: Path, room_for_versions: int
) -> None:
    """It fills up while the second batch is played: at once, or so far that a version and the reference fit, the checkpoint
    does not. Somebody makes room once the trainer has said so."""
    run = make_run(folder=small_disk)
    ballast = small_disk / "ballast"

    def fill() -> None:
        if run.stand_in.played == 3:
            versions = sum(path.stat().st_size for path in (run.config.weights_folder / "v000001").iterdir())
            room = room_for_versions * (versions + 40_000)
            ballast.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - room))
            threading.Thread(target=free_when_told).start()

    def free_when_told() -> None:
        while not run.said("waiting"):
            time.sleep(0.1)
        ballast.unlink()

    run.stand_in.before_playing = fill
    outcome = run.finish()
    assert run.said("the checkpoint needs" if room_for_versions else "version 3 needs")
    check(run, outcome, never_killed)


def test_what_an_asynchronous_run_trains_on_is_within_the_bound(make_run: Callable[..., RunToKill]) -> None:
    run = make_run(max_staleness=2, steps=6, eval_every=0)
    outcome = run.finish()
    rows = [row for row in outcome.rows if row["kind"] == "grpo"]
    histogram = {n: sum(row["staleness/histogram"][n] for row in rows) for n in range(3)}
    print(f"trajectories by staleness: {histogram}, over the bound: {sum(row['staleness/over'] for row in rows):.0f}")
    assert sum(histogram.values()) == 6 * GROUPS * SAMPLES
    assert histogram[1] + histogram[2] > 0, "it ran ahead"
    assert all(row["staleness/over"] == 0 and row["staleness/max"] <= 2 for row in rows)
