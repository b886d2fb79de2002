"""Nine machines and the suite on them: Redis, an engine, two retrievers behind a balancer; workers and trainers come with tests.

| machine                  | runs                                                                            |
|--------------------------|---------------------------------------------------------------------------------|
| head                     | Redis                                                                           |
| engine                   | SGLang, attached by its URL                                                     |
| balancer                 | Caddy with deploy/Caddyfile                                                     |
| retriever1, retriever2   | a retriever each                                                                |
| worker, grader           | rollout worker, reward worker                                                   |
| trainer1, trainer2       | a rank of the trainer each                                                      |
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import tomli_w

from services.contract.config import Config, load_config
from services.contract.redis_binary import redis_binary
from tests.machines.lan import Lan, Process, refusal
from tests.rollout.tiny_model import ANSWER, PASSAGES, QUESTION, TURNS, make_model

NAMES = ["head", "trainer1", "trainer2", "worker", "engine", "balancer", "retriever1", "retriever2", "grader"]
PASSWORD = "open-sesame"
PUSH_ADDRESS = "10.99.0.102"
"""A second address of trainer1, which its host name does not stand for."""
ENGINE = {"urls": ["http://engine:30000"], "threads": 1, "max_total_tokens": 8192, "start_timeout_s": 900}
ENGINE |= {"health_interval_s": 2, "health_timeout_s": 30, "pause_lease_s": 5}
PATIENT = {"retrieval_timeout_s": 3, "retrieval_retries": 20, "request_timeout_s": 60, "generation_retries": 10, "max_attempts": 10}


@pytest.fixture(scope="package")
def lan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lan]:
    if reason := refusal():
        pytest.skip(reason)
    network = Lan(tmp_path_factory.mktemp("lan"), NAMES)
    yield network
    network.close()


class Suite:
    """Starts services on the machines, for a run of a name."""

    def __init__(self, lan: Lan) -> None:
        self.lan, self.folder = lan, lan.folder
        model = make_model(self.folder / "model")
        self._write("corpus.jsonl", *({"id": str(n), "contents": text} for n, text in enumerate(PASSAGES)))
        question = {"source": "capital", "question": QUESTION, "golden_answers": [ANSWER]}
        self._write("questions.jsonl", *(question | {"id": str(n)} for n in range(8)))
        segments = [{"kind": "model", "text": TURNS[1]}]
        self._write(
            "demonstrations.jsonl", *({"example_id": f"capital:{n}", "question": QUESTION, "segments": segments} for n in "01")
        )
        self.sections: dict[str, Any] = {
            "run": {"directory": str(self.folder / "runs")},
            "model": {"source": "folder", "path": str(model), "max_context": 512},
            "data": self._data(),
            "retriever": {"url": "http://balancer:8000", "host": "0.0.0.0", "encoder_family": "hashing"},
            "rollout": {"concurrency": 8, "lease_s": 5, "max_response_tokens": 256, "topk": 2, "engine": ENGINE} | PATIENT,
            "reward": {"soft_time_limit_s": 4, "time_limit_s": 5},
            "weights": {"directory": str(self.folder / "weights"), "push_address": PUSH_ADDRESS, "bucket_bytes": 1 << 16},
            "redis": {"url": "redis://head:6379/0", "retry_s": 120},
        }

    def _data(self) -> dict[str, Any]:
        questions = str(self.folder / "questions.jsonl")
        files = {name: str(self.folder / f"{name}.jsonl") for name in ("corpus", "demonstrations")}
        files |= {"train_questions": questions, "eval_questions": questions, "directory": str(self.folder / "data")}
        return files | {"source": "folder", "instruction": "{question}"}

    def _write(self, name: str, *rows: dict[str, Any]) -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def configure(self, run: str, **sections: dict[str, Any]) -> Path:
        """Write the configuration of a run; sections are added to those that all runs have."""
        values = {name: self.sections.get(name, {}) | sections.get(name, {}) for name in self.sections | sections}
        values["run"] = values["run"] | {"name": run}
        path = self.folder / f"{run}.toml"
        path.write_text(tomli_w.dumps(values))
        return path

    def start(self, machine: str, service: str, config: Path, *arguments: str) -> Process:
        """`python -m services.<service> <arguments>` on a machine."""
        name = f"{machine}-{config.stem}-{service}"
        command = ("python", "-m", f"services.{service}", *arguments, "--config", str(config))
        return self.lan[machine].start(name, *command, FORAGE_REDIS__PASSWORD=PASSWORD)

    def redis(self) -> redis.Redis:
        """A client for the test itself, which is on none of the machines: through Redis's socket on the shared disk."""
        return redis.Redis(unix_socket_path=str(self.folder / "redis.sock"), password=PASSWORD)


@pytest.fixture(scope="package")
def suite(lan: Lan) -> Suite:
    return Suite(lan)


@pytest.fixture(scope="package")
def redis_on_head(lan: Lan, suite: Suite) -> Process:
    settings = {"bind": "0.0.0.0", "requirepass": PASSWORD, "dir": suite.folder, "unixsocket": suite.folder / "redis.sock"}
    settings |= {"appendonly": "yes", "appendfsync": "always", "save": "", "maxmemory-policy": "noeviction"}
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    server = lan["head"].start("redis", redis_binary(), *options)
    lan.until(lambda: (suite.folder / "redis.sock").exists() and suite.redis().ping(), "Redis answers")
    return server


@pytest.fixture(scope="package")
def retrievers(lan: Lan, suite: Suite) -> list[Process]:
    """Two that answer, and the balancer before them."""
    config = suite.configure("search")
    index = suite.start("retriever1", "retriever", config, "index", "build")
    assert index.wait(900) == 0, index.text()
    copies = [suite.start(f"retriever{n}", "retriever", config, "serve") for n in (1, 2)]
    caddy = Path(sys.executable).with_name("caddy")
    rules = ("run", "--adapter", "caddyfile", "--config", "deploy/Caddyfile")
    lan["balancer"].start("balancer", str(caddy), *rules, RETRIEVERS="retriever1:8000 retriever2:8000", HOME="/tmp")
    for name in ("retriever1", "retriever2", "balancer"):
        lan.until(lambda name=name: answers(lan, f"http://{name}:8000/ready"), f"{name} answers")
    return copies


def answers(lan: Lan, url: str) -> bool:
    """Whether the worker's machine gets a 200 from there."""
    ask = f"import urllib.request as r; print(r.urlopen('{url}', timeout=5).status)"
    try:
        return lan["worker"]("python3", "-c", ask).strip() == "200"
    except Exception:  # noqa: BLE001 - whatever it is, it does not answer yet
        return False


@pytest.fixture(scope="package")
def engine(lan: Lan, suite: Suite) -> Process:
    """Real SGLang, started by nobody of ours: workers attach themselves to it."""
    from services.rollout.engine_process import command_line, environment

    config: Config = load_config(str(suite.configure("engine")))
    own = config.rollout.engine.model_copy(update={"host": "0.0.0.0"})
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": own})})
    _, *arguments = command_line(config, str(config.model_path), 0, 30000)
    return lan["engine"].start("sglang", "python", *arguments, **environment(own))


@pytest.fixture(scope="package")
def network(redis_on_head: Process, retrievers: list[Process], engine: Process, suite: Suite) -> Suite:
    """All that workers and trainers need."""
    return suite
