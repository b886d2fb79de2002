"""What a step leaves behind: a readable line, a JSONL row, TensorBoard scalars. A resumed run drops what its ledger lacks."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from statistics import fmean
from typing import Any

from services.contract.messages import Trajectory
from services.trainer.collect import CompleteGroup
from services.trainer.objective.advantages import zero_variance

logger = logging.getLogger("trainer")


def rollout_metrics(groups: list[CompleteGroup], version: int) -> dict[str, float]:
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
        "staleness": fmean(version - t.lowest_version for t in trajectories if t.lowest_version >= 0),
        "staleness_max": float(max(group.staleness(version) for group in groups)),
    }


def _part(trajectories: list[Trajectory], name: str) -> float:
    return fmean(t.reward_parts.get(name, 0.0) for t in trajectories)


class Journal:
    """`metrics.jsonl`, TensorBoard and the log, for one run. Rows after `last_step` of a resumed run are dropped first."""

    def __init__(self, folder: Path, warm_step: int, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._keep_rows(warm_step, step)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One row: `kind` is warm_start, grpo or evaluation."""
        row = {"kind": kind, "step": step, **{name: _rounded(value) for name, value in values.items()}}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{kind}/{name}", value, step)
        self._board.flush()

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self._read() if row["kind"] == kind]

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                logger.warning("%s: a torn line was left out", self.path)
        return rows

    def _keep_rows(self, warm_step: int, step: int) -> None:
        last = {"warm_start": warm_step, "grpo": step, "evaluation": step}
        kept = [row for row in self._read() if row["step"] <= last.get(row["kind"], step)]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(self.path)


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
