"""`forage export`: a run's model as a Hugging Face folder, whole or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from services.contract.config import Config, ConfigError
from services.contract.files import move_into_place, sync
from services.contract.weights import MANIFEST, WeightsError, verify
from services.suite.run_models import RunModel


def export(config: Config, config_path: str, model: RunModel, target: Path) -> None:
    """Write the model to `target`. Raises ConfigError when that is taken or the model is damaged."""
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise ConfigError(f"{target} exists and is not empty: name another folder, or remove it")
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        _copy(model.path, temporary) if model.kind == "folder" else _convert(config_path, model.path, temporary)
        if target.exists():
            target.rmdir()
        for path in temporary.rglob("*"):
            sync(path)
        move_into_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    try:
        if (source / MANIFEST).exists():
            verify(source)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(MANIFEST))
    except (WeightsError, OSError) as error:
        raise ConfigError(f"{source} cannot be copied: {error}") from None


def _convert(config_path: str, checkpoint: Path, target: Path) -> None:
    """The trainer reads its own checkpoints, in a process that has torch and Megatron."""
    arguments = ["--config", config_path, "--checkpoint", str(checkpoint), "--to", str(target)]
    command = [sys.executable, "-m", "services.trainer.export_checkpoint", *arguments]
    done = subprocess.run(command, env=os.environ, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ConfigError(f"{checkpoint} could not be exported: see above; it needs the packages of the trainer")
