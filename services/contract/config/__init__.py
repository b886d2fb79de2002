"""The configuration of a run: a section a service, in a file of its own; `load_config` reads them all."""

from services.contract.config.base import ConfigError, Section
from services.contract.config.data import Columns, DataConfig, QuestionFile, hub_name, mix_problem
from services.contract.config.load import Config, dump_config, load_config, save_config, show_config
from services.contract.config.objective import ObjectiveConfig
from services.contract.config.retriever import RetrieverConfig
from services.contract.config.reward import RewardConfig
from services.contract.config.rollout import EngineConfig, RolloutConfig
from services.contract.config.run import ModelConfig, RedisConfig, RunConfig, WeightsConfig
from services.contract.config.trainer import TrainerConfig, WarmStartConfig

__all__ = [
    "Columns",
    "Config",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "QuestionFile",
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
    "hub_name",
    "load_config",
    "mix_problem",
    "save_config",
    "show_config",
]
