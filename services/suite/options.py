"""What the `forage` commands share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from services.contract.config import ConfigError

DEFAULT_CONFIG = "configs/quickstart.toml"
SHARED_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # trainer and engine take turns on the same cores: waiting threads must sleep, not spin
}

PUBLISHED_HELP = 'Published rows beside yours: those with these words in their name, such as "3b grpo"; "none" leaves them out.'
ConfigOption = Annotated[str, typer.Option("--config", "-c", envvar="FORAGE_CONFIG", help="A TOML file.")]


@contextlib.contextmanager
def mistakes_told() -> Iterator[None]:
    """A ConfigError inside is printed and ends the command with exit code 2."""
    try:
        yield
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
