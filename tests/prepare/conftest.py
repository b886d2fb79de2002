"""A small run's assets, made once, and a stand-in for the retriever: real HTTP, but lexical matching instead of an encoder."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from services.contract.config import Config
from services.prepare.factbook import Place, load_places, plain
from services.prepare.passages import Passage, build_passages
from tests.conftest import free_port
from tests.prepare.hub_server import HubServer, running_hub
from tests.prepare.small_hub import FILES, REPO

COUNTRIES = 24


class Body(BaseModel):
    queries: list[str]
    topk: int
    return_scores: bool


class StandInRetriever:
    """Answers /retrieve by shared words over a corpus. `failures`: that many requests are answered 503 first."""

    def __init__(self, corpus: Path | None) -> None:
        rows = [json.loads(line) for line in corpus.read_text().splitlines()] if corpus else []
        self.rows = [(row, _words(row["contents"])) for row in rows]
        self.failures, self.status, self.requests = 0, 503, 0
        self.url = f"http://127.0.0.1:{free_port()}"
        self._server: uvicorn.Server | None = None

    def start(self) -> None:
        app = FastAPI()
        app.post("/retrieve")(self._retrieve)
        port = int(self.url.rpartition(":")[2])
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        if self._server:
            self._server.should_exit = True
            self._thread.join()

    def _retrieve(self, body: Body) -> JSONResponse:
        self.requests += 1
        if self.failures:
            self.failures -= 1
            return JSONResponse({"detail": "told to fail"}, self.status)
        return JSONResponse({"result": [self._search(query, body.topk) for query in body.queries]})

    def _search(self, query: str, topk: int) -> list[dict]:
        wanted = _words(query)
        scored = sorted(((len(wanted & words) - len(words) / 1000, row) for row, words in self.rows), key=lambda s: -s[0])
        return [{"document": row, "score": score} for score, row in scored[:topk]]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", plain(text).lower()))


@pytest.fixture(scope="session")
def places() -> list[Place]:
    return load_places()


@pytest.fixture(scope="session")
def passages(places: list[Place]) -> list[Passage]:
    return build_passages(places)


def small_config(directory: Path, **sections: dict) -> Config:
    """A tiny model, a small corpus, no encoder, few demonstrations."""
    values: dict[str, dict] = {
        "run": {"name": "prepare-test"},
        "model": {"source": "tiny", "max_context": 1024},
        "data": {"directory": directory, "corpus_countries": COUNTRIES, "demonstration_count": 20},
        "retriever": {"encoder_family": "hashing"},
        "rollout": {"max_response_tokens": 512, "topk": 2},
    }
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    return Config.model_validate(values)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the assets of `small_config`. Tests only read it."""
    from services.prepare.assets import prepare_assets

    directory = tmp_path_factory.mktemp("data")
    prepare_assets(small_config(directory))
    return directory


@pytest.fixture
def retriever(prepared: Path) -> Iterator[StandInRetriever]:
    server = StandInRetriever(prepared / "corpus.jsonl")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with the content of `small_hub`, to which huggingface_hub turns as if HF_ENDPOINT had named it."""
    with running_hub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        server.add(REPO, FILES)
        yield server
