"""A run over all machines: two trainers that torchrun joins, weights pushed to an engine elsewhere, a machine that is lost."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.contract.groups import GroupStore
from services.trainer.durable.checkpoints import Checkpoints
from tests.machines.conftest import PASSWORD, PUSH_ADDRESS, Suite
from tests.machines.lan import Lan, Process

pytestmark = pytest.mark.timeout(2400)

STEPS, GROUPS, SAMPLES = 4, 2, 2
PATIENCE_S = 30
TRAINER = {"threads": 1, "steps": STEPS, "groups_per_step": GROUPS, "samples_per_prompt": SAMPLES, "checkpoint_every": 1}
TRAINER |= {"eval_questions": 2, "distributed_timeout_s": PATIENCE_S, "learning_rate": 1e-5}
TRAINER |= {"warm_start": {"epochs": 1, "batch_size": 2, "learning_rate": 1e-4}}


class Training:
    """The run, from its first start to its end, and what was said on the way."""

    def __init__(self, suite: Suite) -> None:
        self.lan, self.suite = suite.lan, suite
        self.config = suite.configure("trained", trainer=TRAINER, weights={"transport": "collective", "volume_every": 2})
        self.folder = suite.folder / "runs" / "trained"
        self.lan["trainer1"].add_address(PUSH_ADDRESS)
        self.players = [suite.start("worker", "rollout", self.config), suite.start("grader", "reward", self.config)]
        for player in self.players:
            self.lan.until(lambda player=player: player.ready, f"{player.name} is ready")
        self.first = self.start("first")
        self.lan.until(lambda: self.says(self.first, "step 2/4"), "a step and its checkpoint")
        self.left_alone = self.lose(self.first)
        self.second = self.start("second")
        self.lan.until(lambda: self.says(self.second, "resumed from"), "it goes on")
        with self.lan.cut("trainer1", "head"):
            time.sleep(4)
        self.ends = [process.wait(600) for process in self.second]

    def start(self, attempt: str) -> list[Process]:
        """torchrun on both machines, as in docs/many-machines.md."""
        rendezvous = ("--rdzv-backend=c10d", "--rdzv-endpoint=trainer1:29400", "--rdzv-id=run-1")
        command = ("python", "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *rendezvous)
        command += ("-m", "services.trainer", "--config", str(self.config))
        machines = [self.lan[name] for name in ("trainer1", "trainer2")]
        return [m.start(f"{m.name}-{attempt}", *command, FORAGE_REDIS__PASSWORD=PASSWORD) for m in machines]

    def lose(self, started: list[Process]) -> int:
        """The second machine falls silent, then is switched off; returns how the first one ends, by itself."""
        with self.lan["trainer2"].unplugged():
            ended = started[0].wait(PATIENCE_S * 8)
            self.lan["trainer2"].lose_power()
        return ended

    def says(self, processes: list[Process], text: str) -> bool:
        """Whether the lead has said so; all must be alive."""
        for process in processes:
            assert process.process.poll() is None, f"{process.name} has ended:\n{process.text()[-6000:]}"
        return text in processes[0].text()


@pytest.fixture(scope="module")
def training(network: Suite) -> Iterator[Training]:
    yield Training(network)
    for machine in ("trainer1", "trainer2", "worker", "grader"):
        network.lan[machine].lose_power()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_other_machine_ends_with_an_error_when_one_falls_silent(training: Training) -> None:
    assert training.left_alone != 0
    assert "timed out" in training.first[0].text().lower()


def test_started_again_both_go_on_from_the_checkpoint_to_the_end(training: Training) -> None:
    assert training.ends == [0, 0], training.second[0].text()[-6000:]
    assert "step 1/4" not in training.second[0].text()
    steps = [row["step"] for row in lines(training.folder / "metrics.jsonl") if row["kind"] == "grpo"]
    assert steps == [1, 2, 3, 4]


def test_every_group_was_trained_on_once_and_none_is_left(training: Training) -> None:
    files = sorted((training.folder / "transcripts").glob("step*.jsonl"))
    trained = Counter(row["id"] for path in files for row in lines(path))
    assert len(trained) == STEPS * GROUPS * SAMPLES and set(trained.values()) == {1}
    found = Checkpoints(training.folder / "checkpoints", keep=2).latest()
    assert found and found[1].stage == "done"
    accounts = GroupStore(training.suite.redis(), "trained").accounts()
    accounts.check()
    assert accounts.waiting == accounts.leased == accounts.dead == 0


def test_weights_were_pushed_to_the_engine_on_its_machine(lan: Lan, training: Training) -> None:
    assert "pushed: engines 1," in training.second[0].text()
    assert "its push failed" not in training.second[0].text()
