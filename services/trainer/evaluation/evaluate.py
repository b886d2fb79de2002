"""Evaluation on held-out questions, through the same prompts, engines and graders as training.

Two ways (`trainer.eval_waits`):

| way    | training     | which policy answers                                                                             |
|--------|--------------|--------------------------------------------------------------------------------------------------|
| waits  | stands still | exactly `version`: an answer that another version had a part in is asked for again               |
| beside | goes on      | `version` or later ones, as the engines move on: the scores say the lowest and the highest seen  |

Every answer is in the evaluation's file, synced, before its group is released. So an evaluation that was killed in the middle goes
on where it was: waited for, because the stage asks for it again; beside, because the ledger lists it as pending.

| crash                             | what the next start finds                                                              |
|-----------------------------------|----------------------------------------------------------------------------------------|
| group played, not in the file     | its trajectories in Redis, collected again                                             |
| in the file, not released         | the group is not wanted any more: released as a stranger                               |
| a line torn                       | left out, its question is asked again                                                  |
| begun beside, no checkpoint since | the step is done again, and so is the beginning; groups of the first one are strangers |
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

from services.contract.config import Config
from services.contract.groups import GroupStore
from services.contract.messages import PromptGroup, Question
from services.contract.scores import Evaluation, by_source, kind_row, score
from services.contract.telemetry import Progress
from services.trainer.durable.ledger import PendingEvaluation
from services.trainer.durable.room import Patiently
from services.trainer.evaluation.answer_book import AnswerBook, answer_of
from services.trainer.feeding.collect import Collector, CompleteGroup
from services.trainer.feeding.questions import make_group

logger = logging.getLogger("trainer")

PREFIX = "e-"


def evaluation_group_id(label: str, version: int, place: int) -> str:
    return f"{PREFIX}{label}-v{version}-{place:05d}"


def is_evaluation(group_id: str) -> bool:
    return group_id.startswith(PREFIX)


class Evaluator:
    """Plays the held-out questions and scores the whole and each kind. Lives on the lead rank."""

    def __init__(
        self,
        config: Config,
        store: GroupStore,
        collector: Collector,
        questions: list[Question],
        folder: Path,
        patiently: Patiently = lambda write: write(),
    ) -> None:
        self.config, self.store, self.collector, self.questions = config, store, collector, questions
        self.folder, self.patiently = folder, patiently
        self._beside: dict[PendingEvaluation, tuple[AnswerBook, float]] = {}
        """Those under way while training goes on, with the time of their beginning."""

    # -- training waits ------------------------------------------------------------------------------------------------

    def evaluate(self, label: str, version: int, step: int) -> Evaluation:
        """Scores of exactly this version. Questions whose group was given up count as wrong, and are told about."""
        asked = PendingEvaluation(label, version, step)
        started, book = time.monotonic(), self._book(asked)
        self._forget_strangers(book)
        with Progress(f"evaluating ({label})", len(book.groups), "questions", done=len(book.answers)) as bar:
            gather(self.store, self.collector, book, bar, accept=lambda group: _is_of(group, version))
        return _evaluation(asked, book, time.monotonic() - started)

    # -- training goes on ----------------------------------------------------------------------------------------------

    def begin(self, pending: PendingEvaluation) -> None:
        """Feed an evaluation."""
        self._beside[pending] = (self._book(pending), time.monotonic())
        self._forget_strangers()
        feed(self.store, self._beside[pending][0])

    def resume(self, pending: Iterable[PendingEvaluation]) -> None:
        """Go on with those that an earlier process began: what its files lack, and Redis does not hold, is fed again."""
        for each in pending:
            self._beside[each] = (self._book(each), time.monotonic())
            feed(self.store, self._beside[each][0])

    def gather(self) -> list[tuple[PendingEvaluation, Evaluation]]:
        """Take what has come, without waiting; returns the evaluations that are complete now."""
        done = []
        for pending, (book, started) in list(self._beside.items()):
            groups, dead = self.collector.ready(book.size)
            for group in groups:
                book.keep(group)
                release(self.store, group)
            book.give_up(dead, self.store.in_flight())
            if not book.missing:
                done.append((pending, _evaluation(pending, book, time.monotonic() - started)))
                del self._beside[pending]
        return done

    def finish(self) -> list[tuple[PendingEvaluation, Evaluation]]:
        """Wait for all that are under way."""
        for pending, (book, _) in self._beside.items():
            with Progress(f"evaluating ({pending.label})", len(book.groups), "questions", done=len(book.answers)) as bar:
                gather(self.store, self.collector, book, bar)
        return self.gather()

    def _book(self, e: PendingEvaluation) -> AnswerBook:
        groups = {}
        for place, question in enumerate(self.questions):
            group_id = evaluation_group_id(e.label, e.version, place)
            groups[group_id] = make_group(self.config, group_id, question, e.version, evaluate=True)
        return AnswerBook(self.folder / f"{e.label}-step{e.step:06d}.jsonl", groups, patiently=self.patiently)

    def _forget_strangers(self, *more: AnswerBook) -> None:
        """Release groups of evaluations that nobody asks for any more: of a version or a step that a crash undid."""
        books = [*more, *(book for book, _ in self._beside.values())]
        wanted = set(chain.from_iterable(book.missing for book in books))
        strangers = {group_id for group_id in self.store.in_flight() if is_evaluation(group_id)} - wanted
        self.collector.discard(lambda group_id: group_id not in strangers)
        for group_id in strangers:
            ids = [f"{group_id}/{sample}" for sample in range(self.config.trainer.eval_samples)]
            self.store.release(group_id, ids, [])


Ready = Callable[[list[PromptGroup]], list[PromptGroup]]
"""What groups still need before they are fed, such as passages in their prompts."""


def feed(store: GroupStore, book: AnswerBook, window: int | None = None, ready: Ready = list, again: bool = False) -> None:
    """Feed what is missing, at most `window` groups at a time; those that are in flight stay as they are.

    again: those too that were fed before and are nowhere, because Redis lost its last writes.
    """
    in_flight = store.in_flight()
    waiting = sorted(book.missing - in_flight - (set() if again else book.fed))
    room = len(waiting) if window is None else max(0, window - len(book.missing & in_flight))
    for group in ready([book.groups[group_id] for group_id in waiting[:room]]):
        store.feed(group)
        book.fed.add(group.group_id)


def gather(
    store: GroupStore,
    collector: Collector,
    book: AnswerBook,
    bar: Progress,
    accept: Callable[[CompleteGroup], bool] = lambda group: True,
    window: int | None = None,
    ready: Ready = list,
) -> None:
    """Feed and collect until no answer is missing; a group that is not accepted is fed again. Raises CollectTimeout."""

    while book.missing:
        feed(store, book, window, ready)
        groups, dead = collector.wait(book.size, 1, on_idle=lambda: feed(store, book, window, ready, again=True))
        before = len(book.missing)
        for group in groups:
            if accept(group):
                book.keep(group)
            else:
                book.fed.discard(group.group_id)
            release(store, group)
        book.give_up(dead, store.in_flight() if dead else set())
        bar.advance(before - len(book.missing))


def release(store: GroupStore, group: CompleteGroup) -> None:
    store.release(group.group_id, [t.id for t in group.trajectories], group.entry_ids)


def _is_of(group: CompleteGroup, version: int) -> bool:
    """Whether only `version` wrote it."""
    seen = {v for trajectory in group.trajectories for v in answer_of(trajectory).versions}
    if seen <= {version}:
        return True
    logger.info("%s was answered by version %s: asking again", group.group_id, ", ".join(map(str, sorted(seen))))
    return False


def _evaluation(e: PendingEvaluation, book: AnswerBook, seconds: float) -> Evaluation:
    rows = book.figures()
    whole, kinds = score([figures for _, figures in rows]), by_source(rows)
    versions = [v for answers in book.answers.values() for answer in answers for v in answer.versions]
    return Evaluation(
        label=e.label,
        version=e.version,
        step=e.step,
        questions=len(rows),
        **{name: whole.figures[name] for name in ("exact_match", "format", "searches", "answered", "f1", "sub_match")},
        by_source={source: kind_row(scores) for source, scores in kinds.items()},
        seconds=round(seconds, 1),
        samples=next((group.samples for group in book.groups.values()), 1),
        intervals=whole.intervals,
        pass_at={name: value for name, value in whole.figures.items() if name.startswith("pass@")},
        lowest_version=min(versions, default=-1),
        highest_version=max(versions, default=-1),
        lost=len(book.lost),
    )
