"""What a run leaves behind as it goes: `metrics.jsonl`, and whoever else wants its figures (loggers.py).

The file is the record; a row is one line:

| kind       | step                    | holds                                                                  |
|------------|-------------------------|------------------------------------------------------------------------|
| warm_start | optimizer step, from 1  | `warm_start/…`                                                         |
| grpo       | GRPO step, from 1       | all groups but `eval/…` and `warm_start/…`                             |
| evaluation | GRPO step it was fed at | `label` and `eval/…`                                                   |
| warning    | GRPO step               | `sign` and `text`: an early sign of collapse that has just shown itself |

Every row has `at`, seconds since the epoch. A resumed run first cuts the file to the length that its checkpoint knows: what lies
after belongs to steps that it makes again.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from services.contract.files import replace_file, sync
from services.trainer.durable.room import Patiently, full_disk_told
from services.trainer.monitoring.collapse import onsets, warning_metrics

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

    def __init__(self, folder: Path, length: int | None, patiently: Patiently = lambda write: write()) -> None:
        """length: of metrics.jsonl in bytes, as the checkpoint knows it; None keeps all whole rows."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self.listeners: list[Listener] = []
        self._patiently = patiently
        self._cut(length)
        self.steps = self.rows("grpo")
        """The rows of all GRPO steps so far."""

    def record(self, kind: Kind, step: int, values: Row) -> None:
        row = {"kind": kind, "step": step, "at": round(time.time(), 3), **{name: _rounded(v) for name, v in values.items()}}
        self._patiently(lambda: self._write(row))
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

    def _write(self, row: Row) -> None:
        """Raises NoSpace and leaves no half row."""
        before = self.path.stat().st_size
        with full_disk_told(self.path, take_back=lambda: os.truncate(self.path, before)), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, kind: Kind | None = None) -> list[Row]:
        """Of one kind, or all, oldest first."""
        return [row for row in self._read() if kind in (None, row["kind"])]

    def end(self) -> None:
        """The run is done."""
        for listener in self.listeners:
            listener.end()

    def length(self) -> int:
        """In bytes; so much is on disk. A checkpoint knows it."""
        sync(self.path)
        return self.path.stat().st_size

    def _cut(self, length: int | None) -> None:
        written = self.path.read_bytes() if self.path.exists() else b""
        kept = written[:length]
        if length and len(written) < length:
            logger.warning("%s is shorter than when the checkpoint was made: rows are missing", self.path)
        replace_file(self.path, kept[: kept.rfind(b"\n") + 1])  # the last row may be torn

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
