"""Settings of the rollout worker and its engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from services.contract.config.base import NonNegative, Positive, Seconds, Section


class EngineConfig(Section):
    """The SGLang server that a rollout worker starts and watches."""

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


class RolloutConfig(Section):
    engine: EngineConfig = EngineConfig()
    concurrency: Positive = 32
    """Episodes in flight in one worker."""
    retrieval_concurrency: Positive = 32
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
    """A worker that has not finished a group after so long counts it as a failed attempt."""
    max_attempts: Positive = 3
    request_timeout_s: Seconds = 300
    retrieval_timeout_s: Seconds = 30
    retrieval_retries: NonNegative = 5
    shutdown_grace_s: Seconds = 20
    """After SIGTERM: time to finish running episodes before their groups are handed back."""
