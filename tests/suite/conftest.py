"""A run in a real Redis and a real folder, for the commands that look at a run from outside."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import redis
from rich.console import Console, RenderableType

from services.contract.config import Config, load_config
from services.contract.groups import GroupStore


@pytest.fixture
def config(redis_url: str, tmp_path: Path) -> Config:
    return configure(tmp_path, redis_url)


def configure(folder: Path, redis_url: str, **settings: str) -> Config:
    """Run `test` with its folders under `folder`."""
    places = {"FORAGE_RUN__DIRECTORY": folder / "runs", "FORAGE_DATA__DIRECTORY": folder / "data", "FORAGE_REDIS__URL": redis_url}
    environment = {name: str(value) for name, value in places.items()} | {"FORAGE_RUN__NAME": "test"} | settings
    return load_config(None, environment)


@pytest.fixture
def store(config: Config, redis_client: redis.Redis) -> GroupStore:
    return GroupStore(redis_client, config.run.name)


def drawn(what: RenderableType, width: int = 120, colours: bool = False) -> str:
    """As a terminal of that width would get it."""
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=colours, color_system="standard" if colours else None, highlight=False).print(
        what
    )
    return out.getvalue()
