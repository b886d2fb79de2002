"""One TOML file per run, one model per section; unknown keys and contradictions stop the start, not step 400.

Environment variables override the file: ``FORAGE_TRAINER__LEARNING_RATE=1e-6`` sets ``[trainer] learning_rate``.
Values are read as TOML (``true``, ``3``, ``"text"``, ``[1, 2]``); what is not TOML is taken as a plain string, and so is
whatever goes to a key that holds text: a run may be named ``007``, a password may be ``123456``.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

PREFIX = "FORAGE_"
NOT_SETTINGS = frozenset(
    {
        "FORAGE_CONFIG",
        "FORAGE_HEARTBEAT_FILE",
        "FORAGE_LOG_LEVEL",
        "FORAGE_REDIS_PASSWORD",
        "FORAGE_REDIS_PORT",
        "FORAGE_RETRIEVER_PORT",
        "FORAGE_VENV",
        "FORAGE_WHEELS",
    }
)
"""Variables that begin with the prefix and are read by the launchers, not by this module."""


class ConfigError(Exception):
    """The configuration cannot be used. The message names each key and the mend."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "quickstart"
    """Names the run: its folder, and its keys in Redis. Two runs with different names share nothing."""
    directory: Path = Path("var/runs")
    """Checkpoints, metrics and the final model are written under `<directory>/<name>`."""
    seed: int = 0

    @property
    def folder(self) -> Path:
        return self.directory / self.name


class ModelConfig(Section):
    source: Literal["smollm2-135m", "tiny", "folder"] = "smollm2-135m"
    """Where `prepare` takes the starting policy from: a package, a tiny random model, or `path` as it is."""
    path: Path | None = None
    """A Hugging Face folder. None: `<data.directory>/models/policy`, which `prepare` writes."""
    max_context: Positive = 2048
    """Prompt and response together never exceed this many tokens."""


class DataConfig(Section):
    directory: Path = Path("var/data")
    """What `prepare` makes: models, corpus, questions, demonstrations, index."""
    source: Literal["factbook", "folder"] = "factbook"
    """`folder`: corpus and questions are yours, already in place (see `corpus`, `train_questions`, `eval_questions`)."""
    corpus: Path | None = None
    """JSONL with `id` and `contents` ("title", newline, text). None: `<directory>/corpus.jsonl`."""
    train_questions: Path | None = None
    """JSONL with `id`, `source`, `question`, `golden_answers`. None: `<directory>/questions/train.jsonl`."""
    eval_questions: Path | None = None
    demonstrations: Path | None = None
    corpus_countries: Annotated[int, Field(ge=0)] = 0
    """Use only the first so many countries of the Factbook; 0 takes all."""
    demonstration_count: Annotated[int, Field(ge=0)] = 96
    """How many demonstrations `prepare` writes for the warm start."""
    instruction: str = (
        "Answer the question at the end. Write your reasoning between <think> and </think>. Whenever a fact is missing, "
        "write a query between <search> and </search>; passages that were found come back between <information> and "
        "</information>, and you may search again. Once you know, write only the answer, as short as possible, between "
        "<answer> and </answer>.\n\nQuestion: {question}"
    )
    """The user's message; `{question}` is replaced by the question."""
    system: str | None = None
    """A system message before it. None leaves that to the model's chat template."""
    chat_template: bool = True
    """False: the prompt is the instruction as plain text."""

    @model_validator(mode="after")
    def _instruction_has_a_question(self) -> DataConfig:
        if "{question}" not in self.instruction:
            raise ValueError("data.instruction has no {question} in it: add it where the question belongs")
        return self

    @property
    def policy_path(self) -> Path:
        return self.directory / "models" / "policy"

    @property
    def encoder_path(self) -> Path:
        return self.directory / "models" / "encoder"

    @property
    def corpus_path(self) -> Path:
        return self.corpus or self.directory / "corpus.jsonl"

    @property
    def train_path(self) -> Path:
        return self.train_questions or self.directory / "questions" / "train.jsonl"

    @property
    def eval_path(self) -> Path:
        return self.eval_questions or self.directory / "questions" / "eval.jsonl"

    @property
    def demonstrations_path(self) -> Path:
        return self.demonstrations or self.directory / "demonstrations.jsonl"

    @property
    def index_folder(self) -> Path:
        return self.directory / "index"


