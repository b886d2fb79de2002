"""Settings of the rollout worker and its engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, SerializerFunctionWrapHandler, model_serializer, model_validator

from services.contract.config.base import NonNegative, Positive, Seconds, Section
from services.contract.transcript import SEARCH_R1, Layout, layout_problems


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
    """How long an engine may take to answer for the first time."""
    max_running_requests: NonNegative = 0
    """Requests decoded together; others wait in the engine. 0: as many as `rollout.concurrency`."""
    chunked_prefill_tokens: NonNegative = 0
    """Prompt tokens in one prefill step; running requests wait for it. 0 leaves the choice to SGLang."""
    health_interval_s: Seconds = 10
    """An engine that has answered nothing for so long is asked for one token."""
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
    """Passages that do not fit are left out from the worst up; the closing tag always stands."""
    turn_semantics: Literal["search-r1", "slime"] = "search-r1"
    """How turns are counted. `search-r1`: `max_searches` turns that may search, then one that can only answer. `slime`:
    `max_turns` turns in all; the last one's search finds nobody who reads it."""
    max_searches: NonNegative = 3
    """A turn without a usable action takes the place of a search."""
    max_turns: Positive | None = None
    """Only with `turn_semantics = "slime"`."""
    max_invalid_actions: NonNegative = 0
    """An episode ends with so many turns that hold no usable action. 0: the turns are the only limit."""
    episode_deadline_s: Annotated[float, Field(ge=0)] = 0.0
    """An episode on which the engine has spent so long ends with its present turn, truncated. 0: no limit."""
    slow_engine_tokens_per_s: Annotated[float, Field(gt=0)] = 1.0
    """A late episode that was sampled more slowly than this is the engine's fault: it is played again, not trained on."""
    topk: Positive = 3
    """Passages a search brings."""
    passage_template: str = SEARCH_R1.passage
    """How one passage is shown; may hold {number}, {title} and must hold {text}."""
    observation_template: str = SEARCH_R1.whole
    """What is appended after a search; {passages} stands for the passages."""
    lease_s: Seconds = 60
    """A group whose worker has shown no sign of life for so long is claimed by another worker."""
    group_deadline_s: Seconds = 1800
    """How long a worker may take over a group."""
    late_groups: Literal["retry", "release"] = "retry"
    """What becomes of a group that is late: a failed attempt, played again (`retry`); or it goes to the trainer with the samples
    it has, at least two, and the missing ones count as failed (`release`)."""
    max_attempts: Positive = 3
    """A group that engine or retriever has failed so often is given up."""
    request_timeout_s: Seconds = 300
    """Of one turn at the engine."""
    generation_retries: NonNegative = 3
    """A turn that the engine failed is asked for again so often. Waiting for an engine that starts or updates costs none."""
    retrieval_timeout_s: Seconds = 30
    """Of one request to the retriever."""
    retrieval_retries: NonNegative = 5
    """After a failed request; then the group has failed."""
    shutdown_grace_s: Seconds = 20
    """After SIGTERM: time to finish running episodes before their groups are handed back."""

    @property
    def searches(self) -> int:
        """Turns that may search, whichever way they are counted."""
        return self.max_searches if self.max_turns is None else self.max_turns - 1

    @property
    def layout(self) -> Layout:
        return Layout(self.passage_template, self.observation_template)

    @model_validator(mode="after")
    def _turns_are_counted_one_way(self) -> RolloutConfig:
        slime = self.turn_semantics == "slime"
        if slime and self.max_turns is None:
            raise ValueError('rollout.turn_semantics = "slime" needs rollout.max_turns: set it (slime\'s own value is 2)')
        if not slime and self.max_turns is not None:
            raise ValueError('rollout.max_turns counts only with rollout.turn_semantics = "slime": set that, or set max_searches')
        if slime and "max_searches" in self.model_fields_set:
            raise ValueError('rollout.max_searches does not count with rollout.turn_semantics = "slime": take it out')
        return self

    @model_serializer(mode="wrap")
    def _only_what_counts(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A dump is a configuration again, so it has no key that the rule above refuses."""
        values = dump(self)
        if self.turn_semantics == "slime":
            values.pop("max_searches", None)
        return values

    @model_validator(mode="after")
    def _observations_can_be_written(self) -> RolloutConfig:
        if problems := layout_problems(self.layout):
            raise ValueError("rollout.passage_template, rollout.observation_template: " + "; ".join(problems))
        return self

    @model_validator(mode="after")
    def _a_deadline_can_be_met(self) -> RolloutConfig:
        deadline, rate = self.episode_deadline_s, self.slow_engine_tokens_per_s
        if deadline >= self.group_deadline_s:
            raise ValueError("rollout.episode_deadline_s must be below rollout.group_deadline_s, which would end the group first")
        if deadline * rate > self.max_response_tokens:
            raise ValueError(
                "rollout.episode_deadline_s can never end an episode: at rollout.slow_engine_tokens_per_s the response is full "
                "before; lower one of the two"
            )
        return self
