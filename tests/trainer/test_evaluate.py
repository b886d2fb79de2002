"""An evaluation: what it counts, what one that was killed in the middle finds again, and one beside the training."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis

from services.contract.config import Config
from services.contract.grading_tries import GradingTries
from services.contract.groups import GroupStore, Lease
from services.contract.messages import Question
from services.contract.scores import Evaluation
from services.trainer.durable.ledger import Ledger, PendingEvaluation
from services.trainer.evaluation.evaluate import Evaluator, feed
from services.trainer.feeding.batch import Batches
from services.trainer.feeding.collect import Collector
from services.trainer.feeding.questions import TrainingOrder
from tests.factories import grade, make_trajectory

PARTS = {"exact_match": 0.0, "sub_match": 1.0, "f1": 0.5, "format": 1.0}


@pytest.fixture
def store(redis_client: redis.Redis) -> GroupStore:
    return GroupStore(redis_client, "test")


class Bench:
    """An evaluator as a trainer's process has it; a second one on the same folder is the next process."""

    def __init__(self, store: GroupStore, folder: Path, questions: int = 2, **trainer: object) -> None:
        self.config = Config.model_validate({"trainer": {"groups_per_step": 2, "samples_per_prompt": 2, **trainer}})
        self.questions = [Question(str(i), "capital", f"Question {i}?", ["Paris"]) for i in range(questions)]
        self.store, self.folder = store, folder
        self.collector = Collector(store, timeout_s=30, check_stop=lambda: None)
        self.evaluator = Evaluator(self.config, store, self.collector, self.questions, folder)

    def answers(self, label: str, step: int = 0) -> list[dict]:
        return [json.loads(line) for line in (self.folder / f"{label}-step{step:06d}.jsonl").read_text().splitlines()]


def lease(store: GroupStore, count: int) -> list[Lease]:
    leases: list[Lease] = []
    while len(leases) < count:
        leases += store.lease("worker", count - len(leases), 100)
    return leases


def play(store: GroupStore, held: Lease, version: int = 0, exact_match: float = 1.0) -> None:
    """As a worker and a grader do."""
    for name in held.group.trajectory_ids():
        store.store(make_trajectory(held.group.group_id, int(name.rpartition("/")[2]), versions=(version,)))
        assert grade(store, name, exact_match, **PARTS | {"exact_match": exact_match})
    store.finish(held)  # the evaluator may have taken the group already


class Player:
    """Plays every group that is fed with `version`, from a thread; notes what it played."""

    def __init__(self, store: GroupStore, version: int) -> None:
        self.store, self.version, self.played = store, version, []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Player:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            for held in self.store.lease("worker", 1, 50):
                play(self.store, held, self.version)
                self.played.append(held.group.group_id)


@pytest.fixture
def bench(store: GroupStore, tmp_path: Path) -> Iterator[Bench]:
    yield Bench(store, tmp_path)
    store.accounts().check()


def play_one_and_bury_one(store: GroupStore) -> None:
    first, second = lease(store, 2)
    play(store, first, exact_match=0.0)
    store.store(make_trajectory(second.group.group_id))
    assert store.finish(second)
    tries = GradingTries(store.client, "test")
    attempt = tries.begin(f"{second.group.group_id}/0", 1)
    assert attempt and tries.bury(attempt, "no such judge", 1)


def test_the_parts_of_the_reward_are_averaged_and_what_was_given_up_counts_as_wrong(bench: Bench) -> None:
    worker = threading.Thread(target=play_one_and_bury_one, args=[bench.store])
    worker.start()
    evaluation = bench.evaluator.evaluate("start", version=0, step=0)
    worker.join()
    assert (evaluation.questions, evaluation.exact_match, evaluation.sub_match, evaluation.f1) == (2, 0.0, 0.5, 0.25)
    assert evaluation.by_source["capital"]["f1"] == 0.25 and evaluation.lost == 1
    assert evaluation.searches == 0.5, "its searches are those that the retriever answered"
    (row,) = bench.answers("start")
    assert row["parts"] == PARTS and row["response"]
    assert bench.store.in_flight() == set()


