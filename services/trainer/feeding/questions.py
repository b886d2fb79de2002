"""Which question comes when: training questions in a seeded order without end, held-out ones evenly from every kind.

Where the run is in that order, its ledger says: the number of the next question, and those after it that are done already.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import chain, zip_longest
from pathlib import Path

import msgspec

from services.contract.config import Config, ConfigError, mix_problem
from services.contract.messages import PromptGroup, Question, Sampling
from services.contract.transcript import build_prompt

CYCLE = 1000
"""Questions over which a mixture has exactly its shares."""


def read_questions(path: Path) -> list[Question]:
    """Raises ConfigError naming file, line and fault."""
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist: run `prepare`, or name your files in data.train_questions and data.eval_questions"
        )
    decode = msgspec.json.Decoder(Question).decode
    questions = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                questions.append(decode(line))
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path}, line {number}: {error}; correct the line or take it out") from None
    if not questions:
        raise ConfigError(
            f"{path} holds no question: run `prepare` again, or name another file in data.train_questions and data.eval_questions"
        )
    return questions


class Stream:
    """Questions without end: each epoch is its own shuffle of all of them."""

    def __init__(self, questions: Sequence[Question], key: str) -> None:
        self._questions, self._key = questions, key
        self._shuffle = lru_cache(maxsize=2)(self._shuffled)  # of each stream: they are asked in turns

    def __getitem__(self, position: int) -> Question:
        epoch, place = divmod(position, len(self._questions))
        return self._questions[self._shuffle(epoch)[place]]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._questions)))
        random.Random(f"{self._key}/{epoch}").shuffle(order)
        return order


class TrainingOrder:
    """Question number 0, 1, 2 … of the run: a pure function of the questions, the seed and the number, so the cursor is a number.

    | `data.mix` | order                                                                                                    |
    |------------|----------------------------------------------------------------------------------------------------------|
    | empty      | one stream of all questions: each once an epoch                                                          |
    | weights    | one stream a source, each with its own epochs. Numbers go in cycles of 1,000 (0 to 999, 1000 to 1999 …), |
    |            | and in every cycle each source has the same number of places, as near to its weight as 1,000 allow (at   |
    |            | least one, unless it weighs 0); which places they are is drawn by the seed, for each cycle anew          |

    Raises ConfigError when `mix` and the questions do not name the same sources.
    """

    def __init__(self, questions: Sequence[Question], seed: int, mix: Mapping[str, float] | None = None) -> None:
        self.questions, self.seed, self.mix = questions, seed, dict(mix or {})
        by_source = by_source_of(questions)
        if problem := mix_problem(self.mix, by_source):
            raise ConfigError(problem)
        self._places = cycle_places(self.mix)
        self._all = Stream(questions, f"{seed}")
        self._streams = {source: Stream(by_source[source], f"{seed}/{source}") for source in self._places}
        self._draw = lru_cache(maxsize=2)(self._drawn)

    def __getitem__(self, index: int) -> Question:
        if not self._places:
            return self._all[index]
        cycle, place = divmod(index, CYCLE)
        source, earlier = self._draw(cycle)[place]
        return self._streams[source][cycle * self._places[source] + earlier]

    def _drawn(self, cycle: int) -> list[tuple[str, int]]:
        """For each place of the cycle: the source, and how many of its places come before."""
        order = [source for source, places in self._places.items() for _ in range(places)]
        random.Random(f"{self.seed}/mix/{cycle}").shuffle(order)
        earlier: Counter[str] = Counter()
        drawn = []
        for source in order:
            drawn.append((source, earlier[source]))
            earlier[source] += 1
        return drawn

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever a number may mean another question."""
        digest = hashlib.blake2b(f"{self.seed}/{sorted(self.mix.items())}".encode(), digest_size=16)
        for question in self.questions:
            digest.update(f"{question.example_id}\0".encode())
        return digest.hexdigest()


def cycle_places(mix: Mapping[str, float]) -> dict[str, int]:
    """Places of each source among CYCLE, by the largest remainder; sources of weight 0 are left out."""
    weights = {source: weight for source, weight in sorted(mix.items()) if weight > 0}
    exact = {source: CYCLE * weight / sum(weights.values()) for source, weight in weights.items()}
    places = {source: max(1, int(share)) for source, share in exact.items()}
    if not places:
        return {}
    by_remainder = sorted(exact, key=lambda source: places[source] - exact[source])
    for number in range(CYCLE - sum(places.values())):
        places[by_remainder[number % len(by_remainder)]] += 1
    while sum(places.values()) > CYCLE:  # the smallest were given one place each: the largest pays
        places[max(places, key=lambda source: places[source])] -= 1
    return places


def by_source_of(questions: Iterable[Question]) -> dict[str, list[Question]]:
    """In the order of the file."""
    found: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        found[question.source].append(question)
    return found


def stratified(questions: list[Question], count: int, seed: int) -> list[Question]:
    """`count` questions (0: all), as evenly as possible from every source, the same ones every time."""
    if count == 0 or count >= len(questions):
        return questions
    by_source = sorted(by_source_of(questions).items())
    shuffled = [random.Random(f"{seed}/{source}").sample(rows, len(rows)) for source, rows in by_source]
    return [question for question in chain(*zip_longest(*shuffled)) if question is not None][:count]


def training_group_id(index: int) -> str:
    return f"t{index:08d}"


def training_index(group_id: str) -> int | None:
    """The inverse of `training_group_id`; None for any other group."""
    return int(group_id[1:]) if group_id[:1] == "t" and group_id[1:].isdigit() else None


def make_group(config: Config, group_id: str, question: Question, version: int, *, evaluate: bool) -> PromptGroup:
    """A training group is sampled `samples_per_prompt` times; an evaluation `eval_samples` times, greedily at temperature 0."""
    data, rollout, trainer = config.data, config.rollout, config.trainer
    return PromptGroup(
        group_id=group_id,
        purpose="eval" if evaluate else "train",
        example_id=question.example_id,
        source=question.source,
        question=question.question,
        golden_answers=question.golden_answers,
        prompt=build_prompt(question.question, data.instruction, data.system, data.chat_template, question.prompt),
        samples=trainer.eval_samples if evaluate else trainer.samples_per_prompt,
        sampling=Sampling(
            temperature=trainer.eval_temperature if evaluate else rollout.temperature,
            top_p=1.0 if evaluate else rollout.top_p,
            max_turn_tokens=rollout.max_turn_tokens,
            max_response_tokens=rollout.max_response_tokens,
            max_observation_tokens=rollout.max_observation_tokens,
            max_searches=rollout.searches,
            topk=rollout.topk,
            max_invalid_actions=rollout.max_invalid_actions,
            episode_deadline_s=rollout.episode_deadline_s,
            slow_engine_tokens_per_s=rollout.slow_engine_tokens_per_s,
            layout=rollout.layout,
        ),
        issued_version=version,
        deadline_s=rollout.group_deadline_s,
    )
