"""The configuration of a run: a section a service, in a file of its own; `load_config` reads them all."""

from services.contract.config.base import ConfigError, Section
from services.contract.config.load import Config, dump_config, load_config
from services.contract.config.objective import ObjectiveConfig
from services.contract.config.retriever import RetrieverConfig
from services.contract.config.rollout import EngineConfig, RewardConfig, RolloutConfig
from services.contract.config.run import DataConfig, ModelConfig, RedisConfig, RunConfig, WeightsConfig
from services.contract.config.trainer import TrainerConfig, WarmStartConfig

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "RedisConfig",
    "RetrieverConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "TrainerConfig",
    "WarmStartConfig",
    "WeightsConfig",
    "dump_config",
    "load_config",
]
