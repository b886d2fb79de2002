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
from typing import Any, get_args

import msgspec
from pydantic import SecretStr, ValidationError, model_validator

from services.contract.config.base import ConfigError, Section
from services.contract.config.data import DataConfig, hub_name
from services.contract.config.retriever import RetrieverConfig
from services.contract.config.reward import RewardConfig
from services.contract.config.rollout import RolloutConfig
from services.contract.config.run import ModelConfig, RedisConfig, RunConfig, WeightsConfig
from services.contract.config.trainer import TrainerConfig

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
        return self.data.local(self.model.path) or self.data.policy_path

    @property
    def encoder_path(self) -> Path:
        return self.data.local(self.retriever.encoder) or self.data.encoder_path

    @property
    def reranker_path(self) -> Path | None:
        return self.data.local(self.retriever.rerank.model)

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
    if hub_name(config.model.path) and config.model.source != "folder":
        found.append('model.path = "hub:NAME" needs model.source = "folder": set it')
    if rollout.topk > config.retriever.max_topk:
        found.append(f"rollout.topk {rollout.topk} is above retriever.max_topk {config.retriever.max_topk}: lower it")
    if rollout.max_turn_tokens > rollout.max_response_tokens:
        found.append("rollout.max_turn_tokens is above rollout.max_response_tokens: lower it")
    if rollout.max_response_tokens >= config.model.max_context:
        found.append("rollout.max_response_tokens leaves no room for a prompt in model.max_context: lower it")
    if not rollout.engine.urls and config.model.max_context > rollout.engine.max_total_tokens:
        found.append("rollout.engine.max_total_tokens is below model.max_context: one episode would not fit")
    if trainer.processes % (trainer.tensor_parallel * trainer.pipeline_parallel):
        found.append("trainer.processes must be a multiple of tensor_parallel × pipeline_parallel")
    if rollout.top_p < 1 and trainer.steps:
        found.append(
            f"rollout.top_p {rollout.top_p} draws from less than the distribution that log-probs are of, on both sides, so the "
            "ratio to the engine would be wrong: set it to 1, and a lower rollout.temperature for cooler samples"
        )
    if config.weights.transport == "collective" and trainer.device != rollout.engine.device:
        found.append('weights.transport = "collective" needs trainer.device and rollout.engine.device alike: or take "volume"')
    objective = trainer.objective
    if objective.overlong_tokens and objective.overlong_tokens - objective.overlong_buffer >= rollout.max_response_tokens:
        found.append("trainer.objective.overlong_tokens is out of reach under rollout.max_response_tokens: lower it")
    return found


def load_config(path: Path | str | None, environment: Mapping[str, str] | None = None) -> Config:
    """Read `path` (None: defaults only), apply `FORAGE_*` from `environment` (default: this process's), validate.

    Raises ConfigError with one line per mistake.
    """
    environment = os.environ if environment is None else environment
    values = _read_toml(Path(path)) if path else {}
    for key in _secrets(values, Config):
        raise ConfigError(f"{key} stands in the file: secrets come from the environment only ({_variable(key)})")
    for name, text in environment.items():
        if name.startswith(PREFIX) and name not in NOT_SETTINGS:
            _set(values, name, text)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or 'config'}: {_reason(e['msg'])}" for e in error.errors()]
        raise ConfigError(f"{path or 'configuration'} cannot be used:\n" + "\n".join(lines)) from None


def _secrets(values: dict[str, Any], model: Any, path: str = "") -> list[str]:
    """The keys of `values` that hold a secret."""
    found: list[str] = []
    for key, value in values.items():
        field = model.model_fields.get(key)
        if field is not None and SecretStr in _types(model, [key]):
            found.append(path + key)
        elif field is not None and isinstance(value, dict) and hasattr(field.annotation, "model_fields"):
            found += _secrets(value, field.annotation, f"{path}{key}.")
    return found


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


def save_config(config: Config, path: Path) -> None:
    """Write what file and environment have set, as a file that `load_config` reads back; secrets are left out.

    Defaults are not written, so that a later version, which may have no such key any more, reads the file still.
    """
    path.write_bytes(msgspec.toml.encode(_without_secrets(config.model_dump(mode="json", exclude_none=True, exclude_unset=True))))


def dump_config(config: Config) -> dict[str, Any]:
    """The resolved run as plain data, without secrets and None (TOML has no null); `Config.model_validate` makes the same of it."""
    return _without_secrets(config.model_dump(mode="json", exclude_none=True))


def show_config(config: Config) -> str:
    """The resolved run as TOML that `load_config` reads back; of a secret, a comment that it is set."""
    secrets = _secrets(config.model_dump(mode="json", exclude_none=True), Config)
    lines = [f"# {key} is set; it comes from the environment only ({_variable(key)})\n" for key in secrets]
    return "".join(lines) + msgspec.toml.encode(dump_config(config)).decode()


def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """`values`, changed in place."""
    for key in _secrets(values, Config):
        *sections, name = key.split(".")
        holder = values
        for section in sections:
            holder = holder[section]
        del holder[name]
    return values


def _variable(key: str) -> str:
    """trainer.learning_rate -> FORAGE_TRAINER__LEARNING_RATE."""
    return PREFIX + key.upper().replace(".", "__")
