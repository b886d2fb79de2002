"""Which question comes when: every one once an epoch, sources by their weights, the same after a restart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contract.config import ConfigError
from services.contract.messages import Question
from services.trainer.durable.ledger import Ledger
from services.trainer.feeding.questions import CYCLE, TrainingOrder, cycle_places, read_questions

SIZES = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 40), min_size=1, max_size=5)
WEIGHTS = st.floats(0.001, 1000)


def questions(sizes: dict[str, int]) -> list[Question]:
    return [Question(str(number), source, "?", ["x"]) for source, size in sizes.items() for number in range(size)]


@settings(deadline=None)
@given(SIZES, st.integers(0, 9), st.integers(1, 4))
def test_without_weights_every_question_comes_once_an_epoch(sizes: dict[str, int], seed: int, epochs: int) -> None:
    rows = questions(sizes)
    order = TrainingOrder(rows, seed)
    for epoch in range(epochs):
        asked = [order[epoch * len(rows) + place].example_id for place in range(len(rows))]
        assert sorted(asked) == sorted(question.example_id for question in rows)


@settings(max_examples=25, deadline=None)
@given(SIZES, st.data(), st.integers(0, 9))
def test_with_weights_every_source_goes_through_its_own_epochs(sizes: dict[str, int], data: st.DataObject, seed: int) -> None:
    mix = {source: data.draw(WEIGHTS) for source in sizes}
    order = TrainingOrder(questions(sizes), seed, mix)
    asked: dict[str, list[str]] = {source: [] for source in sizes}
    for index in range(2 * CYCLE):
        asked[order[index].source].append(order[index].id)
    for source, size in sizes.items():
        whole = len(asked[source]) // size * size
        for start in range(0, whole, size):
            assert sorted(asked[source][start : start + size]) == sorted(map(str, range(size)))


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1), WEIGHTS, min_size=1, max_size=20))
def test_a_cycle_has_each_source_as_its_weight_says(mix: dict[str, float]) -> None:
    places, total = cycle_places(mix), sum(mix.values())
    assert sum(places.values()) == CYCLE
    assert min(places.values()) >= 1
    raised = sum(weight / total * CYCLE < 1 for weight in mix.values())
    assert all(abs(places[source] - weight / total * CYCLE) < 1 + raised for source, weight in mix.items())


@pytest.mark.parametrize("start", [0, 17, CYCLE - 1, CYCLE, 5 * CYCLE + 321])
def test_the_order_after_a_restart_is_the_order_before_it(start: int) -> None:
    rows, mix = questions({"nq": 700, "hotpotqa": 900}), {"nq": 1.0, "hotpotqa": 2.0}
    whole = TrainingOrder(rows, 3, mix)
    before = [whole[index] for index in range(start + 50)]
    after = TrainingOrder(rows, 3, mix)
    assert [after[index] for index in range(start, start + 50)] == before[start:]


def test_two_to_one_is_two_to_one() -> None:
    order = TrainingOrder(questions({"nq": 5, "hotpotqa": 2000}), 0, {"nq": 2, "hotpotqa": 1})
    assert Counter(order[index].source for index in range(CYCLE)) == {"nq": 667, "hotpotqa": 333}


def test_a_source_of_weight_0_is_left_out() -> None:
    order = TrainingOrder(questions({"nq": 5, "hotpotqa": 5}), 0, {"nq": 1, "hotpotqa": 0})
    assert {order[index].source for index in range(CYCLE)} == {"nq"}


def test_cycles_differ_and_seeds_differ() -> None:
    rows, mix = questions({"a": 9, "b": 9}), {"a": 1.0, "b": 1.0}
    order, other = TrainingOrder(rows, 0, mix), TrainingOrder(rows, 1, mix)
    first = [order[index].source for index in range(CYCLE)]
    assert first != [order[index].source for index in range(CYCLE, 2 * CYCLE)]
    assert first != [other[index].source for index in range(CYCLE)]


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"nq": 1.0}, "gives no weight to hotpotqa: add it, 0 leaves"),
        ({"nq": 1, "hotpotqa": 1, "np": 1}, "names np, of which there"),
    ],
)
def test_a_mixture_that_does_not_fit_the_questions_is_refused(mix: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingOrder(questions({"nq": 1, "hotpotqa": 1}), 0, mix)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"mix": {"nq": 2.0}}, {"rows": {"nq": 4}}])
def test_another_order_than_the_checkpoints_is_noticed(changed: dict) -> None:
    def order(seed: int = 0, mix: dict[str, float] | None = None, rows: dict[str, int] | None = None) -> str:
        return TrainingOrder(questions(rows or {"nq": 3}), seed, mix).fingerprint

    ledger = Ledger(next_index=2)
    assert [ledger.count_in(o, samples=4) for o in (order(), order(), order(**changed))] == [False, False, True]


def test_another_number_of_samples_is_noticed() -> None:
    ledger = Ledger(order="as it was")
    assert [ledger.count_in("as it was", samples) for samples in (4, 4, 5)] == [False, False, True]


def test_a_broken_line_is_told_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"id": "1", "source": "s", "question": "?", "golden_answers": ["x"]}\n{"id": 1}\n')
    with pytest.raises(ConfigError, match=r"q.jsonl, line 2: "):
        read_questions(path)
