"""Greedy evaluation on held-out questions, through the same prompts, engines and graders as training."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from services.contract.config import Config
from services.contract.groups import GroupStore
from services.contract.messages import Question, Trajectory
from services.contract.telemetry import Progress
from services.trainer.collect import Collector
from services.trainer.ledger import Evaluation
from services.trainer.questions import make_group
from services.trainer.room import write_durably
from services.trainer.transcripts import transcript_row

logger = logging.getLogger("trainer")

FROM_PARTS = ("exact_match", "sub_match", "f1", "format")
Patiently = Callable[[Callable[[], object]], object]
"""Runs what it is given until the disk has room for it."""
FIGURES = (*FROM_PARTS, "searches", "answered")


def evaluation_group_id(label: str, version: int, place: int) -> str:
    return f"e-{label}-v{version}-{place:05d}"


def is_evaluation(group_id: str) -> bool:
    return group_id.startswith("e-")


class Evaluator:
    """Plays every question once and scores the whole and each kind. Lives on the lead rank."""

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

    def evaluate(self, label: str, version: int, step: int) -> Evaluation:
        """Scores of `version`. Questions whose group was given up count as wrong, and are told about."""
        started = time.monotonic()
        wanted = {evaluation_group_id(label, version, i): q for i, q in enumerate(self.questions)}
        played = self._collect(label, version, wanted)
        self._write_transcripts(label, step, wanted, played)
        return _score(label, version, step, wanted, played, time.monotonic() - started)

    def _collect(self, label: str, version: int, wanted: dict[str, Question]) -> dict[str, Trajectory]:
        played: dict[str, Trajectory] = {}
        missing = set(wanted)

        def size(group_id: str) -> int | None:
            return 1 if group_id in missing else None

        def feed() -> None:
            for group_id in sorted(missing):
                self.store.feed(make_group(self.config, group_id, wanted[group_id], version, evaluate=True))

        self._forget_others(missing)
        self.collector.take_dead(size)  # of a process before this one: they are asked again
        feed()
        with Progress(f"evaluating ({label})", len(wanted), "questions") as bar:
            while missing:
                groups, dead = self.collector.wait(size, 1, on_idle=feed)
                for group in groups:
                    trajectory = group.trajectories[0]
                    self.store.release(group.group_id, [trajectory.id], group.entry_ids)
                    if trajectory.lowest_version not in (version, -1):
                        logger.info("%s was answered by version %d: asking again", group.group_id, trajectory.lowest_version)
                        feed()
                        continue
                    played[group.group_id] = trajectory
                    missing.discard(group.group_id)
                    bar.advance()
                for letter in dead:
                    logger.warning("evaluation question %s was given up: %s", letter.group_id, letter.reason)
                    missing.discard(letter.group_id)
                    bar.advance()
        return played

    def _forget_others(self, wanted: set[str]) -> None:
        """Release the questions of an evaluation that a crash broke off and nobody will ask for again."""
        for group_id in self.store.in_flight() - wanted:
            if is_evaluation(group_id):
                self.store.release(group_id, [f"{group_id}/0"], [])
        self.collector.discard(lambda group_id: group_id in wanted or not is_evaluation(group_id))

    def _write_transcripts(self, label: str, step: int, wanted: dict[str, Question], played: dict[str, Trajectory]) -> None:
        rows = [transcript_row(trajectory) for group_id in wanted if (trajectory := played.get(group_id))]
        path = self.folder / f"{label}-step{step:06d}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.patiently(lambda: write_durably(path, text))


def _score(
    label: str, version: int, step: int, wanted: dict[str, Question], played: dict[str, Trajectory], seconds: float
) -> Evaluation:
    by_source: dict[str, list[dict[str, float]]] = defaultdict(list)
    for group_id, question in wanted.items():
        by_source[question.source].append(_figures(played.get(group_id)))
    every = _means([row for rows in by_source.values() for row in rows])
    return Evaluation(
        label=label,
        version=version,
        step=step,
        questions=len(wanted),
        exact_match=every["exact_match"],
        format=every["format"],
        searches=every["searches"],
        answered=every["answered"],
        by_source={source: _means(rows) | {"questions": len(rows)} for source, rows in sorted(by_source.items())},
        seconds=round(seconds, 1),
        f1=every["f1"],
        sub_match=every["sub_match"],
    )


def _figures(trajectory: Trajectory | None) -> dict[str, float]:
    if trajectory is None:
        return dict.fromkeys(FIGURES, 0.0)
    return {name: trajectory.reward_parts.get(name, 0.0) for name in FROM_PARTS} | {
        "searches": float(trajectory.searches),
        "answered": float(trajectory.answer is not None and trajectory.searches > 0),
    }


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(fmean(row[name] for row in rows), 4) for name in FIGURES}
