"""The answers of one evaluation, by group, and the file that keeps them: a line a sample, synced before its group is released."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from services.contract.messages import DeadLetter, PromptGroup, Trajectory
from services.contract.scores import Answer, append_lines, figures_of, read_answers, write_lines
from services.trainer.durable.room import Patiently, full_disk_told
from services.trainer.feeding.collect import CompleteGroup
from services.trainer.monitoring.transcripts import transcript_row

logger = logging.getLogger("trainer")


class AnswerBook:
    """The groups of one evaluation and the answers that have come, which its file keeps."""

    def __init__(
        self,
        path: Path,
        groups: dict[str, PromptGroup],
        keep_others: bool = False,
        patiently: Patiently = lambda write: write(),
    ) -> None:
        """keep_others: leave answers of other groups in the file; without it they are those of another version."""
        self.path, self.groups, self._patiently = path, groups, patiently
        self.answers: dict[str, list[Answer]] = {}
        """Of whole groups only."""
        self.lost: set[str] = set()
        self.missing = set(groups)
        self.fed: set[str] = set()
        """By this process. One that is in flight no more, and not answered, has died: its letter is on the way."""
        lines: list[bytes] = []
        found: dict[str, list[tuple[Answer, bytes]]] = {}
        for answer, line in read_answers(path):
            found.setdefault(answer.group_id, []).append((answer, line))
        for group_id, rows in found.items():
            if group_id in groups and len(rows) == groups[group_id].samples:
                self._count(group_id, [answer for answer, _ in rows])
                lines += [line for _, line in rows]
            elif keep_others and group_id not in groups:
                lines += [line for _, line in rows]
        write_lines(path, lines)

    def _count(self, group_id: str, answers: list[Answer]) -> None:
        self.answers[group_id] = answers
        self.missing.discard(group_id)

    def size(self, group_id: str) -> int | None:
        """How many samples a group that is still missing has; None of any other."""
        return self.groups[group_id].samples if group_id in self.missing else None

    def keep(self, group: CompleteGroup) -> None:
        """Write a group's answers down. It may be released after that."""
        rows = [transcript_row(trajectory) for trajectory in group.trajectories]
        lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
        self._patiently(lambda: self._append(lines))
        self._count(group.group_id, [answer_of(trajectory) for trajectory in group.trajectories])

    def _append(self, lines: list[bytes]) -> None:
        before = self.path.stat().st_size
        with full_disk_told(self.path, take_back=lambda: os.truncate(self.path, before)):
            append_lines(self.path, lines)

    def give_up(self, letters: Iterable[DeadLetter], in_flight: set[str]) -> None:
        """A letter about a group that was fed again since, by the process before this one perhaps, says nothing of that."""
        for letter in (letter for letter in letters if letter.group_id not in in_flight):
            logger.warning("evaluation question %s was given up and counts as wrong: %s", letter.group_id, letter.reason)
            self.lost.add(letter.group_id)
            self.missing.discard(letter.group_id)

    def figures(self, may_search: bool = True) -> list[tuple[str, list[dict[str, float]]]]:
        """(source, figures of each sample) of every question; one without an answer scores 0."""
        return [
            (group.source, [figures_of(a, may_search) for a in self.answers.get(group_id, [None] * group.samples)])
            for group_id, group in self.groups.items()
        ]


def answer_of(trajectory: Trajectory) -> Answer:
    versions = sorted({v.version for span in trajectory.spans for v in span.versions})
    t = trajectory
    return Answer(t.id, t.source, t.question, t.reward_parts, t.searches, t.answer, versions)
