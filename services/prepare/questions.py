"""One-hop and two-hop questions over the Factbook, split by place.

* One hop: a property of a named place ("What is the capital of Chad?").
* Two hops: the place is described by another of its facts ("... of the country whose highest point is Emi Koussi?").
  A describing fact must belong to one place only, and stand in another passage than the answer.
* A place is held out or it is not: no place that an evaluation question asks about, by name or by description, is asked
  about in training.

Left out: answers that are empty, ambiguous, longer than six words, already in the question, not in the passage word for
word, or shared by so many places that they can be guessed.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.contract.messages import Question
from services.prepare import facts
from services.prepare.factbook import Place, plain
from services.prepare.facts import Fact
from services.prepare.kinds import BORDER, PROPERTIES, TWO_HOP, Description, Property
from services.prepare.passages import passage_id, place_passages

HELD_OUT = 0.3
"""Share of the places whose questions are kept for evaluation."""
SHARED_BY_AT_MOST = 10
"""An answer that more places share ("EUR") teaches guessing."""


@dataclass(frozen=True)
class Hop:
    query: str
    passage: str
    """The gold passage's id."""
    purpose: str
    """What is being looked up, to be said before searching."""


@dataclass(frozen=True)
class FactQuestion:
    """A question together with the way to its answer."""

    question: Question
    place: str
    hops: tuple[Hop, ...]


def split_places(places: Sequence[Place]) -> tuple[list[Place], list[Place]]:
    """(training, held out): those with the lowest hashes are held out, at least one on each side."""
    ranked = sorted(places, key=lambda place: _hash(place.code))
    count = min(max(1, round(HELD_OUT * len(ranked))), len(ranked) - 1)
    held_out = {place.code for place in ranked[:count]}
    return [p for p in places if p.code not in held_out], [p for p in places if p.code in held_out]


def build_questions(places: Sequence[Place], asked: Sequence[Place]) -> list[FactQuestion]:
    """Questions about the places in `asked`; `places` are all in the corpus, among which facts must be unique."""
    texts = {p.id: p.text for place in places for p in place_passages(place)}
    common = {prop.name: _shared_answers(prop, places) for prop in PROPERTIES}
    found = [*_one_hop(asked), *_two_hop(places, asked, texts), *_borders(asked)]
    return [q for q in found if _usable(q, texts, common)]


def _one_hop(asked: Sequence[Place]) -> Iterator[FactQuestion]:
    for prop in PROPERTIES:
        for place in asked:
            if fact := prop.read(place):
                yield _question(prop.name, place, place.slug, prop, fact, place.phrase, ())


def _two_hop(places: Sequence[Place], asked: Sequence[Place], texts: dict[str, str]) -> Iterator[FactQuestion]:
    ambiguous = {each: _ambiguous(each, places) for each in {description for description, _ in TWO_HOP}}
    for description, target in TWO_HOP:
        for place in asked:
            given, fact = description.read(place), target.read(place)
            passage = passage_id(place, description.topic)
            if given and fact and given.value not in ambiguous[description] and given.value in texts.get(passage, ""):
                kind = f"two_hop_{target.name}_by_{description.name}"
                phrase = _pick(description.phrasings, kind, place.slug).format(value=given.value)
                hop = Hop(description.query.format(value=given.value), passage, phrase)
                yield _question(kind, place, place.slug, target, fact, phrase, (hop,))


def _borders(asked: Sequence[Place]) -> Iterator[FactQuestion]:
    """Only between places on the same side of the split: both are named."""
    by_name = {place.name: place for place in asked}
    for place in asked:
        for other, fact in facts.border_lengths(place).items():
            if other in by_name and place.name < other:
                prop = _between(BORDER, by_name[other])
                yield _question(BORDER.name, place, f"{place.slug}+{by_name[other].slug}", prop, fact, place.phrase, ())


def _between(prop: Property, other: Place) -> Property:
    phrasings = tuple(p.replace("{other}", other.phrase) for p in prop.phrasings)
    return Property(prop.name, prop.topic, prop.read, phrasings, prop.query.replace("{other}", other.name))


def _question(kind: str, place: Place, id: str, prop: Property, fact: Fact, phrase: str, before: tuple[Hop, ...]) -> FactQuestion:
    text = _pick(prop.phrasings, kind, id).format(place=phrase)
    purpose = f"the {prop.name.replace('_', ' ')} of {place.phrase}"
    hop = Hop(prop.query.format(place=place.name), passage_id(place, prop.topic), purpose)
    return FactQuestion(Question(id, kind, text, fact.answers), place.code, (*before, hop))


def _usable(found: FactQuestion, texts: dict[str, str], common: dict[str, set[str]]) -> bool:
    question, gold = found.question, [hop.passage for hop in found.hops]
    asked = question.source.removeprefix("two_hop_").partition("_by_")[0]
    answer = question.golden_answers[0]
    return (
        all(passage in texts for passage in gold)
        and len(set(gold)) == len(gold)
        and answer in texts[gold[-1]]
        and contains(texts[gold[-1]], answer)
        and answer not in common.get(asked, set())
        and not any(contains(question.question, form) for form in question.golden_answers)
    )


def _shared_answers(prop: Property, places: Sequence[Place]) -> set[str]:
    counts = Counter(fact.value for place in places if (fact := prop.read(place)))
    return {value for value, count in counts.items() if count > SHARED_BY_AT_MOST}


def _ambiguous(description: Description, places: Sequence[Place]) -> set[str]:
    """Values that are, contain, or are contained in a form of another place's fact, or name the place they describe."""
    given = [(place, fact) for place in places if (fact := description.read(place))]
    return {
        fact.value
        for place, fact in given
        if contains(fact.value, place.name) or any(_alike(fact, other) for owner, other in given if owner is not place)
    }


def _alike(one: Fact, other: Fact) -> bool:
    return any(contains(a, b) or contains(b, a) for a in (one.value,) for b in other.answers)


def contains(text: str, part: str) -> bool:
    """Whether the words of `part` stand in `text` in a row; case, accents and punctuation do not count."""
    return f" {_words(part)} " in f" {_words(text)} "


@functools.cache
def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", plain(text).lower()))


def _pick(options: Sequence[str], *key: str) -> str:
    return options[_hash(*key) % len(options)]


def _hash(*key: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(key).encode(), digest_size=8).digest(), "big")
