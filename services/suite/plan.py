"""Which processes make a suite, what each waits for, and how one knows that it is ready. The same plan as docker-compose.yml."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import redis

from services.contract.config import Config
from services.contract.redis_binary import redis_binary
from services.contract.telemetry import check_heartbeat

HEARTBEAT_MAX_AGE_S = 900.0
"""A training step on a laptop takes minutes; a loop that has been silent for longer is stuck."""


@dataclass(frozen=True)
class Service:
    name: str
    command: list[str]
    after: tuple[str, ...] = ()
    """Names of services that must be ready, or done if they are one-shots, before this one starts."""
    one_shot: bool = False
    final: bool = False
    """When this one exits with 0 the suite is done."""
    is_ready: Callable[[], bool] | None = None
    grace_s: float = 30.0
    """Between SIGTERM and SIGKILL."""
    environment: dict[str, str] = field(default_factory=dict)


def make_plan(config: Config, config_path: str, folder: Path, redis_port: int, rollouts: int) -> list[Service]:
    """The services in the order in which they start; stopped in the reverse order."""
    services = [_redis(folder / "redis", redis_port), *_searching(config, config_path, folder)]
    services += _playing(config, config_path, folder, rollouts, after=("redis", "retriever"))
    if config.trainer.warm_start.epochs:
        arguments = ("prepare", "demonstrations")
        services.append(_python("demonstrations", arguments, config_path, folder, after=("retriever",), one_shot=True))
    waits = ("redis", *(["demonstrations"] if config.trainer.warm_start.epochs else ["prepare"]))
    return [*services, _python("trainer", ("trainer",), config_path, folder, after=waits, final=True, grace_s=300)]


def make_eval_plan(
    config: Config, config_path: str, folder: Path, redis_port: int, rollouts: int, jobs: list[Path], own_retriever: bool
) -> list[Service]:
    """As `make_plan`, with the evaluator in the trainer's place; without a retriever where none is needed or one runs already."""
    services = [_redis(folder / "redis", redis_port)]
    if own_retriever:
        services += _searching(config, config_path, folder)
    waits = ("redis", *(["retriever"] if own_retriever else []))
    services += _playing(config, config_path, folder, rollouts, after=waits)
    arguments = ("trainer.evaluation.standalone", *(word for job in jobs for word in ("--job", str(job))))
    return [*services, _python("evaluator", arguments, config_path, folder, after=waits, final=True)]


def answers(url: str) -> bool:
    """Whether a service is ready at its address."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _searching(config: Config, config_path: str, folder: Path) -> list[Service]:
    ready = f"{config.retriever.url}/ready"
    return [
        _python("prepare", ("prepare", "assets"), config_path, folder, one_shot=True),
        _python("index", ("retriever", "index", "build"), config_path, folder, after=("prepare",), one_shot=True),
        _python("retriever", ("retriever", "serve"), config_path, folder, after=("index",), is_ready=lambda: answers(ready)),
    ]


def _playing(config: Config, config_path: str, folder: Path, rollouts: int, after: tuple[str, ...]) -> list[Service]:
    names = [f"rollout-{i}" if rollouts > 1 else "rollout" for i in range(1, rollouts + 1)]
    grace_s = config.rollout.shutdown_grace_s + 15
    workers = [_python(name, ("rollout",), config_path, folder, after=after, grace_s=grace_s) for name in names]
    return [_python("reward", ("reward",), config_path, folder, after=("redis",)), *workers]


def _python(
    name: str, arguments: tuple[str, ...], config_path: str, folder: Path, after: tuple[str, ...] = (), **options: object
) -> Service:
    """A service of ours: `python -m services.<arguments>`, ready by its heartbeat unless the options say how."""
    heartbeat = folder / f"{name}.heartbeat"
    options.setdefault("is_ready", lambda: _beats(heartbeat))
    module, *rest = arguments
    environment = {"FORAGE_HEARTBEAT_FILE": str(heartbeat)}
    if module == "prepare":  # the only one that downloads, and only what the configuration names
        environment["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "0")
    command = [sys.executable, "-m", f"services.{module}", *rest, "--config", config_path]
    return Service(name, command, after, environment=environment, **options)  # type: ignore[arg-type]


def _redis(folder: Path, port: int) -> Service:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"port": port, "bind": "127.0.0.1", "dir": folder, "logfile": "redis.log", "loglevel": "warning"}
    # A write that was answered is on the disk: the streams are the run's memory, and they are small.
    settings |= {"appendonly": "yes", "appendfsync": "always", "save": "", "maxmemory-policy": "noeviction"}
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return Service("redis", [redis_binary(), *options], is_ready=lambda: _pings(port))


def _pings(port: int) -> bool:
    client = redis.Redis(port=port, socket_timeout=2)
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


def _beats(heartbeat: Path) -> bool:
    try:
        check_heartbeat(heartbeat, HEARTBEAT_MAX_AGE_S)
    except RuntimeError:
        return False
    return True