class RetrieverConfig(Section):
    url: str = "http://127.0.0.1:8000"
    """Where the rollout workers find the service."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    encoder: Path | None = None
    """A Hugging Face folder of an embedding model. None: `<data.directory>/models/encoder`."""
    encoder_family: Literal["auto", "e5", "bge", "contriever", "minilm", "hashing"] = "auto"
    """Decides prefix, pooling and normalisation. `auto` reads it off the folder's name; `hashing` needs no model (tests)."""
    encoder_max_tokens: Positive = 256
    index_factory: str = "Flat"
    """A FAISS index_factory string; inner product."""
    topk: Positive = 3
    """Passages per query when the request does not say."""
    max_topk: Positive = 100
    max_queries: Positive = 512
    """Queries in one request."""
    max_query_chars: Positive = 4000
    max_batch: Positive = 64
    """Queries encoded and searched together."""
    batch_wait_ms: Annotated[float, Field(ge=0)] = 4.0
    """How long the first query of a batch waits for company."""
    queue_size: Positive = 2048
    """Queries waiting at most; beyond it requests are answered 503 with Retry-After."""
    threads: Positive = 1
    """Texts encoded side by side while the service answers."""
    index_threads: Annotated[int, Field(ge=0)] = 0
    """While the index is built; 0 takes every core this process may use."""
    index_checkpoint_s: Annotated[float, Field(ge=0)] = 10.0
    """A build that is killed loses at most so much encoding."""
    cache_size: Annotated[int, Field(ge=0)] = 20_000
    """Answers kept, by (query, topk)."""

    @model_validator(mode="after")
    def _within_limits(self) -> RetrieverConfig:
        if self.topk > self.max_topk:
            raise ValueError(
                f"retriever.topk {self.topk} is above retriever.max_topk {self.max_topk}: lower one or raise the other"
            )
        return self


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
    max_running_requests: Annotated[int, Field(ge=0)] = 0
    """Requests decoded together; others wait in the engine. 0: as many as `rollout.concurrency`."""
    chunked_prefill_tokens: Annotated[int, Field(ge=0)] = 0
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
    max_searches: Annotated[int, Field(ge=0)] = 3
    """Searches that are answered; after the last one the model gets one answer-only turn."""
    topk: Positive = 3
    lease_s: Seconds = 60
    """A group whose worker has shown no sign of life for so long is claimed by another worker."""
    group_deadline_s: Seconds = 1800
    """A worker that has not finished a group after so long counts it as a failed attempt."""
    max_attempts: Positive = 3
    request_timeout_s: Seconds = 300
    retrieval_timeout_s: Seconds = 30
    retrieval_retries: Annotated[int, Field(ge=0)] = 5
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


class WarmStartConfig(Section):
    epochs: Annotated[int, Field(ge=0)] = 1
    """Passes over the demonstrations; 0 leaves the warm start out."""
    batch_size: Positive = 8
    """Demonstrations per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 2


class ObjectiveConfig(Section):
    advantage: Literal["grpo", "dr_grpo"] = "grpo"
    """`dr_grpo` leaves out the division by the group's standard deviation."""
    clip_low: Fraction = 0.2
    clip_high: Annotated[float, Field(ge=0)] = 0.28
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL to the reference policy in the loss. 0 keeps no reference in memory."""
    kl_estimator: Literal["k1", "k2", "k3", "low_var"] = "low_var"
    importance: Literal["none", "tis", "icepop"] = "tis"
    """Correction for the mismatch between engine and trainer, by their log-prob ratio."""
    importance_low: Annotated[float, Field(ge=0)] = 0.0
    importance_high: Annotated[float, Field(gt=0)] = 2.0
    aggregate: Literal["rollout_mean", "token_mean"] = "rollout_mean"
    """Mean over each rollout's model tokens, then over rollouts; or mean over all model tokens of the batch."""


class TrainerConfig(Section):
    device: Literal["cpu", "cuda"] = "cpu"
    processes: Positive = 1
    """Ranks started by torchrun on this machine."""
    threads: Positive = 2
    """Of each rank, on a CPU."""
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    steps: Annotated[int, Field(ge=0)] = 20
    groups_per_step: Positive = 8
    samples_per_prompt: Annotated[int, Field(ge=2)] = 6
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    clip_grad: Annotated[float, Field(gt=0)] = 1.0
    max_tokens_per_microbatch: Positive = 2048
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Versions a trajectory may lag behind the one being trained; 0 is the synchronous recipe."""
    collect_timeout_s: Seconds = 3600
    """No finished group for so long stops the run with a report of where the groups are."""
    checkpoint_every: Positive = 5
    keep_checkpoints: Positive = 2
    eval_every: Annotated[int, Field(ge=0)] = 0
    """GRPO steps between evaluations; 0 evaluates only before and after."""
    eval_questions: Annotated[int, Field(ge=0)] = 200
    """Held-out questions per evaluation, taken evenly from every kind; 0 takes all."""
    distributed_timeout_s: Seconds = 1800
    warm_start: WarmStartConfig = WarmStartConfig()
    objective: ObjectiveConfig = ObjectiveConfig()


class WeightsConfig(Section):
    directory: Path = Path("var/weights")
    """The shared volume: policy versions are published under `<directory>/<run>/v000123`."""
    transport: Literal["volume"] = "volume"
    dtype: Literal["float32", "bfloat16"] = "float32"
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Versions kept besides those an engine still reads."""
    staging_grace_s: Seconds = 60
    """How long the trainer waits for every live engine to verify a version before it goes current anyway."""


