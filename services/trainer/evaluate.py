"""Greedy evaluation on held-out questions, through the same prompts, engines and graders as training."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from services.contract.config import Config
from services.contract.groups import GroupStore
from services.contract.messages import Question, Trajectory
from services.contract.telemetry import Progress
from services.trainer.collect import Collector
from services.trainer.ledger import Evaluation
from services.trainer.questions import make_group
from services.trainer.transcripts import transcript_row

logger = logging.getLogger("trainer")

FROM_PARTS = ("exact_match", "sub_match", "f1", "format")
FIGURES = (*FROM_PARTS, "searches", "answered")


def evaluation_group_id(label: str, version: int, place: int) -> str:
    return f"e-{label}-v{version}-{place:05d}"


class Evaluator:
    """Plays every question once and scores the whole and each kind. Lives on the lead rank."""

    def __init__(self, config: Config, store: GroupStore, collector: Collector, questions: list[Question], folder: Path) -> None:
        self.config, self.store, self.collector, self.questions = config, store, collector, questions
        self.folder = folder

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

        def feed() -> None:
            for group_id in sorted(missing):
                self.store.feed(make_group(self.config, group_id, wanted[group_id], version, evaluate=True))

        feed()
        with Progress(f"evaluating ({label})", len(wanted), "questions") as bar:
            while missing:
                groups, dead = self.collector.wait(lambda g: 1 if g in missing else None, 1, on_idle=feed)
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

    def _write_transcripts(self, label: str, step: int, wanted: dict[str, Question], played: dict[str, Trajectory]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [transcript_row(trajectory) for group_id in wanted if (trajectory := played.get(group_id))]
        path = self.folder / f"{label}-step{step:06d}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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
