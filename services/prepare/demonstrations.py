"""Worked examples for the warm start: training questions, one natural query a hop, what the retriever really returns.

A question whose gold passage is not among the passages returned is passed over, so that no demonstration answers from
what it has not read. Kinds take turns. The same retriever gives the same file.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from services.contract.messages import Demonstration, Segment
from services.contract.telemetry import Progress
from services.contract.transcript import SEARCH_R1, Layout, observation
from services.prepare.errors import PrepareError
from services.prepare.questions import FactQuestion
from services.prepare.retrieval import Found

logger = logging.getLogger("prepare")

Retrieve = Callable[[Sequence[str]], list[list[Found]]]


def write_demonstrations(
    path: Path,
    questions: Sequence[FactQuestion],
    retrieve: Retrieve,
    count: int,
    think: bool,
    seed: int,
    layout: Layout = SEARCH_R1,
) -> None:
    """`count` demonstrations, fewer with a warning if the questions give no more. Raises PrepareError if they give none."""
    made: list[tuple[str, Demonstration]] = []
    with Progress("demonstrations", total=count, unit="examples") as bar:
        for batch in _batches(take_turns(questions, seed), count):
            for question, demonstration in _demonstrate(batch, retrieve, think, layout):
                if demonstration and len(made) < count:
                    made.append((question.question.source, demonstration))
                    bar.advance()
            if len(made) == count:
                break
    if not made and count:
        raise PrepareError(
            f"none of {len(questions)} questions found its passage: does the retriever serve this run's corpus? "
            "Check retriever.url and restart the retriever"
        )
    if len(made) < count:
        logger.warning("only %d demonstrations instead of %d: no more questions found their passage", len(made), count)
    logger.info("demonstrations by kind: %s", ", ".join(f"{k} {n}" for k, n in Counter(s for s, _ in made).items()))
    path.write_bytes(b"".join(msgspec.json.encode(demonstration) + b"\n" for _, demonstration in made))


def take_turns(questions: Sequence[FactQuestion], seed: int) -> list[FactQuestion]:
    """Shuffled within each kind, then one of every kind after the other; the kinds are shuffled too, as a few may have to do."""
    kinds: dict[str, list[FactQuestion]] = defaultdict(list)
    for question in questions:
        kinds[question.question.source].append(question)
    for name, members in kinds.items():
        random.Random(f"{seed}/{name}").shuffle(members)
    names = sorted(kinds)
    random.Random(seed).shuffle(names)
    rounds = itertools.zip_longest(*(kinds[name] for name in names))
    return [question for each in rounds for question in each if question]


def _batches(questions: Sequence[FactQuestion], size: int) -> Iterator[Sequence[FactQuestion]]:
    """At most `size` at once: as many as are wanted, then as many again should some fail."""
    size = max(1, min(size, 32))
    return (questions[start : start + size] for start in range(0, len(questions), size))


def _demonstrate(
    batch: Sequence[FactQuestion], retrieve: Retrieve, think: bool, layout: Layout
) -> Iterator[tuple[FactQuestion, Demonstration | None]]:
    answers = iter(retrieve([hop.query for question in batch for hop in question.hops]))
    for question in batch:
        yield question, demonstrate(question, [next(answers) for _ in question.hops], think, layout)


def demonstrate(
    asked: FactQuestion, found: Sequence[Sequence[Found]], think: bool, layout: Layout = SEARCH_R1
) -> Demonstration | None:
    """The worked example, or None when a hop's gold passage is not among what was found for it."""
    segments: list[Segment] = []
    for hop, passages in zip(asked.hops, found, strict=True):
        if hop.passage not in {passage.id for passage in passages}:
            return None
        search = _think(f"I look for {hop.purpose}.", think) + f"<search>{hop.query}</search>"
        shown = observation([passage.contents for passage in passages], layout)
        segments += [Segment("model", search), Segment("observation", shown)]
    answer = asked.question.golden_answers[0]
    closing = _think(f"The passages say that it is {answer}.", think) + f"<answer>{answer}</answer>"
    segments.append(Segment("model", closing))
    return Demonstration(asked.question.example_id, asked.question.question, segments)


def _think(sentence: str, wanted: bool) -> str:
    return f"<think>{sentence}</think>\n" if wanted else ""
