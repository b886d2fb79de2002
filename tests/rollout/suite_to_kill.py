"""The rollout half of the suite as processes that a test kills and starts again: Redis, engine, retriever, workers, grader."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import redis

from services.contract.config import Config, show_config
from services.contract.groups import ROLLOUT_GROUP, GroupStore
from services.contract.policy import PolicyBoard, PolicyVersion
from services.contract.store import connect
from services.contract.telemetry import check_heartbeat
from tests.conftest import RedisServer, free_port
from tests.rollout.conftest import RUN, make_config

PATIENCE_S = 120.0


class Process:
    """One process of a service, in a group of its own."""

    def __init__(self, folder: Path, name: str, command: list[str]) -> None:
        self.name, self.log, self.heartbeat = name, folder / f"{name}.log", folder / f"{name}.heartbeat"
        self.heartbeat.unlink(missing_ok=True)
        environment = os.environ | {"FORAGE_HEARTBEAT_FILE": str(self.heartbeat), "HOLDS": str(folder), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command], env=environment, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return check_heartbeat(self.heartbeat, 20).startswith("ready")
        except RuntimeError:
            return False

    def kill(self) -> None:
        """As when a machine goes: no goodbye, the whole group."""
        if self.process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()


class Suite:
    def __init__(self, folder: Path, model: Path, turns: list[list[int]], engine_url: str | None = None) -> None:
        self.folder, self.turns, self.started = folder, turns, 0
        self.server = RedisServer(folder)
        self.server.start()
        self.ports = {"engine": free_port(), "retriever": free_port()}
        self.engine_url = engine_url or f"http://127.0.0.1:{self.ports['engine']}"
        self.retriever_url = f"http://127.0.0.1:{self.ports['retriever']}"
        self.config = self._configure(model, folder)
        (folder / "run.toml").write_text(show_config(self.config))
        client = connect(self.config.redis)
        self.store, self.board = GroupStore(client, RUN), PolicyBoard(client, RUN)
        self.broker = redis.Redis(port=self.server.port, db=self.config.reward.database)
        self.board.commit(PolicyVersion(0, str(model)))
        self.retriever = self._fake("retriever")
        self.engine = None if engine_url else self._fake("engine", "--turns", json.dumps(turns))
        self.workers = [self._worker(), self._worker()]
        self.grader = self._grader()
        self.wait_until_ready()

    def _configure(self, model: Path, folder: Path) -> Config:
        engine = {"urls": [self.engine_url], "health_interval_s": 1, "health_timeout_s": 5, "pause_lease_s": 2}
        rollout = {"lease_s": 1.5, "retrieval_retries": 10, "retrieval_timeout_s": 20, "request_timeout_s": 60, "max_attempts": 5}
        config = make_config(model, folder, self.server.url, self.retriever_url, engine=engine, **rollout)
        # The broker delivers again what a killed grader had in hand after twice the time limit.
        reward = config.reward.model_copy(update={"soft_time_limit_s": 1.5, "time_limit_s": 2})
        return config.model_copy(update={"reward": reward, "redis": config.redis.model_copy(update={"retry_s": 120})})

    def _fake(self, name: str, *arguments: str) -> Process:
        return Process(self.folder, name, ["-m", f"tests.rollout.fake_{name}", "--port", str(self.ports[name]), *arguments])

    def _service(self, service: str, name: str) -> Process:
        return Process(self.folder, name, ["-m", "tests.rollout.held", service, "--config", str(self.folder / "run.toml")])

    def _worker(self) -> Process:
        self.started += 1
        return self._service("rollout", f"worker{self.started}")

    def _grader(self) -> Process:
        self.started += 1
        return self._service("reward", f"grader{self.started}")

    def wait_until_ready(self) -> None:
        for name in ("retriever", "engine"):
            if getattr(self, name):
                self.until(lambda name=name: self.ask(name) is not None, f"{name} answers")
        for process in (*self.workers, self.grader):
            self.until(lambda process=process: process.ready, f"{process.name} ready")

    # -- where a group is held -----------------------------------------------------------------------------------------

    def ask(self, fake: str, **change: Any) -> dict[str, Any] | None:
        """What a fake tells of itself, or a change to it; None while it does not answer."""
        url = f"http://127.0.0.1:{self.ports[fake]}/test"
        try:
            answer = httpx.post(url, json=change, timeout=5) if change else httpx.get(url, timeout=5)
        except httpx.TransportError:
            return None
        return answer.json()

    def held_at(self, place: str) -> list[int]:
        """Process ids that wait at a place of `held.py`."""
        return [int(path.suffix[1:]) for path in self.folder.glob(f"{place}.*")]

    def hold(self, place: str) -> None:
        (self.folder / place).touch()

    def let_go(self, place: str) -> None:
        (self.folder / place).unlink(missing_ok=True)
        for path in self.folder.glob(f"{place}.*"):
            path.unlink(missing_ok=True)

    def holder(self) -> Process:
        """The worker that has a group in its hands; the first one when none has."""
        pending = self.store.client.xpending_range(self.store.keys.prompts, ROLLOUT_GROUP, "-", "+", 1)
        pids = [int(entry["consumer"].decode().rsplit("-", 2)[1]) for entry in pending]
        held = [*self.held_at("before_task"), *pids]
        return next((worker for worker in self.workers if worker.pid in held), self.workers[0])

    # -- kills ---------------------------------------------------------------------------------------------------------

    def kill(self, target: str) -> None:
        """Kill one part with -9 and start it anew: Redis on the same data, the others empty-handed."""
        if target == "worker":
            holder = self.holder()
            holder.kill()
            self.workers[self.workers.index(holder)] = self._worker()
        elif target == "grader":
            self.grader.kill()
            self.grader = self._grader()
        elif target == "redis":
            self.server.kill()
            self.server.start()
        elif target == "retriever":
            self.retriever.kill()
            self.retriever = self._fake("retriever")
        else:
            assert self.engine
            self.engine.kill()
            self.engine = self._fake("engine", "--turns", json.dumps(self.turns))

    def close(self) -> None:
        for process in (*self.workers, self.grader, self.retriever, self.engine):
            if process:
                process.kill()
        self.server.kill()

    # -- what came of it -----------------------------------------------------------------------------------------------

    def graded(self) -> Counter[str]:
        """How often each trajectory was announced as graded, whoever has read it."""
        import msgspec

        from services.contract.messages import GradedNotice

        decode = msgspec.msgpack.Decoder(GradedNotice).decode
        entries = self.store.client.xrange(self.store.keys.graded)
        return Counter(decode(fields[b"body"]).trajectory_id for _, fields in entries)

    def settled(self) -> bool:
        """Nothing is being played, and no task waits or is in a grader's hands."""
        accounts = self.store.accounts()
        queued = self.broker.llen(f"forage.{RUN}.grade") + self.broker.hlen("unacked")  # type: ignore[operator]
        return accounts.waiting + accounts.leased + accounts.ungraded + queued == 0

    def until(self, holds: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (result := holds()):
            logs = "".join(f"\n--- {log.name}\n{log.read_text()[-1500:]}" for log in self.folder.glob("*.log"))
            assert time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s in vain: {what}{logs}"
            time.sleep(0.02)
        return result
