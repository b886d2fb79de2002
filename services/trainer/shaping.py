"""What is taken off a rollout's reward before advantages are made of it."""

from __future__ import annotations

from services.contract.config import ObjectiveConfig
from services.trainer.feeding.collect import CompleteGroup


def overlong_penalty(model_tokens: int, limit: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476): 0 up to limit - buffer tokens, falling evenly to -1 at the limit."""
    return -min(1.0, max(0.0, (model_tokens - (limit - buffer)) / buffer))


def shaped_rewards(group: CompleteGroup, o: ObjectiveConfig) -> list[float]:
    """The group's rewards, overlong rollouts punished. The length is that of the model's own tokens: what the retriever
    returned is not the policy's doing."""
    if not o.overlong_tokens:
        return group.rewards
    lengths = [sum(trajectory.loss_mask) for trajectory in group.trajectories]
    penalties = [o.overlong_penalty * overlong_penalty(n, o.overlong_tokens, o.overlong_buffer) for n in lengths]
    return [reward + penalty for reward, penalty in zip(group.rewards, penalties, strict=True)]
