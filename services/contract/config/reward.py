"""Settings of the reward: what an episode earns, and the Celery workers that compute it. docs/rewards.md explains them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.contract.config.base import Positive, Seconds, Section

Score = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RewardConfig(Section):
    match: Literal["exact", "sub", "f1"] = "exact"
    """What makes an answer right: equality with a gold, a gold inside it, or the share of words it has in common with one (F1)."""
    correct: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Reward of a right answer."""
    structure_format_score: Score = 0.0
    """Earned by a wrong answer that keeps the format, and taken from a right one that breaks it."""
    final_format_score: Score = 0.0
    """Earned by a wrong answer that breaks the format."""
    retrieval_score: Score = 0.0
    """Earned besides `structure_format_score` when a gold answer stands in a retrieved passage."""
    require_think: bool = False
    """Whether the format asks for a <think> block in every turn."""
    legacy: bool = False
    """Reward as Search-R1 and slime compute it, their defects included: for comparisons with their runs only."""
    function: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    """`module:function` that decides the reward; it is shown the built-in one."""
    max_tries: Positive = 3
    """A trajectory whose grading has failed so often (an error, a time limit, a killed process) takes its group to `dead`."""
    retry_pause_s: Annotated[float, Field(ge=0, le=60)] = 1.0
    """Pause after a try that failed by an error, for a judge that is overloaded; twice as long after the second, and so on."""
    database: Annotated[int, Field(ge=0, le=15)] = 1
    """Celery's own Redis database number."""
    concurrency: Positive = 1
    """Grading processes of one worker."""
    soft_time_limit_s: Seconds = 20
    """A grading that takes so long is interrupted by an exception."""
    time_limit_s: Seconds = 30
    """One that goes on all the same is killed with its process."""
    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Where Prometheus reads /metrics; 0 leaves it out."""

    @model_validator(mode="after")
    def _makes_sense(self) -> RewardConfig:
        problems = [*_wrong_pay(self), *_wrong_legacy(self)]
        if self.soft_time_limit_s >= self.time_limit_s:
            problems.append("reward.soft_time_limit_s must be below reward.time_limit_s")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _wrong_pay(config: RewardConfig) -> Iterator[str]:
    """Every right answer must earn more than every wrong one, or the policy is taught to answer wrongly."""
    right = config.correct - config.structure_format_score
    for names in (("structure_format_score", "retrieval_score"), ("final_format_score",)):
        if sum(getattr(config, name) for name in names) >= right:
            wrong = " + ".join(f"reward.{name}" for name in names)
            yield (
                f"{wrong} must be below reward.correct - reward.structure_format_score ({right:g}), "
                "or a wrong answer earns as much as a right one: lower them"
            )


def _wrong_legacy(config: RewardConfig) -> Iterator[str]:
    if not config.legacy:
        return
    if config.function:
        yield "reward.legacy and reward.function each decide the reward: take one out"
    if config.match == "f1":
        yield 'reward.legacy knows no F1: set reward.match to "exact" or "sub", or reward.legacy to false'
    if config.match == "sub" and (config.structure_format_score or config.final_format_score or config.retrieval_score):
        yield 'reward.legacy pays no format with reward.match = "sub": set the three format scores to 0, or match to "exact"'
