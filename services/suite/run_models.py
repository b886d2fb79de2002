"""Which folder holds a run's model: the final one, a published version, or a checkpoint of the trainer.

| asked for            | taken, the first that is there                                                                          |
|----------------------|---------------------------------------------------------------------------------------------------------|
| nothing              | `<run folder>/final`; the newest published version; the newest checkpoint                               |
| `--version V`        | version V on the weights volume                                                                         |
| `--step N`           | the version that step N published, if the volume still has it; a checkpoint written after step N        |

A published version is a Hugging Face folder already; a checkpoint is the trainer's own format and must be written as one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from services.contract.config import Config, ConfigError, load_config
from services.contract.weights import published_versions, version_folder


class RunModel(msgspec.Struct, frozen=True):
    kind: Literal["folder", "checkpoint"]
    path: Path
    what: str
    """For a person."""


class _Ledger(msgspec.Struct, frozen=True):
    """Of a checkpoint, what matters here."""

    step: int = 0
    warm_step: int = 0
    version: int = 0
    unpublished: bool = False


def find_run(name: str, directory: Path) -> Path:
    """The folder of a run, by its path or by its name under `directory`. Raises ConfigError."""
    for folder in (Path(name), directory / name):
        if (folder / "metrics.jsonl").exists() or (folder / "checkpoints").is_dir():
            return folder
    known = ", ".join(folder.name for folder in runs_in(directory)) or "none"
    raise ConfigError(f"no run {name}: neither a run's folder nor a run under {directory} (there: {known})")


def runs_in(directory: Path) -> list[Path]:
    """Folders of runs, by name."""
    return sorted(path.parent for path in directory.glob("*/metrics.jsonl"))


def config_of(run: Path, otherwise: str | None = None) -> Config:
    """The configuration that the run was last trained with. `otherwise`: a file for runs that left none. Raises ConfigError."""
    kept = run / "config.toml"
    if kept.exists():
        return load_config(kept)
    if otherwise:
        return load_config(otherwise)
    raise ConfigError(f"{run} has no config.toml: name the run's configuration by --config")


def find_model(run: Path, config: Config, step: int | None = None, version: int | None = None) -> RunModel:
    """By the module's table. Raises ConfigError telling what is kept."""
    if step is not None and version is not None:
        raise ConfigError("--step and --version each name a model: leave one of them out")
    for found in _candidates(run, config, step, version):
        return found
    wanted = f"version {version}" if version is not None else f"the model of step {step}" if step is not None else "any model"
    raise ConfigError(f"{run} does not keep {wanted}; it has {_kept(run, config)}")


def _candidates(run: Path, config: Config, step: int | None, version: int | None) -> Iterator[RunModel]:
    weights = config.weights_folder
    if version is not None:
        yield from _published(weights, version, f"version {version}")
    elif step is not None:
        if (of_step := _version_of(run, step)) is not None:
            yield from _published(weights, of_step, f"step {step}, version {of_step}")
        yield from (model for ledger, model in _checkpoints(run, config) if ledger.step == step)
    else:
        if (run / "final" / "config.json").exists():
            yield RunModel("folder", run / "final", "the final model")
        if versions := published_versions(weights):
            yield from _published(weights, versions[-1], f"version {versions[-1]}, the newest")
        yield from (model for _, model in _checkpoints(run, config))


def _published(weights: Path, version: int, what: str) -> Iterator[RunModel]:
    if version in published_versions(weights):
        yield RunModel("folder", version_folder(weights, version), what)


def _version_of(run: Path, step: int) -> int | None:
    """The version that a GRPO step published, by the journal."""
    try:
        lines = (run / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("kind") == "grpo" and row.get("step") == step and "staleness/version" in row:
            return int(row["staleness/version"])
    return None


def _checkpoints(run: Path, config: Config) -> Iterator[tuple[_Ledger, RunModel]]:
    """The newest first. One that was written before anything was learned holds the starting model."""
    folder = run / "checkpoints"
    for serial in reversed(published_versions(folder)):
        path = version_folder(folder, serial)
        try:
            ledger = msgspec.json.decode((path / "ledger.json").read_bytes(), type=_Ledger)
        except (OSError, msgspec.DecodeError):
            continue
        what = f"step {ledger.step}, checkpoint {path.name}"
        learned = ledger.warm_step or ledger.step
        yield ledger, RunModel("checkpoint", path, what) if learned else RunModel("folder", config.model_path, f"{what}: the start")


def _kept(run: Path, config: Config) -> str:
    versions = ", ".join(map(str, published_versions(config.weights_folder))) or "none"
    steps = ", ".join(str(ledger.step) for ledger, _ in _checkpoints(run, config)) or "none"
    final = "the final model" if (run / "final" / "config.json").exists() else "no final model"
    return f"{final}; versions {versions}; checkpoints after steps {steps}"