def test_only_the_version_that_is_asked_for_counts(bench: Bench) -> None:
    def answer_by_an_older_one_first() -> None:
        held = lease(bench.store, 1)[0]
        play(bench.store, held, version=2)
        with Player(bench.store, version=3) as player:
            while len(player.played) < 2:
                pass

    worker = threading.Thread(target=answer_by_an_older_one_first)
    worker.start()
    evaluation = bench.evaluator.evaluate("step5", version=3, step=5)
    worker.join()
    assert (evaluation.lowest_version, evaluation.highest_version) == (3, 3)
    assert {v for row in bench.answers("step5", 5) for v in row["versions"]} == {3}


def test_samples_are_drawn_at_the_temperature_that_is_set_and_give_pass_at_k(store: GroupStore, tmp_path: Path) -> None:
    bench = Bench(store, tmp_path, eval_samples=2, eval_temperature=0.7)
    seen: list[Lease] = []

    def half_right() -> None:
        for place, held in enumerate(lease(store, 2)):
            seen.append(held)
            play(store, held, exact_match=float(place == 0))

    worker = threading.Thread(target=half_right)
    worker.start()
    evaluation = bench.evaluator.evaluate("start", version=0, step=0)
    worker.join()
    assert {held.group.sampling.temperature for held in seen} == {0.7} and {held.group.samples for held in seen} == {2}
    assert evaluation.samples == 2 and evaluation.pass_at == {"pass@1": 0.5, "pass@2": 0.5}
    assert len(bench.answers("start")) == 4


def test_a_question_that_died_is_not_fed_again_before_its_letter_is_read(bench: Bench) -> None:
    pending = PendingEvaluation("step3", 0, 3)
    bench.evaluator.begin(pending)
    first, second = lease(bench.store, 2)
    play(bench.store, second)
    groups, letters = bench.collector.ready(lambda group_id: 1)  # the letter is not there yet
    assert letters == [] and len(groups) == 1
    assert bench.store.bury(first, "broken")
    book, _ = bench.evaluator._beside[pending]
    feed(bench.store, book)
    assert bench.store.in_flight() == {second.group.group_id}


def test_a_letter_of_a_group_that_was_fed_again_since_says_nothing(bench: Bench) -> None:
    bench.evaluator.begin(PendingEvaluation("step3", 0, 3))
    first, second = lease(bench.store, 2)
    assert bench.store.bury(first, "broken")
    assert bench.store.feed(first.group), "as a process that knows nothing of its death does"
    play(bench.store, second)
    assert bench.evaluator.gather() == []
    play(bench.store, lease(bench.store, 1)[0])
    ((_, evaluation),) = bench.evaluator.gather()
    assert evaluation.lost == 0 and evaluation.exact_match == 1.0


# -- killed in the middle ----------------------------------------------------------------------------------------------


def test_answers_that_had_come_are_kept_and_only_the_others_are_asked_again(store: GroupStore, tmp_path: Path) -> None:
    first = Bench(store, tmp_path, questions=4)
    pending = PendingEvaluation("start", 0, 0)
    first.evaluator.begin(pending)
    for held in lease(store, 2):
        play(store, held)
    assert first.evaluator.gather() == [] and len(first.answers("start")) == 2
    with (tmp_path / "start-step000000.jsonl").open("a") as file:
        file.write('{"id": "e-start-v0-00002/0", "sour')  # the process was killed while it wrote
    again = Bench(store, tmp_path, questions=4)
    worker = threading.Thread(target=lambda: [play(store, held) for held in lease(store, 2)])
    worker.start()
    evaluation = again.evaluator.evaluate("start", version=0, step=0)
    worker.join()
    assert evaluation.questions == 4 and evaluation.exact_match == 1.0
    ids = [row["id"] for row in again.answers("start")]
    assert len(ids) == len(set(ids)) == 4
    assert store.accounts().fed == 4, "nothing was fed twice"


