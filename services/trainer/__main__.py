"""`python -m services.trainer --config FILE`: train one run to its end, or go on where it stopped.

Exit codes: 0 done or stopped on request (after saving), 2 the configuration or its files cannot be used, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading

from services.contract.config import Config, ConfigError, load_config
from services.contract.store import RedisAway
from services.contract.telemetry import Heartbeat, configure_logging
from services.contract.weights import NoSpace, WeightsError

LINGER_BEAT_S = 5.0
SAVING_S = 290
"""How long torchrun lets its processes save after SIGTERM: nearly the 5 minutes that compose gives the service."""


def main() -> None:
    arguments = _parse()
    logger = configure_logging("trainer")
    try:
        config = load_config(arguments.config)
    except ConfigError as error:
        sys.exit(_say(logger, error, 2))
    if config.trainer.processes > 1 and "RANK" not in os.environ:
        _become_torchrun(config)
    sys.exit(_run(config, logger, arguments.linger))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m services.trainer", description=__doc__)
    parser.add_argument("--config", default=os.environ.get("FORAGE_CONFIG"), help="a TOML file (default: FORAGE_CONFIG)")
    parser.add_argument("--linger", action="store_true", help="stay up, healthy, when the run is done (for docker compose)")
    return parser.parse_args()


def _run(config: Config, logger, linger: bool) -> int:  # noqa: ANN001
    from services.trainer.feeding.collect import CollectTimeout
    from services.trainer.megatron import distributed
    from services.trainer.ranks import StopRequested, is_lead

    Heartbeat.from_environment().beat("starting: loading the model")
    try:
        distributed.init(config)
        lead = is_lead()
        _train(config)
    except StopRequested:
        logger.info("stopped on request; the next start goes on from the last checkpoint")
        return 0
    except (ConfigError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(error, ConfigError):
            logger.exception("the trainer cannot go on")
        return _say(logger, error, 2)
    except (CollectTimeout, RedisAway, NoSpace) as error:
        return _say(logger, error, 1)
    except WeightsError as error:
        return _say(logger, error, 2)
    finally:
        distributed.shutdown()
    if linger and lead:
        _linger()
    return 0


def _train(config: Config) -> None:
    from services.trainer.main import train
    from services.trainer.ranks import StopRequested
    from services.trainer.run import Run

    run = Run(config)
    try:
        train(run)
    except StopRequested:
        run.save_before_leaving()
        raise


def _linger() -> None:
    """Wait for a signal. `docker compose up --wait` takes a container that exited for one that failed."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    heartbeat = Heartbeat.from_environment()
    while not stop.wait(LINGER_BEAT_S):
        heartbeat.beat("ready: the run is done")


def _become_torchrun(config: Config) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.trainer.processes}"]
    os.execv(sys.executable, [*launch, f"--shutdown-timeout={SAVING_S}", "-m", "services.trainer", *sys.argv[1:]])


def _say(logger, error: Exception, code: int) -> int:  # noqa: ANN001
    logger.error("%s", error)
    return code


if __name__ == "__main__":
    main()
