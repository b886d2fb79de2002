"""The questions: answerable, unambiguous, split by place, the same every time."""

from __future__ import annotations

from collections import Counter

import pytest

from services.prepare import facts
from services.prepare.factbook import Place
from services.prepare.facts import MAX_WORDS
from services.prepare.kinds import BY_HIGHEST_POINT, TWO_HOP
from services.prepare.passages import Passage
from services.prepare.questions import FactQuestion, build_questions, contains, split_places


@pytest.fixture(scope="module")
def train(places: list[Place]) -> list[FactQuestion]:
    return build_questions(places, split_places(places)[0])


@pytest.fixture(scope="module")
def held_out(places: list[Place]) -> list[FactQuestion]:
    return build_questions(places, split_places(places)[1])


def is_two_hop(question: FactQuestion) -> bool:
    return question.question.source.startswith("two_hop_")


def test_there_are_enough_of_each(train: list[FactQuestion], held_out: list[FactQuestion]) -> None:
    assert len(train) >= 800
    assert len(held_out) >= 200
    assert 0.4 < sum(map(is_two_hop, held_out)) / len(held_out) < 0.6
    assert min(Counter(q.question.source for q in held_out).values()) >= 15


def test_kinds_are_the_same_on_both_sides(train: list[FactQuestion], held_out: list[FactQuestion]) -> None:
    kinds = {q.question.source for q in train}
    assert kinds == {q.question.source for q in held_out}
    assert sum(kind.startswith("two_hop_") for kind in kinds) >= 3
    assert sum(not kind.startswith("two_hop_") for kind in kinds) >= 4


def test_no_held_out_place_is_asked_about_in_training(
    places: list[Place], train: list[FactQuestion], held_out: list[FactQuestion]
) -> None:
    secret = {q.place for q in held_out}
    assert secret.isdisjoint(q.place for q in train)
    gold = {hop.passage.split("/")[0] for q in train for hop in q.hops}
    assert gold.isdisjoint(place.slug for place in places if place.code in secret)


def test_no_training_border_names_a_held_out_place(places: list[Place], train: list[FactQuestion]) -> None:
    held_out = {place.slug for place in split_places(places)[1]}
    named = {slug for q in train if q.question.source == "border_length" for slug in q.question.id.split("+")}
    assert named
    assert named.isdisjoint(held_out)


def test_every_answer_stands_in_its_passage(
    passages: list[Passage], train: list[FactQuestion], held_out: list[FactQuestion]
) -> None:
    contents = {p.id: p.contents for p in passages}
    for q in train + held_out:
        assert q.question.golden_answers[0] in contents[q.hops[-1].passage], q


def test_a_description_stands_in_one_passage_of_its_topic(places: list[Place], passages: list[Passage]) -> None:
    """Checked against the text itself, not against the facts that the questions were made from."""
    texts = [p.text for p in passages if p.topic == BY_HIGHEST_POINT.topic]
    described = [q for q in build_questions(places, places) if q.question.source == "two_hop_capital_by_highest_point"]
    assert len(described) > 100
    for q in described:
        value = q.hops[0].query.removesuffix(" highest point")
        assert sum(contains(text.partition(" is the highest point")[0], value) for text in texts) == 1, value


def test_a_shared_highest_point_describes_nobody(places: list[Place]) -> None:
    """Everest stands in China and in Nepal."""
    everest = [p.code for p in places if (f := facts.highest_point(p)) and "Everest" in f.value]
    assert len(everest) == 2
    asked = [p for p in places if p.code in everest]
    assert not [q for q in build_questions(places, asked) if "by_highest_point" in q.question.source]


def test_answers_are_short_and_not_in_the_question(train: list[FactQuestion], held_out: list[FactQuestion]) -> None:
    for q in train + held_out:
        for answer in q.question.golden_answers:
            assert answer.strip()
            assert not contains(q.question.question, answer), q
        assert len(q.question.golden_answers[0].split()) <= MAX_WORDS


def test_two_hop_questions_do_not_name_the_place(places: list[Place], held_out: list[FactQuestion]) -> None:
    names = {place.code: place.name for place in places}
    assert not [q for q in held_out if is_two_hop(q) and contains(q.question.question, names[q.place])]


def test_hops_end_in_different_passages(held_out: list[FactQuestion]) -> None:
    assert {len(q.hops) for q in held_out if is_two_hop(q)} == {2}
    assert all(q.hops[0].passage != q.hops[1].passage for q in held_out if is_two_hop(q))
    assert all(description.topic != target.topic for description, target in TWO_HOP)


def test_ids_are_unique_within_a_source(train: list[FactQuestion], held_out: list[FactQuestion]) -> None:
    ids = [q.question.example_id for q in train + held_out]
    assert len(set(ids)) == len(ids)


def test_the_same_questions_come_out_again(places: list[Place], held_out: list[FactQuestion]) -> None:
    assert build_questions(places, split_places(places)[1]) == held_out


def test_a_handful_of_places_still_splits(places: list[Place]) -> None:
    train, held_out = split_places(places[:2])
    assert len(train) == len(held_out) == 1


@pytest.mark.parametrize(
    ("text", "part", "expected"),
    [
        ("What is the capital of Mexico?", "Mexico", True),
        ("What is the capital of Mexico?", "Mexico City", False),
        ("the capital of Côte d'Ivoire", "cote d ivoire", True),
        ("the Nigerian capital", "Niger", False),
    ],
)
def test_contains_compares_whole_words(text: str, part: str, expected: bool) -> None:
    assert contains(text, part) is expected
