"""What a run's folder tells: the trainer's journal and checkpoints, and the heartbeats of a suite of local processes.

The folder may be on another machine, not there yet, or half-written at this instant; what cannot be read is left out.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import msgspec

from services.contract.config import Config
from services.contract.weights import published_versions, version_folder
from services.suite.redis_address import address_file

TAIL_BYTES = 512 << 10
"""Of the journal: hundreds of steps."""
REWARDS_SHOWN = 24


class Part(msgspec.Struct, frozen=True):
    """A service of a suite of local processes, by its heartbeat file."""

    name: str
    state: str
    age_s: float


class Progress(msgspec.Struct, frozen=True):
    """How far the trainer is."""

    folder: str
    stage: str | None
    """The trainer's own word if its heartbeat can be read, else that of the newest checkpoint; None: neither is there."""
    stage_from: str
    steps: int
    """As configured."""
    step: dict[str, Any] | None
    """The last row of each kind in metrics.jsonl."""
    warm_start: dict[str, Any] | None
    evaluations: list[dict[str, Any]]
    rewards: list[float]
    """Of the last steps."""
    written_s: float | None
    """Seconds since the journal was written."""
    problem: str | None
    warnings: list[str] = []
    """Early signs of collapse that show after the last step, each as it was told at its onset."""


def read_progress(config: Config, parts: list[Part], now: float | None = None) -> Progress:
    """`now` in seconds since the epoch, as files have it."""
    folder = config.run.folder
    rows, written, problem = _journal(folder / "metrics.jsonl", time.time() if now is None else now)
    steps = [row for row in rows if row["kind"] == "grpo"]
    stage, stage_from = _stage(folder / "checkpoints", parts)
    return Progress(
        folder=str(folder),
        stage=stage,
        stage_from=stage_from,
        steps=config.trainer.steps,
        step=steps[-1] if steps else None,
        warm_start=next((row for row in reversed(rows) if row["kind"] == "warm_start"), None),
        evaluations=[row for row in rows if row["kind"] == "evaluation"],
        rewards=[row["reward/mean"] for row in steps[-REWARDS_SHOWN:] if isinstance(row.get("reward/mean"), (int, float))],
        written_s=written,
        problem=problem,
        warnings=_warnings(rows, steps[-1]) if steps else [],
    )


def read_parts(config: Config, now: float | None = None) -> list[Part]:
    """Empty in containers, whose heartbeats are not on a shared volume, and when the suite that wrote them has ended."""
    if not address_file(config).exists():
        return []
    now = time.time() if now is None else now
    parts = []
    for path in sorted((config.run.folder / "suite").glob("*.heartbeat")):
        try:
            parts.append(Part(path.stem, path.read_text(errors="replace"), max(now - path.stat().st_mtime, 0.0)))
        except OSError:
            continue  # it was replaced or removed at this instant
    return parts


def _journal(path: Path, now: float) -> tuple[list[dict[str, Any]], float | None, str | None]:
    """(the last rows, seconds since they were written, what is wrong)."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - TAIL_BYTES, 0))
            lines = file.read().split(b"\n")
        written = max(now - path.stat().st_mtime, 0.0)
    except FileNotFoundError:
        return [], None, None
    except OSError as error:
        return [], None, f"{path} cannot be read: {error.strerror}"
    lines = lines[1:] if size > TAIL_BYTES else lines
    rows = [_row(line) for line in lines if line.strip()]
    whole = [row for row in rows if row is not None]
    torn = len(rows) - len(whole)
    return whole, written, f"{path}: {torn} torn line(s) left out" if torn else None


def _warnings(rows: list[dict[str, Any]], step: dict[str, Any]) -> list[str]:
    """The latest sentence of every sign that the last step shows."""
    told = {row.get("sign"): f"step {row.get('step')}: {row.get('text')}" for row in rows if row["kind"] == "warning"}
    return [sentence for sign, sentence in told.items() if step.get(f"warnings/{sign}")]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line, parse_constant=str)  # NaN is worth seeing, and is no JSON
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("kind"), str) else None


def _stage(checkpoints: Path, parts: list[Part]) -> tuple[str | None, str]:
    """(stage, where that is from). The trainer's heartbeat says `ready: grpo`."""
    if heartbeat := next((part for part in parts if part.name == "trainer"), None):
        return heartbeat.state.removeprefix("ready: "), "its heartbeat"
    try:
        serial = published_versions(checkpoints)[-1]
        ledger = json.loads((version_folder(checkpoints, serial) / "ledger.json").read_text())
        return str(ledger["stage"]), "its last checkpoint"
    except (OSError, IndexError, KeyError, TypeError, ValueError):
        return None, ""
