"""A corpus, a configuration with the hashing encoder, and a real uvicorn server on a free port."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.contract.config import Config, RetrieverConfig
from services.retriever.build import build_index
from services.retriever.dense import DenseIndex, load_dense
from services.retriever.passages import Passage
from services.retriever.serve import Server
from services.retriever.service import Loaders
from services.retriever.sources import Lookup

PLACES = ["harbour", "mountain", "library", "glacier", "orchard", "foundry", "lantern", "canyon", "meadow", "quarry"]
THINGS = ["violin", "ledger", "compass", "furnace", "sparrow", "anvil", "mirror", "garden", "tunnel", "bridge"]


def passage(number: int) -> dict[str, Any]:
    """Unlike every other passage in its words, so that no two scores of a query tie."""
    place, thing = PLACES[number % 10], THINGS[number // 10 % 10]
    return {
        "id": str(1000 + number),
        "contents": f'"Place {number}"\nThe {place} keeps a {thing} with mark m{number}.',
        "extra": number,
    }


def query(number: int) -> str:
    return f"{PLACES[number % 10]} {THINGS[number // 10 % 10]} m{number}"


def write_corpus(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(folder: Path, rows: int = 100, **retriever: Any) -> Config:
    """A configuration over a fresh folder with a corpus of `rows` passages; no index yet."""
    write_corpus(folder / "corpus.jsonl", [passage(number) for number in range(rows)])
    settings = {"encoder_family": "hashing", "port": 0, "index_threads": 1, **retriever}
    return Config.model_validate({"data": {"directory": folder}, "retriever": settings})


def with_settings(config: Config, **retriever: Any) -> Config:
    return config.model_copy(update={"retriever": config.retriever.model_copy(update=retriever)})


def load(config: Config) -> DenseIndex:
    return load_dense(config, "REBUILD", lambda text: None)


def first_row(index: DenseIndex, text: str) -> int:
    """The row of the best passage for `text`."""
    return json.loads(index.answer([(text, 1)])[0][0].document)["extra"]


class GatedIndex:
    """The real index, which answers when the gate is opened."""

    def __init__(self, config: Config) -> None:
        self.real = load(config)
        self.info, self.seconds, self.canary = self.real.info, self.real.seconds, self.real.canary
        self.computed: list[str] = []
        self.entered, self.gate = threading.Event(), threading.Event()

    def answer(self, keys: Sequence[Lookup]) -> list[list[Passage]]:
        if list(keys) != [self.canary()]:
            self.computed += [text for text, _ in keys]
            self.entered.set()
            assert self.gate.wait(20)
        return self.real.answer(keys)


@pytest.fixture(scope="session")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """100 passages, hashing encoder, index built. Do not change its folder."""
    config = make_config(tmp_path_factory.mktemp("indexed"))
    build_index(config)
    return config


class Running:
    """A server in a thread of this process."""

    def __init__(self, config: RetrieverConfig, load: Callable[[Any], Any] | Loaders) -> None:
        """`load`: the loaders of all parts, or that of the dense index."""
        self.server = Server(config, {"dense": load} if callable(load) else load)
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        until(lambda: self.server.started)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.server.port}", timeout=30)

    def retrieve(self, *queries: str, **fields: Any) -> httpx.Response:
        return self.client.post("/retrieve", json={"queries": list(queries), **fields})

    def wait_ready(self) -> Running:
        until(lambda: self.client.get("/ready").status_code == 200)
        return self

    def metric(self, name: str) -> float:
        """The sum over labels of one sample name."""
        lines = self.client.get("/metrics").text.splitlines()
        values = [float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == f"forage_retriever_{name}"]
        assert values, f"no metric {name}"
        return sum(values)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        self.client.close()


def until(true: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """`serve(config, load)` starts a server that is stopped after the test."""
    running: list[Running] = []

    def start(config: RetrieverConfig, load: Callable[[Any], Any]) -> Running:
        running.append(Running(config, load))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def service(indexed: Config) -> Iterator[Running]:
    """A ready server over `indexed`, shared by the tests that only ask."""
    running = Running(indexed.retriever, lambda say: load_dense(indexed, "REBUILD", say)).wait_ready()
    yield running
    running.stop()
