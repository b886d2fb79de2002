"""`python -m services.trainer.export_checkpoint`: a checkpoint of the trainer as a Hugging Face folder, on one CPU process.

The layout that the checkpoint was written in does not matter: it is loaded into another one, of a single rank.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from services.contract.config import Config, ConfigError, load_config
from services.contract.telemetry import configure_logging
from services.contract.weights import WeightsError, verify

ALONE = {
    "device": "cpu",
    "processes": 1,
    "tensor_parallel": 1,
    "pipeline_parallel": 1,
    "transformer_engine": False,
    "offload_optimizer": False,
    "offload_reference": False,
}


def main() -> None:
    logger = configure_logging("export")
    parser = argparse.ArgumentParser(prog="python -m services.trainer.export_checkpoint", description="Exports a checkpoint.")
    parser.add_argument("--config", required=True, help="the run's TOML file")
    parser.add_argument("--checkpoint", required=True, type=Path, help="a folder under <run folder>/checkpoints")
    parser.add_argument("--to", required=True, type=Path, help="a folder that does not exist")
    arguments = parser.parse_args()
    try:
        export(load_config(arguments.config), arguments.checkpoint, arguments.to)
    except (ConfigError, WeightsError, ValueError, OSError) as error:
        logger.error("%s", error)
        sys.exit(2)


def export(config: Config, checkpoint: Path, target: Path) -> None:
    """Raises WeightsError when the checkpoint is damaged."""
    from services.trainer.megatron import distributed
    from services.trainer.megatron.learner import Learner
    from services.trainer.publishing.publish import write_hf_folder

    verify(checkpoint)
    alone = config.model_copy(update={"trainer": config.trainer.model_copy(update=ALONE)})
    distributed.init(alone)
    learner = Learner(alone, config.model_path)
    learner.load(checkpoint)
    target.mkdir(parents=True)
    write_hf_folder(target, config.model_path, learner.export(), config.weights.dtype)
    distributed.shutdown()


if __name__ == "__main__":
    main()
