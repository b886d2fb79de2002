"""Links between machines break for some seconds while episodes are played: nothing is lost, nothing counts twice."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest

from services.contract.groups import GroupStore
from services.contract.messages import GradedNotice, Trajectory
from services.contract.policy import PolicyBoard, PolicyVersion
from tests.factories import make_group, make_sampling
from tests.machines.conftest import Suite, answers
from tests.machines.lan import Lan
from tests.rollout.tiny_model import ANSWER

pytestmark = pytest.mark.timeout(2400)

SAMPLES = 3
CUT_S = 4.0


class Play:
    """A worker and a grader, each on its machine, and the groups that are fed to them."""

    def __init__(self, suite: Suite) -> None:
        self.lan, self.fed = suite.lan, 0
        config = suite.configure("played")
        self.store = GroupStore(suite.redis(), "played")
        PolicyBoard(suite.redis(), "played").commit(PolicyVersion(0, str(suite.folder / "model")))
        self.worker = suite.start("worker", "rollout", config)
        self.grader = suite.start("grader", "reward", config)
        for process in (self.worker, self.grader):
            self.lan.until(lambda process=process: process.ready, f"{process.name} is ready")

    def feed(self, groups: int) -> None:
        for _ in range(groups):
            assert self.store.feed(make_group(f"g{self.fed}", SAMPLES, sampling=make_sampling(temperature=0.0)))
            self.fed += 1

    def announced(self) -> Counter[str]:
        """How often each trajectory was announced as graded."""
        decode = msgspec.msgpack.Decoder(GradedNotice).decode
        entries = self.store.client.xrange(self.store.keys.graded)
        return Counter(decode(fields[b"body"]).trajectory_id for _, fields in entries)  # type: ignore[union-attr]

    def settled(self) -> bool:
        accounts = self.store.accounts()
        return accounts.waiting + accounts.leased + accounts.ungraded == 0

    def check(self) -> None:
        """Every sample that was fed has been played whole, with what the retriever finds, and graded once."""
        self.lan.until(self.settled, "all that was fed is graded")
        ids = [f"g{group}/{sample}" for group in range(self.fed) for sample in range(SAMPLES)]
        assert self.announced() == Counter(ids)
        self.store.accounts().check()
        assert self.store.accounts().dead == 0
        for trajectory in self.store.load_many(ids):
            assert trajectory and found(trajectory) == ["0", "1"]
            assert (trajectory.status, trajectory.answer, trajectory.reward) == ("completed", ANSWER, 1.0)


def found(trajectory: Trajectory) -> list[str]:
    """Ids of the passages that it was shown."""
    return [passage.id for span in trajectory.spans for passage in span.passages]


@pytest.fixture(scope="module")
def play(network: Suite) -> Iterator[Play]:
    play = Play(network)
    yield play
    for machine in ("worker", "grader"):
        network.lan[machine].lose_power()


CUTS = [("worker", "head"), ("worker", "balancer"), ("worker", "engine"), ("grader", "head"), ("balancer", "retriever1")]


@pytest.mark.parametrize("cut", CUTS, ids="-".join)
def test_a_cut_link_loses_nothing_and_doubles_nothing(lan: Lan, play: Play, cut: tuple[str, str]) -> None:
    play.feed(3)
    with lan.cut(*cut):
        play.feed(3)
        time.sleep(CUT_S)
    play.check()


def test_redis_unplugged_for_some_seconds_is_waited_for(lan: Lan, play: Play) -> None:
    play.feed(3)
    with lan["head"].unplugged():
        time.sleep(CUT_S)
    play.feed(3)
    play.check()


def test_a_retriever_that_dies_in_the_middle_costs_no_episode(lan: Lan, play: Play, network: Suite) -> None:
    play.feed(4)
    lan.until(lambda: play.store.client.keys(play.store.keys.trajectory(f"g{play.fed - 4}/*")), "the first episodes are over")
    lan["retriever1"].lose_power()
    play.feed(4)
    play.check()
    network.start("retriever1", "retriever", network.folder / "search.toml", "serve")
    lan.until(lambda: answers(lan, "http://retriever1:8000/ready"), "it is back")
