"""Trajectories as people read them: who said what, what it earned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from services.contract.messages import Trajectory
from services.trainer.durable.room import write_durably
from services.trainer.feeding.collect import CompleteGroup, versions_of


def transcript_row(trajectory: Trajectory) -> dict[str, Any]:
    """One trajectory without token ids."""
    return {
        "id": trajectory.id,
        "source": trajectory.source,
        "question": trajectory.question,
        "golden_answers": trajectory.golden_answers,
        "answer": trajectory.answer,
        "reward": trajectory.reward,
        "parts": trajectory.reward_parts,
        "searches": trajectory.searches,
        "stop_reason": trajectory.stop_reason,
        "worker": trajectory.worker,
        "versions": sorted(versions_of(trajectory)),
        "response": [{"kind": span.kind, "text": span.text} for span in trajectory.spans],
    }


def write_transcripts(path: Path, groups: list[CompleteGroup]) -> None:
    rows = [transcript_row(trajectory) for group in groups for trajectory in group.trajectories]
    write_durably(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
