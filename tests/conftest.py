"""Real servers for the tests: a Redis of its own for the session, emptied before each test that asks for it."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

from services.contract.redis_binary import redis_binary

if TYPE_CHECKING:
    from services.contract.codec import Codec

os.environ.setdefault("OMP_NUM_THREADS", "1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RedisServer:
    """A server process that a test may stop, kill and start again on the same port and data."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        options += ["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--maxmemory-policy", "noeviction"]
        self.process = subprocess.Popen([redis_binary(), *options], stdout=subprocess.DEVNULL)
        client = redis.Redis(port=self.port)
        deadline = time.monotonic() + 20
        while True:
            try:
                client.ping()
                return
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The session's server, emptied."""
    redis.Redis(port=redis_server.port).flushall()
    return redis_server.url


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    from services.contract.config import RedisConfig
    from services.contract.store import connect

    client = connect(RedisConfig(url=redis_url, retry_s=30))
    yield client
    client.close()


@pytest.fixture(scope="session")
def smollm2_codec() -> Codec:
    """A real tokenizer of 49,152 tokens, the quickstart's; taking it out of its package costs some seconds once a session."""
    from services.contract.codec import Codec
    from services.prepare.models import smollm2_tokenizer

    return Codec(smollm2_tokenizer())
