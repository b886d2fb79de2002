"""What a checkpoint says about itself, beside the model and the optimizer: how far the run is and what it has consumed.

A checkpoint is published like a policy version (written whole, manifest last, one rename), so a torn one is recognised and
the one before it is used. Groups are acknowledged in Redis only after the checkpoint that contains them is durable: what the
ledger lists as consumed is never trained again, what it does not list is served again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import msgspec

from services.contract.scores import Evaluation
from services.contract.weights import WeightsError, collect_garbage, publish, published_versions, verify, version_folder

logger = logging.getLogger("trainer")

LEDGER_FILE = "ledger.json"
Stage = Literal["evaluate_start", "warm_start", "evaluate_warm", "grpo", "evaluate_final", "done"]
STAGES: tuple[Stage, ...] = ("evaluate_start", "warm_start", "evaluate_warm", "grpo", "evaluate_final", "done")


class PendingEvaluation(msgspec.Struct, frozen=True):
    """An evaluation that was fed while training goes on. Its answers so far are in its file."""

    label: str
    version: int
    """That it was fed for."""
    step: int


class Ledger(msgspec.Struct):
    stage: Stage = "evaluate_start"
    warm_step: int = 0
    """Optimizer steps of the warm start."""
    step: int = 0
    """Batches that GRPO has learned from."""
    reference_step: int = 0
    """The step whose policy is the reference; 0: the one that GRPO began with."""
    version: int = 0
    """The policy version that was published last."""
    unpublished: bool = False
    """The weights have moved on since `version`."""
    next_index: int = 0
    """Every training question before this one is consumed (an index counts on through the epochs)."""
    consumed_beyond: list[int] = []
    """Consumed ones at or after `next_index`, sorted."""
    evaluations: list[Evaluation] = []
    pending_evaluations: list[PendingEvaluation] = []
    order: str = ""
    """Fingerprint of the order that the numbers above count in. "": a run that was begun before it was kept."""

    @property
    def has_learned(self) -> bool:
        """Whether there is anything beyond the starting model; before the first step a checkpoint is this ledger alone."""
        return bool(self.warm_step or self.step)

    def is_consumed(self, index: int) -> bool:
        return index < self.next_index or index in self.consumed_beyond

    def consume(self, indices: list[int]) -> None:
        """Count these training questions as done."""
        beyond = set(self.consumed_beyond) | {i for i in indices if i >= self.next_index}
        while self.next_index in beyond:
            beyond.remove(self.next_index)
            self.next_index += 1
        self.consumed_beyond = sorted(beyond)

    def reopen(self, steps: int) -> bool:
        """A run that ended before `steps`, because `trainer.steps` was raised since, goes back to its GRPO. Returns whether."""
        if self.stage not in ("evaluate_final", "done") or self.step >= steps:
            return False
        self.stage = "grpo"
        return True

    def finish_stage(self, stage: Stage) -> None:
        self.stage = STAGES[STAGES.index(stage) + 1]


class Checkpoints:
    """The checkpoints of one run, numbered by a serial that only rises."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, ledger: Ledger, move_state_in: Path) -> Path:
        """Publish the state that lies in `move_state_in` together with the ledger. Only the lead calls this."""
        serial = (published_versions(self.folder) or [0])[-1] + 1

        def write(folder: Path) -> None:
            for path in sorted(move_state_in.iterdir()):
                path.rename(folder / path.name)
            (folder / LEDGER_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(ledger)))

        path = publish(self.folder, serial, serial - 1, write)
        collect_garbage(self.folder, self.keep, in_use=())
        return path

    def latest(self) -> tuple[Path, Ledger] | None:
        """The newest checkpoint that is whole; a damaged one is told about and passed over."""
        for serial in reversed(published_versions(self.folder)):
            path = version_folder(self.folder, serial)
            try:
                verify(path)
                return path, msgspec.json.decode((path / LEDGER_FILE).read_bytes(), type=Ledger)
            except (WeightsError, OSError, msgspec.DecodeError) as error:
                logger.warning("checkpoint %s is damaged (%s): using the one before it", path.name, error)
        return None
