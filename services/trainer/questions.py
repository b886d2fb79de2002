"""Which question comes when: training questions in a seeded order without end, held-out ones evenly from every kind."""

from __future__ import annotations

import random
from collections import defaultdict
from functools import lru_cache
from itertools import chain, zip_longest
from pathlib import Path

import msgspec

from services.contract.config import Config, ConfigError
from services.contract.messages import PromptGroup, Question, Sampling
from services.contract.transcript import build_prompt


def read_questions(path: Path) -> list[Question]:
    """Raises ConfigError naming file, line and fault."""
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist: run `prepare`, or name your files in data.train_questions and data.eval_questions"
        )
    decode = msgspec.json.Decoder(Question).decode
    questions = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            questions.append(decode(line))
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
    if not questions:
        raise ConfigError(f"{path} holds no question")
    return questions


class TrainingOrder:
    """Question number 0, 1, 2 … of the run; each epoch is its own shuffle of all questions."""

    def __init__(self, questions: list[Question], seed: int) -> None:
        self.questions, self.seed = questions, seed

    def __getitem__(self, index: int) -> Question:
        epoch, place = divmod(index, len(self.questions))
        return self.questions[self._shuffle(epoch)[place]]

    @lru_cache(maxsize=2)  # noqa: B019 - one instance lives as long as the process
    def _shuffle(self, epoch: int) -> list[int]:
        order = list(range(len(self.questions)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order


def stratified(questions: list[Question], count: int, seed: int) -> list[Question]:
    """`count` questions (0: all), as evenly as possible from every source, the same ones every time."""
    if count == 0 or count >= len(questions):
        return questions
    by_source: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_source[question.source].append(question)
    shuffled = [random.Random(f"{seed}/{source}").sample(rows, len(rows)) for source, rows in sorted(by_source.items())]
    return [question for question in chain(*zip_longest(*shuffled)) if question is not None][:count]


def training_group_id(index: int) -> str:
    return f"t{index:08d}"


def training_index(group_id: str) -> int | None:
    """The inverse of `training_group_id`; None for any other group."""
    return int(group_id[1:]) if group_id[:1] == "t" and group_id[1:].isdigit() else None


def make_group(config: Config, group_id: str, question: Question, version: int, *, evaluate: bool) -> PromptGroup:
    """A training group is sampled `samples_per_prompt` times; an evaluation is played once, greedily."""
    data, rollout = config.data, config.rollout
    return PromptGroup(
        group_id=group_id,
        purpose="eval" if evaluate else "train",
        example_id=question.example_id,
        source=question.source,
        question=question.question,
        golden_answers=question.golden_answers,
        prompt=build_prompt(question.question, data.instruction, data.system, data.chat_template, question.prompt),
        samples=1 if evaluate else config.trainer.samples_per_prompt,
        sampling=Sampling(
            temperature=0.0 if evaluate else rollout.temperature,
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
