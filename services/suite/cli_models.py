"""`forage export` and `forage eval`: a run's model as a folder, and the scores of any model."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from services.contract.config import ConfigError, load_config
from services.contract.eval_job import MODES, TABLE, EvalJob, Mode
from services.contract.telemetry import configure_logging
from services.suite.options import DEFAULT_CONFIG, SHARED_ENVIRONMENT, ConfigOption, mistakes_told


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or its folder.")],
    to: Annotated[Path, typer.Option("--to", help="A folder that does not exist, or is empty.")],
    step: Annotated[int | None, typer.Option("--step", min=0, help="The model after this GRPO step.")] = None,
    version: Annotated[int | None, typer.Option("--version", min=1, help="This policy version.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Write a run's model as a Hugging Face folder: the final one, or that of a step or a policy version that is still kept."""
    from services.suite import export as exporting
    from services.suite.run_models import config_of, find_model, find_run

    with mistakes_told():
        folder = find_run(run, load_config(config).run.directory)
        resolved = config_of(folder, config)
        model = find_model(folder, resolved, step, version)
        kept = folder / "config.toml"
        exporting.export(resolved, str(kept) if kept.exists() else config, model, to)
    print(f"{to}: {model.what} of {folder}")


def evaluate(
    model: Annotated[str | None, typer.Option("--model", help="A Hugging Face folder, a run's name or a run's folder.")] = None,
    questions: Annotated[list[Path] | None, typer.Option("--questions", help="A question file; may be given again.")] = None,
    sources: Annotated[list[str] | None, typer.Option("--sources", help="Only this kind of question; may be given again.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="So many questions, evenly from every kind; 0: all.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Episodes a question; several give pass@k.")] = 1,
    temperature: Annotated[float | None, typer.Option(min=0, help="Of sampling; 0 is greedy.")] = None,
    mode: Annotated[str, typer.Option(help="search, rag (one search up front) or direct (none).")] = "search",
    out: Annotated[Path | None, typer.Option("--out", help="Where answers and scores are kept.")] = None,
    running: Annotated[bool, typer.Option("--running", help="Score what the running suite serves, with its services.")] = False,
    rollout: Annotated[int, typer.Option(min=1, help="How many rollout workers.")] = 1,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Score a model on held-out questions. Answers are kept as they come: the same command again goes on."""
    from services.suite import evaluate as evaluating
    from services.suite.redis_address import with_address

    heat = temperature if temperature is not None else (1.0 if samples > 1 else 0.0)
    with mistakes_told():
        _check(model, mode, samples, heat, running)
        resolved = with_address(load_config(config))
        if model is None:
            version = evaluating.served_version(resolved)
            name, digest, folder = f"{resolved.run.name} as it runs, version {version}", f"v{version}", Path()
        else:
            folder, config = evaluating.model_folder(model, config)
            name, digest = model, evaluating.model_digest(folder)
        files = [str(path.resolve()) for path in questions or []]
        job = EvalJob(name, digest, files, sources or [], limit, samples, heat, _mode(mode))
        target = (out or evaluating.default_folder(job, resolved.run.directory)).resolve()
        evaluating.claim_folder(target, job)
        if model is None:
            raise typer.Exit(evaluating.evaluate_running(resolved, config, target))
        _see_through(config, folder, target, rollout)


def _see_through(config: str, model: Path, target: Path, rollouts: int) -> None:
    from services.suite import evaluate as evaluating
    from services.suite.ports import hold_folder
    from services.suite.supervisor import SuiteFailed

    logger = configure_logging("suite")
    with hold_folder(target / "suite"):
        supervisor = evaluating.make_supervisor(config, model, target, rollouts, os.environ | SHARED_ENVIRONMENT)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: supervisor.request_stop())
        logger.info("answers and scores go to %s", target)
        try:
            supervisor.run()
        except SuiteFailed as error:
            logger.error("%s; the answers so far are kept in %s", error, target)
            raise typer.Exit(1) from None
    if not (target / TABLE).exists():
        logger.info("stopped; the same command goes on")


def _check(model: str | None, mode: str, samples: int, temperature: float, running: bool) -> None:
    if running == (model is not None):
        raise ConfigError("name the model by --model, or take the one that a running suite serves by --running")
    _mode(mode)
    if samples > 1 and temperature == 0:
        raise ConfigError("several --samples at temperature 0 are all the same: set --temperature above 0")


def _mode(name: str) -> Mode:
    for mode in MODES:
        if mode == name:
            return mode
    raise ConfigError(f"--mode {name} is unknown: use one of {', '.join(MODES)}")
