"""What a checkpoint says about itself, beside the model and the optimizer: how far the run is and what it has consumed.

Groups are acknowledged in Redis only after the checkpoint that contains them is durable: what the ledger lists as consumed is
never trained again, what it does not list is served again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from services.contract.scores import Evaluation

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
    lineage: list[list[int]] = []
    """The last policies, newest first: every version number that each was published under. A restart publishes the weights
    it goes on from under a number above all others, and what came after them is no policy of this run any more."""
    pending_evaluations: list[PendingEvaluation] = []
    order: str = ""
    """`TrainingOrder.fingerprint` that the indices above count in; empty in a ledger that was begun before it was kept."""
    samples: int = 0
    """Of the groups that were fed; 0 in a ledger that was begun before it was kept."""
    journal_bytes: int | None = None
    """Length of metrics.jsonl; None in a ledger that was begun before it was kept."""

    def __post_init__(self) -> None:
        if not self.lineage:
            self.lineage = [[self.version]]

    def knows_evaluation(self, label: str) -> bool:
        """Whether it was made, or is under way."""
        return label in {e.label for e in (*self.evaluations, *self.pending_evaluations)}

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

    def publish(self, version: int, policies_kept: int) -> None:
        """The present weights were published under this number; remember the last `policies_kept` policies."""
        if self.unpublished:
            self.lineage = [[version], *self.lineage][:policies_kept]
        else:
            self.lineage[0].append(version)
        self.version, self.unpublished = version, False

    def staleness(self, versions: Iterable[int]) -> int | None:
        """How many policies lie between the present one and the oldest of these versions; 0 if there are none.

        None: one of them is older than those that are remembered, or was published after weights that a crash lost.
        """
        ages = [next((age for age, names in enumerate(self.lineage) if version in names), None) for version in versions]
        known = [age for age in ages if age is not None]
        return None if len(known) < len(ages) else max(known, default=0)

    def count_in(self, order: str, samples: int) -> bool:
        """Feed questions in this order, so many samples each, from now on. Returns whether either has changed in between."""
        changed = self.order not in ("", order) or self.samples not in (0, samples)
        self.order, self.samples = order, samples
        return changed

    def reopen(self, steps: int) -> bool:
        """A run that ended before `steps`, because `trainer.steps` was raised since, goes back to its GRPO. Returns whether."""
        if self.stage not in ("evaluate_final", "done") or self.step >= steps:
            return False
        self.stage = "grpo"
        return True

    def finish_stage(self, stage: Stage) -> None:
        self.stage = STAGES[STAGES.index(stage) + 1]
