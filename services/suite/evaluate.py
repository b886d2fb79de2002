"""`forage eval`: scores any model on any question files, with the services that this takes, and keeps every answer.

The folder of an evaluation; of several modes, each has its own in it (`direct/`, `rag/`, `search/`) and goes on by itself:

| file            | holds                                                                                       |
|-----------------|---------------------------------------------------------------------------------------------|
| `job.json`      | what was asked for, with the digest of the weights: answers of another job are not mixed in |
| `answers.jsonl` | every answer, as it came; a second start asks for the missing ones only                     |
| `results.json`  | the scores with their intervals                                                             |
| `results.md`    | the table that is printed                                                                   |
| `table.*`       | all modes in one table, beside what others published: see score_files.py                    |
| `suite/`        | the services' own: Redis, heartbeats, the engine's log                                      |
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import redis

from services.contract.config import Config, ConfigError, load_config
from services.contract.eval_job import JOB, EvalJob, read_job, unknown_sources
from services.contract.files import file_digest
from services.contract.policy import PolicyBoard
from services.suite.plan import answers, make_eval_plan
from services.suite.ports import free_port, refuse_taken_port
from services.suite.redis_address import hasty_client, problem_in_words
from services.suite.run_models import config_of, find_model, find_run
from services.suite.supervisor import Supervisor

logger = logging.getLogger("suite")

RUN_NAME = "eval"


def model_folder(name: str, config_path: str) -> tuple[Path, str]:
    """(a Hugging Face folder, the configuration to use) for a model named by its folder or by a run. Raises ConfigError."""
    folder = Path(name)
    if (folder / "config.json").exists():
        return folder.resolve(), config_path
    run = find_run(name, load_config(config_path).run.directory)
    kept = run / "config.toml"
    model = find_model(run, config_of(run, config_path))
    if model.kind == "checkpoint":
        raise ConfigError(f"{name} has only {model.what}, in the trainer's format: `forage export {name} --to DIR` first")
    return model.path.resolve(), str(kept) if kept.exists() else config_path


def model_digest(folder: Path) -> str:
    """Of configuration and weights."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"])
    return hashlib.sha256("".join(f"{path.name} {file_digest(path)}\n" for path in files).encode()).hexdigest()[:16]


def default_folder(jobs: Sequence[EvalJob], directory: Path) -> Path:
    """`<run.directory>/../evals/<model>-<mode>-<digest>`, of several modes without the mode."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", jobs[0].model).strip("-.")[-60:] or "model"
    parts = [name, *([jobs[0].mode] if len(jobs) == 1 else []), jobs[0].model_digest[:6]]
    return directory.parent / "evals" / "-".join(parts)


def refuse_unknown_sources(config: Config, job: EvalJob) -> None:
    """Before anything starts, where the questions are here already; else the evaluator tells. Raises ConfigError."""
    files = [Path(name) for name in job.questions] or [config.data.eval_path]
    if not job.sources or not all(path.is_file() for path in files):
        return
    if problem := unknown_sources(job.sources, {source for path in files for source in _sources(path)}):
        raise ConfigError(problem)


def _sources(path: Path) -> Iterator[str]:
    """Of every line that names one; what is wrong with the others, the evaluator tells."""
    decode = msgspec.json.Decoder(_HasSource).decode
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(msgspec.DecodeError):
                yield decode(line).source


class _HasSource(msgspec.Struct):
    source: str


def claim_folders(target: Path, jobs: Sequence[EvalJob]) -> list[Path]:
    """The folder of each job: the target itself, or of several modes one in it each. Raises ConfigError."""
    folders = [target / job.mode if len(jobs) > 1 else target for job in jobs]
    for folder, job in zip(folders, jobs, strict=True):
        claim_folder(folder, job)
    return folders


def claim_folder(folder: Path, job: EvalJob) -> None:
    """Make the folder this job's. Raises ConfigError when it holds answers of another one."""
    former = read_job(folder)
    if former and not former.same_answers(job):
        changed = [f for f in EvalJob.__struct_fields__ if getattr(former, f) != getattr(job, f)]
        differences = ", ".join(f"{f} {getattr(former, f)!r}, not {getattr(job, f)!r}" for f in changed)
        raise ConfigError(f"{folder} holds answers of another evaluation ({differences}): name another folder by --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOB).write_bytes(msgspec.json.format(msgspec.json.encode(job)))


def make_supervisor(
    config_path: str, model: Path, folders: Sequence[Path], suite: Path, rollouts: int, environment: Mapping[str, str]
) -> Supervisor:
    """Of the services that the folders' jobs need, with their own files in `suite`; none is started yet. Raises ConfigError."""
    jobs = [job for folder in folders if (job := read_job(folder))]
    assert len(jobs) == len(folders), "claim_folders first"
    port = free_port()
    own = {
        "FORAGE_RUN__NAME": RUN_NAME,
        "FORAGE_RUN__DIRECTORY": str(suite),
        "FORAGE_WEIGHTS__DIRECTORY": str(suite / "weights"),
        "FORAGE_MODEL__SOURCE": "folder",
        "FORAGE_MODEL__PATH": str(model),
        "FORAGE_TRAINER__WARM_START__EPOCHS": "0",
        "FORAGE_REDIS__URL": f"redis://127.0.0.1:{port}/0",
    }
    environment = {**environment, **own}
    config = load_config(config_path, environment)
    searching = any(job.mode != "direct" or not (job.questions or config.data.eval_path.exists()) for job in jobs)
    own_retriever = searching and not answers(f"{config.retriever.url}/ready")
    if own_retriever:
        refuse_taken_port(config)
    elif searching:
        logger.info("a retriever answers at %s already: its passages are used, whatever corpus they are of", config.retriever.url)
    return Supervisor(make_eval_plan(config, config_path, suite, port, rollouts, list(folders), own_retriever), environment)


def served_version(config: Config) -> int:
    """The policy version that the configuration's running suite serves. Raises ConfigError."""
    try:
        current = PolicyBoard(hasty_client(config), config.run.name).current()
    except (redis.RedisError, OSError) as error:
        raise ConfigError(problem_in_words(config, error)) from None
    if current is None:
        raise ConfigError(f"run {config.run.name} serves no policy yet: start the suite, or leave --running out")
    return current.version


def evaluate_running(config: Config, config_path: str, folders: Sequence[Path]) -> int:
    """Score the policy that the configuration's running suite serves; returns the exit code of the evaluator."""
    environment = os.environ | {"FORAGE_REDIS__URL": config.redis.url}
    command = [sys.executable, "-m", "services.trainer.evaluation.standalone", "--config", config_path, "--running"]
    command += [word for folder in folders for word in ("--job", str(folder))]
    return subprocess.run(command, env=environment).returncode
