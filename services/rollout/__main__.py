"""``python -m services.rollout --config C``: one engine, one worker, until SIGTERM or Ctrl-C. A second signal ends it at once."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys

import uvloop

from services.contract.config import Config, ConfigError, load_config
from services.contract.store import RedisAway
from services.contract.telemetry import configure_logging
from services.rollout.service import serve

logger = logging.getLogger("rollout")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m services.rollout", description=__doc__)
    parser.add_argument("--config", default=os.environ.get("FORAGE_CONFIG"), help="the run's TOML file; default: FORAGE_CONFIG")
    arguments = parser.parse_args()
    configure_logging("rollout")
    try:
        config = load_config(arguments.config)
    except ConfigError as error:
        sys.exit(str(error))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # a sixth less CPU for a trajectory than asyncio's own
        code = runner.run(run(config))
    sys.stdout.flush()
    os._exit(code)  # threads that still wait for a Redis that is away must not keep the process


async def run(config: Config) -> int:
    """Serve until a signal; returns the exit status."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)  # the engine dies with this process
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await serve(config, stop)
    except ConfigError as error:
        logger.error("%s", error)
        return 1
    except RedisAway as error:
        logger.error("%s; the groups of this worker go to others when their leases run out", error)
        return 1
    except Exception:  # its last words belong in the log, with the time and the name of the service
        logger.exception("the rollout worker ends on an error of its own")
        return 1
    return 0


if __name__ == "__main__":
    main()
