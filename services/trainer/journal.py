"""What a run leaves behind as it goes: `metrics.jsonl`, and whoever else wants its figures (loggers.py).

The file is the record; a row is one line:

| kind       | step                    | holds                                                                  |
|------------|-------------------------|------------------------------------------------------------------------|
| warm_start | optimizer step, from 1  | `warm_start/…`                                                         |
| grpo       | GRPO step, from 1       | all groups but `eval/…` and `warm_start/…`                             |
| evaluation | GRPO step it was fed at | `label` and `eval/…`                                                   |
| warning    | GRPO step               | `sign` and `text`: an early sign of collapse that has just shown itself |

Every row has `at`, seconds since the epoch. What a resumed run finds in the file beyond its checkpoint is dropped first, since
those steps are done again: steps after the ledger's, evaluations that the ledger does not know, a line torn by a crash.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from services.trainer.collapse import onsets, warning_metrics
from services.trainer.ledger import Ledger

logger = logging.getLogger("trainer")

Kind = Literal["warm_start", "grpo", "evaluation", "warning"]
Row = dict[str, Any]


class Listener(Protocol):
    """Gets every row after it is in the file."""

    def record(self, row: Row) -> None: ...

    def end(self) -> None:
        """No more rows will come."""
        ...


class Journal:
    """`metrics.jsonl` of one run. Lives on the lead rank."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self.listeners: list[Listener] = []
        self._unwritten: list[str] = []
        self._keep(ledger)
        self.steps = self.rows("grpo")
        """The rows of all GRPO steps so far."""

    def record(self, kind: Kind, step: int, values: Row) -> None:
        row = {"kind": kind, "step": step, "at": round(time.time(), 3), **{name: _rounded(v) for name, v in values.items()}}
        self._unwritten.append(json.dumps(row) + "\n")
        self._write()
        if kind == "grpo":
            self.steps.append(row)
        for listener in self.listeners:
            try:
                listener.record(row)
            except Exception:  # noqa: BLE001 - whatever a curve is worth, the training is worth more
                logger.warning("%s could not be told of step %d", type(listener).__name__, step, exc_info=True)

    def record_step(self, step: int, values: Row) -> None:
        """A GRPO step, with the early signs of collapse that it shows; those that have just come up are told."""
        rows = [*self.steps, values]
        self.record("grpo", step, values | warning_metrics(rows))
        for sign, sentence in onsets(rows).items():
            logger.warning("step %d: %s", step, sentence)
            self.record("warning", step, {"sign": sign, "text": sentence})

    def _write(self) -> None:
        """On a full disk the rows are kept for the next time, and nothing of them stays in the file."""
        size = self.path.stat().st_size
        try:
            with self.path.open("a") as file:
                file.write("".join(self._unwritten))
            self._unwritten.clear()
        except OSError as error:
            logger.warning("%s cannot be written (%s): %d row(s) wait for the next step", self.path, error, len(self._unwritten))
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)

    def rows(self, kind: Kind | None = None) -> list[Row]:
        """Of one kind, or all, oldest first."""
        return [row for row in self._read() if kind in (None, row["kind"])]

    def end(self) -> None:
        """The run is done."""
        for listener in self.listeners:
            listener.end()

    def _keep(self, ledger: Ledger) -> None:
        kept = [row for row in self._read() if belongs(row, ledger)]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(self.path)

    def _read(self) -> list[Row]:
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                logger.warning("%s: a torn line was left out", self.path)
        return rows


def belongs(row: Row, ledger: Ledger) -> bool:
    """Whether a row tells of something that the checkpoint contains."""
    if row["kind"] == "warm_start":
        return row["step"] <= ledger.warm_step
    if row["kind"] == "evaluation":
        return _evaluation_belongs(row, ledger)
    return row["step"] <= ledger.step


def _evaluation_belongs(row: Row, ledger: Ledger) -> bool:
    this = (row["label"], row["step"])
    if this in {(e.label, e.step) for e in ledger.pending_evaluations}:
        return False  # it will be gathered again
    known = this in {(e.label, e.step) for e in ledger.evaluations}
    return known or row["step"] < ledger.step  # an older one, whose label another has taken since


def numbers(row: Row) -> dict[str, float]:
    """The figures of a row that are single numbers, by name."""
    return {name: float(v) for name, v in row.items() if "/" in name and isinstance(v, (int, float))}


def last_values(rows: Sequence[Row]) -> dict[str, float]:
    """The latest value of every figure."""
    found: dict[str, float] = {}
    for row in rows:
        found |= numbers(row)
    return found


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
