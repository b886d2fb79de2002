"""What a step leaves behind: a readable line, a JSONL row, TensorBoard scalars. A resumed run drops what its checkpoint lacks."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from statistics import fmean
from typing import Any

from services.contract.messages import Trajectory
from services.contract.weights import sync_file
from services.trainer.collect import CompleteGroup
from services.trainer.objective.advantages import zero_variance
from services.trainer.room import full_disk_told

logger = logging.getLogger("trainer")


def rollout_metrics(groups: list[CompleteGroup]) -> dict[str, float]:
    """Figures of the trajectories of one batch, before training; means over trajectories unless the name says otherwise."""
    trajectories = [t for group in groups for t in group.trajectories]
    model_tokens = [sum(t.loss_mask) for t in trajectories]
    return {
        "reward": fmean(t.reward or 0.0 for t in trajectories),
        **{name: _part(trajectories, name) for name in ("exact_match", "sub_match", "f1", "format", "retrieval")},
        "searches": fmean(t.searches for t in trajectories),
        "response_tokens": fmean(len(t.response_ids) for t in trajectories),
        "model_tokens": fmean(model_tokens),
        "model_tokens_total": float(sum(model_tokens)),
        "truncated": fmean(t.status == "truncated" for t in trajectories),
        "zero_variance_groups": fmean(zero_variance(group.rewards) for group in groups),
    }


def _part(trajectories: list[Trajectory], name: str) -> float:
    return fmean(t.reward_parts.get(name, 0.0) for t in trajectories)


class Journal:
    """`metrics.jsonl`, TensorBoard and the log, for one run.

    A resumed run cuts the file to the length that its checkpoint knows: what lies after belongs to steps that it makes again.
    """

    def __init__(self, folder: Path, length: int | None, steps: dict[str, int]) -> None:
        """length: of metrics.jsonl in bytes; None keeps all whole rows. steps: kind of row -> its last step, for the curves."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._cut(length)
        self._curves = Curves(folder / "tensorboard", steps)

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One row: `kind` is warm_start, grpo or evaluation. Raises NoSpace and leaves no half row."""
        row = {"kind": kind, "step": step, **{name: _rounded(value) for name, value in values.items()}}
        before = self.path.stat().st_size
        with full_disk_told(self.path, take_back=lambda: os.truncate(self.path, before)), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._curves.add(kind, step, values)

    def length(self) -> int:
        """In bytes; so much is on disk."""
        sync_file(self.path)
        return self.path.stat().st_size

    def rows(self, kind: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]

    def _cut(self, length: int | None) -> None:
        written = self.path.read_bytes() if self.path.exists() else b""
        kept = written[:length]
        if length and len(written) < length:
            logger.warning("%s is shorter than when the checkpoint was made: rows are missing", self.path)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(kept[: kept.rfind(b"\n") + 1])  # the last row may be torn
        sync_file(temporary)
        temporary.replace(self.path)


class Curves:
    """TensorBoard's events, a folder a kind of row: each kind counts its own steps, and a restart hides what comes after its
    last. A disk that fills up ends them, once told about; the journal has the same figures."""

    def __init__(self, folder: Path, steps: dict[str, int]) -> None:
        self.folder, self.steps = folder, steps
        self._boards: dict[str, Any] = {}
        self._ended = False

    def add(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self._ended:
            return
        try:
            board = self._board(kind)
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    board.add_scalar(f"{kind}/{name}", value, step)
            board.flush()
        except OSError as error:
            self._ended = True
            logger.warning("%s: %s; TensorBoard's curves end here, metrics.jsonl goes on", self.folder, error)

    def _board(self, kind: str) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if kind not in self._boards:
            folder = self.folder / kind
            self._boards[kind] = SummaryWriter(str(folder), purge_step=self.steps.get(kind, 0) + 1 if folder.exists() else None)
        return self._boards[kind]


def _critic(row: dict[str, float]) -> str:
    if "value_loss" not in row:
        return ""
    explained = f" explains {row['explained_variance']:.0%}" if "explained_variance" in row else ""
    return f"critic {row['value_loss']:.4f}{explained}  "


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def step_line(step: int, steps: int, row: dict[str, float]) -> str:
    """One GRPO step for a person: what came in, what was learned, where the seconds went."""
    return (
        f"step {step}/{steps}  reward {row['reward']:.3f}  EM {row['exact_match']:.3f}  format {row['format']:.2f}  "
        f"searches {row['searches']:.2f}  tokens {row['response_tokens']:.0f}  "
        f"engine KL {row['mismatch_k3']:.1e} (|Δ| {row['mismatch_abs']:.1e})  stale {row['staleness']:.1f}  "
        f"no-variance {row['zero_variance_groups']:.0%}  grad {row['grad_norm']:.2f}  {_critic(row)}| "
        f"rollout {row['rollout_s']:.0f} s, train {row['train_s']:.0f} s, publish {row['publish_s']:.1f} s  "
        f"{row['tokens_per_s']:.0f} tok/s"
    )
