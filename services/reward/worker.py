"""A worker that grades until it is told to stop.

Processes rather than threads: only they can be held to time limits, and a grader that dies takes nothing else with it.
SIGTERM finishes what is being graded; whatever was not acknowledged is delivered again.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import warnings

import redis
from celery import signals
from celery.apps.worker import Worker
from celery.exceptions import CPendingDeprecationWarning, SecurityWarning

from services.contract.config import Config, ConfigError, load_config
from services.contract.grading import grading_app
from services.contract.store import RedisAway, connect
from services.contract.telemetry import Heartbeat, configure_logging
from services.reward.health import STARTING, HeartbeatStep
from services.reward.metrics import Metrics, serve_metrics
from services.reward.sweep import Sweep
from services.reward.task import register


def make_worker(config: Config) -> Worker:
    app = grading_app(config)
    app.conf.broker_transport = "services.reward.transport:Transport"  # by name: `inspect stats` sends it as JSON
    register(app, config, Metrics())
    Sweep(app, config).start()
    app.steps["consumer"].add(HeartbeatStep)  # pyright: ignore[reportOptionalSubscript]
    return Worker(
        app=app,
        hostname=f"reward-{os.getpid()}@{socket.gethostname()}",
        pool="prefork",
        concurrency=config.reward.concurrency,
        quiet=True,
        without_gossip=True,
        without_mingle=True,
    )


def wait_for_redis(config: Config) -> None:
    """Raises RedisAway after `redis.retry_s`, ConfigError when the login is refused."""
    client = connect(config.redis)
    try:
        client.ping()
    except (redis.AuthenticationError, redis.ResponseError) as error:
        raise ConfigError(f"Redis refuses the login: {error}. Is FORAGE_REDIS__PASSWORD right?") from error
    finally:
        client.close()


def keep_celery_quiet() -> None:
    """Our log lines are enough: Celery configures no logging of its own and tells only of trouble."""
    warnings.filterwarnings("ignore", category=SecurityWarning)  # it fears pickle under root; we accept JSON only
    signals.setup_logging.connect(lambda **_: None, weak=False)
    for name in ("celery", "kombu", "amqp"):
        logging.getLogger(name).setLevel(logging.WARNING)


def run() -> None:
    parser = argparse.ArgumentParser(prog="python -m services.reward", description="Grades trajectories.")
    parser.add_argument("--config", default=os.environ.get("FORAGE_CONFIG"), help="a TOML file; default: $FORAGE_CONFIG")
    logger = configure_logging("reward")
    Heartbeat.from_environment().beat(STARTING)
    try:
        config = load_config(parser.parse_args().config)
        serve_metrics(config.reward)
        wait_for_redis(config)
        keep_celery_quiet()
        worker = make_worker(config)
    except (ConfigError, RedisAway) as error:
        sys.exit(str(error))
    warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)  # after Celery has switched it on
    worker.start()
    logger.info("stopped")
    sys.exit(worker.exitcode or 0)
