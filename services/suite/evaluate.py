"""`forage eval`: scores any model on any question files, with the services that this takes, and keeps every answer.

The folder of an evaluation:

| file            | holds                                                                                       |
|-----------------|---------------------------------------------------------------------------------------------|
| `job.json`      | what was asked for, with the digest of the weights: answers of another job are not mixed in |
| `answers.jsonl` | every answer, as it came; a second start asks for the missing ones only                     |
| `results.json`  | the scores with their intervals                                                             |
| `results.md`    | the table that is printed                                                                   |
| `suite/`        | the services' own: Redis, heartbeats, the engine's log                                      |
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import redis

from services.contract.config import Config, ConfigError, load_config
from services.contract.eval_job import JOB, EvalJob, read_job
from services.contract.policy import PolicyBoard
from services.contract.weights import file_digest
from services.suite.plan import answers, make_eval_plan
from services.suite.ports import free_port, refuse_taken_port
from services.suite.redis_address import hasty_client, problem_in_words
from services.suite.run_models import config_of, find_model, find_run
from services.suite.supervisor import Supervisor

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


def default_folder(job: EvalJob, directory: Path) -> Path:
    """`<run.directory>/../evals/<model>-<mode>-<digest>`."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", job.model).strip("-.")[-60:] or "model"
    return directory.parent / "evals" / f"{name}-{job.mode}-{job.model_digest[:6]}"


def claim_folder(folder: Path, job: EvalJob) -> None:
    """Make the folder this job's. Raises ConfigError when it holds answers of another one."""
    former = read_job(folder)
    if former and not former.same_answers(job):
        changed = [f for f in EvalJob.__struct_fields__ if getattr(former, f) != getattr(job, f)]
        differences = ", ".join(f"{f} {getattr(former, f)!r}, not {getattr(job, f)!r}" for f in changed)
        raise ConfigError(f"{folder} holds answers of another evaluation ({differences}): name another folder by --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOB).write_bytes(msgspec.json.format(msgspec.json.encode(job)))


def make_supervisor(config_path: str, model: Path, folder: Path, rollouts: int, environment: Mapping[str, str]) -> Supervisor:
    """Of the services that the folder's job needs, none of them started yet. Raises ConfigError."""
    job = read_job(folder)
    assert job, "claim_folder first"
    port = free_port()
    own = {
        "FORAGE_RUN__NAME": RUN_NAME,
        "FORAGE_RUN__DIRECTORY": str(folder / "suite"),
        "FORAGE_WEIGHTS__DIRECTORY": str(folder / "suite" / "weights"),
        "FORAGE_MODEL__SOURCE": "folder",
        "FORAGE_MODEL__PATH": str(model),
        "FORAGE_TRAINER__WARM_START__EPOCHS": "0",
        "FORAGE_REDIS__URL": f"redis://127.0.0.1:{port}/0",
    }
    environment = {**environment, **own}
    config = load_config(config_path, environment)
    searching = job.mode != "direct" or not (job.questions or config.data.eval_path.exists())
    own_retriever = searching and not answers(f"{config.retriever.url}/ready")
    if own_retriever:
        refuse_taken_port(config)
    return Supervisor(make_eval_plan(config, config_path, folder / "suite", port, rollouts, folder, own_retriever), environment)


def served_version(config: Config) -> int:
    """The policy version that the configuration's running suite serves. Raises ConfigError."""
    try:
        current = PolicyBoard(hasty_client(config), config.run.name).current()
    except (redis.RedisError, OSError) as error:
        raise ConfigError(problem_in_words(config, error)) from None
    if current is None:
        raise ConfigError(f"run {config.run.name} serves no policy yet: start the suite, or leave --running out")
    return current.version


def evaluate_running(config: Config, config_path: str, folder: Path) -> int:
    """Score the policy that the configuration's running suite serves; returns the exit code of the evaluator."""
    environment = os.environ | {"FORAGE_REDIS__URL": config.redis.url}
    command = [sys.executable, "-m", "services.trainer.eval_main", "--config", config_path, "--job", str(folder), "--running"]
    return subprocess.run(command, env=environment).returncode
