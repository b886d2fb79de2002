"""The engine's life: killed, silent, restarted with the version that is current by then."""

from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from services.contract import weights
from services.contract.policy import PolicyVersion
from services.rollout.engine import Engine
from services.rollout.failures import EngineError
from services.rollout.policy_watcher import PolicyWatcher
from services.rollout.supervisor import Supervisor
from services.rollout.tasks import run_in
from services.rollout.version_files import VersionFiles
from tests.factories import make_group, make_sampling
from tests.rollout.conftest import Bench
from tests.rollout.standins import StandInRetriever
from tests.rollout.tiny_model import ANSWER, make_variant

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_killed_engine_is_started_again_and_its_episodes_go_on(
    bench: Bench, retriever: StandInRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with -9 in the middle of a group; by the time it is back, a newer version is current."""
    retriever.delay_s = 1.0
    async with bench.worker(max_attempts=1) as worker:
        watcher = worker.engines.members[0].watcher
        supervisor = Supervisor(bench.engine, watcher, bench.config.rollout.engine)
        monkeypatch.setattr(Supervisor, "_serve", _serve_the_running_engine(Supervisor._serve))
        monkeypatch.setattr(watcher, "follow", _nothing)  # the supervisor follows the board, as in the service
        running = asyncio.create_task(supervisor.run())
        bench.store.feed(make_group(samples=2, sampling=make_sampling(temperature=0.0)))
        await bench.until(lambda: retriever.requests)
        first = bench.engine.pid
        assert first
        root = bench.config.weights_folder
        path = weights.publish(root, 4, 0, lambda folder: make_variant(bench.model, folder, 0.99))
        bench.board.commit(PolicyVersion(4, str(path)))
        os.kill(first, signal.SIGKILL)
        await bench.until(lambda: not watcher.caught_up)
        await bench.until(lambda: bench.store.accounts().finished, 280)
        running.cancel()
    assert bench.engine.pid != first and await bench.engine.reported_version() == "4"
    trajectories = [t for t in bench.store.load_many(["t0/0", "t0/1"]) if t]
    assert [t.answer for t in trajectories] == [ANSWER] * 2
    for trajectory in trajectories:  # the search is the old engine's, the answer the new one's
        assert [span.versions[0].version for span in trajectory.spans if span.kind == "model"] == [0, 4]


def _serve_the_running_engine(serve: Any) -> Any:
    """The first time there is an engine already: only watch it."""
    calls: list[int] = []

    async def first_watch_then_start(self: Supervisor) -> None:
        calls.append(1)
        if len(calls) > 1:
            return await serve(self)
        while True:
            self._check_health()
            await asyncio.sleep(0.05)

    return first_watch_then_start


async def _nothing() -> None: ...


class EngineStandIn:
    """A stand-in whose health a test decides; it counts starts."""

    def __init__(self) -> None:
        self.name = "w"
        self.running, self.healthy, self.starts, self.last_answer, self.url = False, True, 0, 0.0, ""
        self.fails_to_start = 0

    async def start(self, model: str, version: int) -> None:
        self.starts += 1
        if self.starts <= self.fails_to_start:
            raise EngineError("no memory")
        self.running = self.healthy = True

    async def stop(self) -> None:
        self.running = False

    async def health(self, timeout_s: float) -> bool:
        return self.healthy

    def post_mortem(self) -> str:
        return "its log"


def write_whole(folder: Path) -> None:
    (folder / "weights").write_bytes(b"whole")


def make_supervisor(bench: Bench, engine: EngineStandIn, monkeypatch: pytest.MonkeyPatch) -> tuple[Supervisor, PolicyWatcher]:
    monkeypatch.setattr("services.rollout.supervisor.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("services.rollout.supervisor.POLL_S", 0.01)
    config = bench.config.rollout.engine.model_copy(update={"health_interval_s": 0.02})
    watcher = PolicyWatcher(VersionFiles(bench.config), bench.board, engine, "w", run_in(ThreadPoolExecutor(2)))  # type: ignore[arg-type]
    return Supervisor(engine, watcher, config), watcher  # type: ignore[arg-type]


async def test_an_engine_that_fails_its_health_checks_is_restarted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineStandIn()
    supervisor, watcher = make_supervisor(bench, engine, monkeypatch)
    running = asyncio.create_task(supervisor.run())
    await bench.until(lambda: watcher.caught_up)
    assert watcher.describe() == "ready: policy version 0"
    engine.healthy = False
    await bench.until(lambda: engine.starts == 2 and watcher.caught_up)
    running.cancel()


async def test_a_busy_engine_needs_no_health_check(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineStandIn()
    supervisor, watcher = make_supervisor(bench, engine, monkeypatch)
    running = asyncio.create_task(supervisor.run())
    await bench.until(lambda: watcher.caught_up)
    engine.healthy = False
    engine.last_answer = asyncio.get_running_loop().time() + 3600
    await asyncio.sleep(0.5)
    running.cancel()
    assert engine.starts == 1


async def test_an_engine_that_does_not_start_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineStandIn()
    engine.fails_to_start = 2
    supervisor, watcher = make_supervisor(bench, engine, monkeypatch)
    assert watcher.describe().startswith("starting")
    running = asyncio.create_task(supervisor.run())
    await bench.until(lambda: watcher.caught_up)
    running.cancel()
    assert engine.starts == 3


async def test_an_engine_starts_with_the_current_version_once_it_is_whole(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = bench.config.weights_folder
    path = weights.publish(root, 2, 0, write_whole)
    (path / "weights").write_bytes(b"torn.")
    bench.board.commit(PolicyVersion(2, str(path)))
    engine = EngineStandIn()
    supervisor, watcher = make_supervisor(bench, engine, monkeypatch)
    running = asyncio.create_task(supervisor.run())
    await bench.until(lambda: "policy version 2 cannot be used" in caplog.text)
    assert engine.starts == 0 and watcher.describe().startswith("starting")
    (path / "weights").write_bytes(b"whole")
    await bench.until(lambda: watcher.version == 2)
    running.cancel()


async def test_without_a_policy_on_the_board_the_configured_model_is_version_0(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, served: Engine
) -> None:
    bench.client.delete(bench.board.keys.policy)
    _, watcher = make_supervisor(bench, EngineStandIn(), monkeypatch)
    assert await watcher.starting_policy() == (bench.model, 0)


async def test_the_trainers_path_of_the_volume_need_not_be_ours(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = weights.publish(bench.config.weights_folder, 3, 0, write_whole)
    bench.board.commit(PolicyVersion(3, "/elsewhere/weights/test/v000003"))
    _, watcher = make_supervisor(bench, EngineStandIn(), monkeypatch)
    assert await watcher.starting_policy() == (ours, 3)


async def test_an_engine_that_has_left_does_not_report_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _, watcher = make_supervisor(bench, EngineStandIn(), monkeypatch)
    await watcher.report()
    assert [report.state for report in bench.board.live_engines()] == ["loading"]
    await watcher.leave()
    await watcher.report()
    assert bench.board.live_engines() == []