def test_a_group_in_the_file_that_was_not_released_is_released_by_the_next_process(
    store: GroupStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Bench(store, tmp_path)
    first.evaluator.begin(PendingEvaluation("start", 0, 0))
    for held in lease(store, 2):
        play(store, held)
    with monkeypatch.context() as killed_before_it_could:
        killed_before_it_could.setattr("services.trainer.evaluation.evaluate.release", lambda *_: None)
        first.evaluator.gather()
    assert len(store.in_flight()) == 2
    again = Bench(store, tmp_path)
    assert again.evaluator.evaluate("start", version=0, step=0).exact_match == 1.0
    assert store.in_flight() == set()
    store.accounts().check()


def test_groups_of_a_version_that_a_crash_undid_are_forgotten(store: GroupStore, tmp_path: Path) -> None:
    Bench(store, tmp_path).evaluator.begin(PendingEvaluation("step5", 6, 5))
    again = Bench(store, tmp_path)
    again.evaluator.begin(PendingEvaluation("step5", 8, 5))
    assert store.in_flight() == {"e-step5-v8-00000", "e-step5-v8-00001"}
    assert again.answers("step5", 5) == []


# -- beside the training -----------------------------------------------------------------------------------------------


def test_training_goes_on_while_an_evaluation_is_answered_by_whatever_version_serves(store: GroupStore, tmp_path: Path) -> None:
    bench, ledger = Bench(store, tmp_path, max_staleness=1), Ledger(version=3)
    batches = Batches(bench.config, store, bench.collector, TrainingOrder(bench.questions, seed=0), ledger)
    bench.evaluator.begin(PendingEvaluation("step3", 3, 3))
    with Player(store, version=3) as player:
        assert len(batches.next_batch()) == 2
    assert {g[0] for g in player.played} == {"e", "t"}
    (evaluation,) = [e for _, e in bench.evaluator.gather()]
    assert evaluation.exact_match == 1.0 and (evaluation.lowest_version, evaluation.highest_version) == (3, 3)
    assert bench.evaluator.gather() == []


def test_an_evaluation_tells_the_lowest_and_the_highest_version_that_answered(bench: Bench) -> None:
    bench.evaluator.begin(PendingEvaluation("step3", 3, 3))
    for version, held in zip((3, 5), lease(bench.store, 2), strict=True):
        play(bench.store, held, version)
    ((pending, evaluation),) = bench.evaluator.finish()
    assert pending.label == "step3"
    assert (evaluation.version, evaluation.lowest_version, evaluation.highest_version) == (3, 3, 5)


def test_a_question_that_dies_while_training_reads_the_letters_counts_as_wrong(store: GroupStore, tmp_path: Path) -> None:
    bench = Bench(store, tmp_path)
    batches = Batches(bench.config, store, bench.collector, TrainingOrder(bench.questions, seed=0), Ledger())
    bench.evaluator.begin(PendingEvaluation("step3", 0, 3))
    first, second = lease(store, 2)
    assert store.bury(first, "broken")
    play(store, second)
    with Player(store, version=0):
        assert len(batches.next_batch()) == 2
    ((_, evaluation),) = bench.evaluator.gather()
    assert evaluation.lost == 1 and evaluation.exact_match == 0.5


def test_the_next_process_goes_on_with_an_evaluation_that_the_ledger_lists(store: GroupStore, tmp_path: Path) -> None:
    pending = [PendingEvaluation("step3", 3, 3), PendingEvaluation("step6", 6, 6)]
    first = Bench(store, tmp_path)
    for each in pending:
        first.evaluator.begin(each)
    play(store, lease(store, 1)[0], version=3)
    first.evaluator.gather()
    again = Bench(store, tmp_path)
    again.evaluator.resume(pending)
    with Player(store, version=7):
        done = again.evaluator.finish()
    assert [(p.label, e.lowest_version, e.highest_version) for p, e in done] == [("step3", 3, 7), ("step6", 7, 7)]
    assert store.accounts().fed == 4


@pytest.mark.parametrize("field", ["f1", "sub_match"])
def test_an_evaluation_of_an_older_ledger_can_be_read(field: str) -> None:
    older = {"label": "start", "version": 0, "step": 0, "questions": 1, "exact_match": 0.5, "format": 1.0, "searches": 1.0}
    older |= {"answered": 1.0, "by_source": {}, "seconds": 1.0}
    assert getattr(msgspec.convert(older, Evaluation), field) is None