class RedisConfig(Section):
    url: str = "redis://127.0.0.1:6379/0"
    password: SecretStr | None = None
    """Only from the environment: FORAGE_REDIS__PASSWORD."""
    retry_s: Seconds = 300
    """How long a service waits for a Redis that is away before it gives up."""

    @model_validator(mode="after")
    def _no_password_in_the_url(self) -> RedisConfig:
        if urlsplit(self.url).password is not None:
            raise ValueError("redis.url carries a password and may be printed: take it out and set FORAGE_REDIS__PASSWORD")
        return self


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    trainer: TrainerConfig = TrainerConfig()
    weights: WeightsConfig = WeightsConfig()
    redis: RedisConfig = RedisConfig()

    @property
    def model_path(self) -> Path:
        return self.model.path or self.data.policy_path

    @property
    def encoder_path(self) -> Path:
        return self.retriever.encoder or self.data.encoder_path

    @property
    def weights_folder(self) -> Path:
        return self.weights.directory / self.run.name

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        problems = list(_contradictions(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _contradictions(config: Config) -> list[str]:
    """Rules that span sections, each told with its mend."""
    found: list[str] = []
    rollout, trainer = config.rollout, config.trainer
    if config.model.source == "folder" and config.model.path is None:
        found.append('model.source = "folder" needs model.path: set it to a Hugging Face folder')
    if rollout.topk > config.retriever.max_topk:
        found.append(f"rollout.topk {rollout.topk} is above retriever.max_topk {config.retriever.max_topk}: lower it")
    if rollout.max_turn_tokens > rollout.max_response_tokens:
        found.append("rollout.max_turn_tokens is above rollout.max_response_tokens: lower it")
    if rollout.max_response_tokens >= config.model.max_context:
        found.append("rollout.max_response_tokens leaves no room for a prompt in model.max_context: lower it")
    if config.model.max_context > rollout.engine.max_total_tokens:
        found.append("rollout.engine.max_total_tokens is below model.max_context: one episode would not fit")
    if trainer.processes % (trainer.tensor_parallel * trainer.pipeline_parallel):
        found.append("trainer.processes must be a multiple of tensor_parallel × pipeline_parallel")
    return found


def load_config(path: Path | str | None, environment: Mapping[str, str] | None = None) -> Config:
    """Read `path` (None: defaults only), apply `FORAGE_*` from `environment` (default: this process's), validate.

    Raises ConfigError with one line per mistake.
    """
    environment = os.environ if environment is None else environment
    values = _read_toml(Path(path)) if path else {}
    if isinstance(values.get("redis"), dict) and "password" in values["redis"]:
        raise ConfigError("redis.password stands in the file: secrets come from the environment only (FORAGE_REDIS__PASSWORD)")
    for name, text in environment.items():
        if name.startswith(PREFIX) and name not in NOT_SETTINGS:
            _set(values, name, text)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or 'config'}: {_reason(e['msg'])}" for e in error.errors()]
        raise ConfigError(f"{path or 'configuration'} cannot be used:\n" + "\n".join(lines)) from None


def _reason(message: str) -> str:
    if message == "Extra inputs are not permitted":
        return "unknown key; check its spelling against `forage config show`"
    return message.removeprefix("Value error, ")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no configuration at {path}: give the path of a TOML file, such as configs/quickstart.toml") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _set(values: dict[str, Any], name: str, text: str) -> None:
    """Apply one environment variable: FORAGE_TRAINER__LEARNING_RATE -> values["trainer"]["learning_rate"]."""
    *sections, key = name.removeprefix(PREFIX).lower().split("__")
    if not sections:
        raise ConfigError(f"{name}: write FORAGE_<SECTION>__<KEY>, such as FORAGE_TRAINER__STEPS")
    types = _types(Config, [*sections, key])
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{name}: {section} is a value, not a section")
    values[key] = text if SecretStr in types else _value(text, keep_text=bool(types & {str, Path}))


def _value(text: str, keep_text: bool) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if keep_text and not isinstance(value, str) else value


def _types(model: Any, names: list[str]) -> set[Any]:
    """The types that a key takes; empty for an unknown key, which validation will name."""
    field = getattr(model, "model_fields", {}).get(names[0])
    if field is None:
        return set()
    if names[1:]:
        return _types(field.annotation, names[1:])
    return set(get_args(field.annotation)) if isinstance(field.annotation, UnionType) else {field.annotation}


def dump_config(config: Config) -> dict[str, Any]:
    """The resolved run as plain data, secrets masked, None left out (TOML has no null)."""
    return config.model_dump(mode="json", exclude_none=True)
