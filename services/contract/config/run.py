"""The run itself: its name, model, data, shared volume and Redis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator

from services.contract.config.base import NonNegative, Positive, Seconds, Section


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
    corpus_countries: NonNegative = 0
    """Use only the first so many countries of the Factbook; 0 takes all."""
    demonstration_count: NonNegative = 96
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
