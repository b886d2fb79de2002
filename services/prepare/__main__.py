"""`python -m services.prepare assets --config C`, then, with the retriever running, `... demonstrations --config C`.

Exit codes: 0 all is there; 1 something could not be made; 2 the configuration cannot be used.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from services.contract.config import Config, ConfigError, load_config
from services.contract.telemetry import configure_logging, format_seconds
from services.prepare.errors import PrepareError

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
logger = logging.getLogger("prepare")

ConfigPath = Annotated[Path | None, typer.Option("--config", envvar="FORAGE_CONFIG", help="TOML file of the run.")]


@cli.command()
def assets(config: ConfigPath = None) -> None:
    """Policy, encoder, corpus and questions; whatever is already there and whole is skipped."""
    from services.prepare.assets import prepare_assets

    _run(prepare_assets, load_config(config))


@cli.command()
def demonstrations(config: ConfigPath = None) -> None:
    """Examples for the warm start, made with the running retriever."""
    from services.prepare.assets import prepare_demonstrations

    _run(prepare_demonstrations, load_config(config))


@cli.command()
def recall(config: ConfigPath = None) -> None:
    """Print how often the running retriever finds the gold passage, by kind of question."""
    from services.prepare.assets import report_recall

    print(report_recall(load_config(config)))


def _run(work: Callable[[Config], None], config: Config) -> None:
    started = time.monotonic()
    work(config)
    logger.info("all is there (%s)", format_seconds(time.monotonic() - started))


def main() -> None:
    configure_logging("prepare")
    try:
        cli()
    except (ConfigError, PrepareError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
