"""`forage export` and `forage eval`: a run's model as a folder, and the scores of any model."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from services.contract.config import ConfigError, load_config
from services.contract.eval_job import MODES, EvalJob, Mode
from services.contract.telemetry import configure_logging
from services.suite.options import DEFAULT_CONFIG, PUBLISHED_HELP, SHARED_ENVIRONMENT, ConfigOption, mistakes_told


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
    sources: Annotated[list[str] | None, typer.Option("--sources", help="Only these sets of questions: nq,hotpotqa")] = None,
    limit: Annotated[int, typer.Option(min=0, help="So many questions, evenly from every set; 0: all.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Episodes a question; several give pass@k.")] = 1,
    temperature: Annotated[float | None, typer.Option(min=0, help="Of sampling; 0 is greedy.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="search, rag (one search up front), direct (none), or several.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where answers and scores are kept.")] = None,
    running: Annotated[bool, typer.Option("--running", help="Score what the running suite serves, with its services.")] = False,
    rollout: Annotated[int, typer.Option(min=1, help="How many rollout workers.")] = 1,
    published: Annotated[str, typer.Option("--published", help=PUBLISHED_HELP)] = "",
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Score a model on held-out questions. Answers are kept as they come: the same command again goes on."""
    from services.suite import evaluate as evaluating
    from services.suite.published import published_rows
    from services.suite.redis_address import with_address

    heat = temperature if temperature is not None else (1.0 if samples > 1 else 0.0)
    with mistakes_told():
        modes = _modes(mode or ["search"])
        _check(model, samples, heat, running)
        published_rows(published)  # a name that is none is told now, not after hours
        resolved = with_address(load_config(config))
        if model is None:
            version = evaluating.served_version(resolved)
            name, digest, folder = f"{resolved.run.name} as it runs, version {version}", f"v{version}", Path()
        else:
            folder, config = evaluating.model_folder(model, config)
            name, digest = model, evaluating.model_digest(folder)
        files = [str(path.resolve()) for path in questions or []]
        jobs = [EvalJob(name, digest, files, _several(sources), limit, samples, heat, each) for each in modes]
        evaluating.refuse_unknown_sources(load_config(config), jobs[0])
        target = (out or evaluating.default_folder(jobs, resolved.run.directory)).resolve()
        folders = evaluating.claim_folders(target, jobs)
        if model is None:
            code = evaluating.evaluate_running(resolved, config, folders)
        else:
            code = _see_through(config, folder, folders, target, rollout)
        _conclude(folders, target, published, shown=len(folders) > 1)
    raise typer.Exit(code)


def _see_through(config: str, model: Path, folders: list[Path], target: Path, rollouts: int) -> int:
    """Start what is needed, wait for the evaluator; returns the exit code."""
    from services.suite import evaluate as evaluating
    from services.suite.ports import hold_folder
    from services.suite.supervisor import SuiteFailed

    logger, suite = configure_logging("suite"), target / "suite"
    with hold_folder(suite):
        supervisor = evaluating.make_supervisor(config, model, folders, suite, rollouts, os.environ | SHARED_ENVIRONMENT)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: supervisor.request_stop())
        logger.info("answers and scores go to %s", target)
        try:
            supervisor.run()
        except SuiteFailed as error:
            logger.error("%s; the answers so far are kept in %s", error, target)
            return 1
    return 0


def _conclude(folders: list[Path], target: Path, published: str, shown: bool) -> None:
    """The table of all modes, if all are finished."""
    from services.suite.published import published_rows
    from services.suite.score_files import write_table
    from services.suite.score_table import as_markdown, is_finished, make_table, read_evaluations

    logger = configure_logging("suite")
    if not all(is_finished(folder) for folder in folders):
        logger.info("not finished; the same command goes on")
        return
    table = make_table(read_evaluations([str(folder) for folder in folders]), published_rows(published))
    written = write_table(table, target)
    if shown:
        print(f"\n{as_markdown(table)}")
    logger.info("wrote %s", ", ".join(map(str, written)))


def _check(model: str | None, samples: int, temperature: float, running: bool) -> None:
    if running == (model is not None):
        raise ConfigError("name the model by --model, or take the one that a running suite serves by --running")
    if samples > 1 and temperature == 0:
        raise ConfigError("several --samples at temperature 0 are all the same: set --temperature above 0")


def _several(given: list[str] | None) -> list[str]:
    """`a,b` and `--x a --x b` are the same; nothing comes twice."""
    return list(dict.fromkeys(part.strip() for text in given or [] for part in text.split(",") if part.strip()))


def _modes(given: list[str]) -> list[Mode]:
    """In the order in which they are played, whatever was given. Raises ConfigError."""
    names = _several(given)
    if unknown := [name for name in names if name not in MODES]:
        raise ConfigError(f"--mode {unknown[0]} is unknown: use some of {', '.join(MODES)}")
    if not names:
        raise ConfigError(f"--mode names none: use some of {', '.join(MODES)}")
    return [mode for mode in MODES if mode in names]
