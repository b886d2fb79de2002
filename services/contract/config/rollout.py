"""Settings of the rollout worker, its engine, and the grader."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator

from services.contract.config.base import NonNegative, Positive, Seconds, Section


class EngineConfig(Section):
    """The SGLang server that a rollout worker starts and watches, or those that run elsewhere and it attaches itself to."""

    urls: list[str] = []
    """Engines that run elsewhere, as `http://host:port`: the worker starts none of its own and plays on all of these. It checks
    them and brings them to the current policy, which they must see under the same path as the worker (`weights.directory`)."""
    router: str | None = None
    """An sglang-router before `urls`: episodes are generated through it; versions and health are still each engine's own."""
    api_key: SecretStr | None = None
    """Of the engines at `urls`. Only from the environment: FORAGE_ROLLOUT__ENGINE__API_KEY."""
    pause_lease_s: Seconds = 15
    """A worker that was silent for so long while it updated an engine of `urls` is taken for dead; another one finishes."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0 picks a free port."""
    threads: Positive = 2
    max_total_tokens: Positive = 16_384
    """Tokens in the KV cache."""
    tensor_parallel: Positive = 1
    start_timeout_s: Seconds = 600
    max_running_requests: NonNegative = 0
    """Requests decoded together; others wait in the engine. 0: as many as `rollout.concurrency`."""
    chunked_prefill_tokens: NonNegative = 0
    """Prompt tokens in one prefill step; running requests wait for it. 0 leaves the choice to SGLang."""
    health_interval_s: Seconds = 10
    health_timeout_s: Seconds = 60
    """How long an engine that has answered nothing for `health_interval_s` may take for one token."""
    health_failures: Positive = 3
    """The engine is restarted after so many failed health checks in a row."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """Of the engine's own log, a file under `<run folder>/logs`."""
    python: str | None = None
    """The interpreter that has SGLang. None: the worker's own."""
    extra_args: list[str] = []
    """Passed to the server as they are."""

    @model_validator(mode="after")
    def _urls_can_be_used(self) -> EngineConfig:
        for url in [*self.urls, *([self.router] if self.router else [])]:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.username:
                raise ValueError(f"rollout.engine.urls or .router has {url!r}: write http://host:port and nothing more")
        if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
            raise ValueError("rollout.engine.urls names an engine twice: leave one of them out")
        if self.router and not self.urls:
            raise ValueError("rollout.engine.router needs rollout.engine.urls: list the engines behind it")
        return self


class RolloutConfig(Section):
    engine: EngineConfig = EngineConfig()
    concurrency: Positive = 32
    """Most episodes in flight on one engine. The worker grows towards it while the engine has room and backs off when it queues."""
    least_concurrency: Positive = 8
    """Episodes in flight at the start, and the fewest that a full engine gets."""
    retrieval_concurrency: Positive = 32
    """Requests to the retriever under way in one worker."""
    update_mode: Literal["in_place", "abort", "drain"] = "in_place"
    """How a new policy gets into a serving engine: running turns go on with it (`in_place`), are thrown away and played again
    by it (`abort`), or are finished first by the old one (`drain`)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_turn_tokens: Positive = 96
    """Tokens the model may write in one turn."""
    max_response_tokens: Positive = 1024
    """Tokens of the whole response, observations included."""
    max_observation_tokens: Positive = 400
    max_searches: NonNegative = 3
    """Searches that are answered; after the last one the model gets one answer-only turn."""
    topk: Positive = 3
    lease_s: Seconds = 60
    """A group whose worker has shown no sign of life for so long is claimed by another worker."""
    group_deadline_s: Seconds = 1800
    """How long a worker may take over a group."""
    late_groups: Literal["retry", "release"] = "retry"
    """What becomes of a group that is late: a failed attempt, played again (`retry`); or it goes to the trainer with the samples
    it has, at least two, and the missing ones count as failed (`release`)."""
    max_attempts: Positive = 3
    request_timeout_s: Seconds = 300
    """Of one turn at the engine."""
    generation_retries: NonNegative = 3
    """A turn that the engine failed is asked for again so often. Waiting for an engine that starts or updates costs none."""
    retrieval_timeout_s: Seconds = 30
    retrieval_retries: NonNegative = 5
    shutdown_grace_s: Seconds = 20
    """After SIGTERM: time to finish running episodes before their groups are handed back."""


class RewardConfig(Section):
    database: Annotated[int, Field(ge=0, le=15)] = 1
    """Celery's own Redis database number."""
    concurrency: Positive = 1
    soft_time_limit_s: Seconds = 20
    time_limit_s: Seconds = 30
    correct: float = 1.0
    """Reward of an exact match."""
    format_bonus: float = 0.0
    """Added when the trajectory keeps the format but the answer is wrong."""
    require_think: bool = False
    """Whether the format asks for a <think> block in every turn."""

    @model_validator(mode="after")
    def _limits_in_order(self) -> RewardConfig:
        if self.soft_time_limit_s >= self.time_limit_s:
            raise ValueError("reward.soft_time_limit_s must be below reward.time_limit_s")
        return self

    @model_validator(mode="after")
    def _right_pays_more(self) -> RewardConfig:
        if self.format_bonus >= self.correct:
            raise ValueError("reward.format_bonus must be below reward.correct, or a wrong answer pays as well as a right one")
        return self
