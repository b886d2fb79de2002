"""The service as a process of its own: it tells when it is ready, survives nothing and loses nothing, and leaves when told."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.contract.config import show_config
from services.contract.telemetry import check_heartbeat
from tests.factories import make_group, make_sampling
from tests.rollout.conftest import Bench
from tests.rollout.standins import StandInRetriever

pytestmark = pytest.mark.asyncio(loop_scope="session")


class Service:
    """`python -m services.rollout` with a configuration file of its own."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.heartbeat, self.log = folder / "heartbeat", folder / "log"
        config = folder / "run.toml"
        config.write_text(show_config(bench.configure(shutdown_grace_s=1.0, concurrency=2)))
        environment = os.environ | {"FORAGE_HEARTBEAT_FILE": str(self.heartbeat), "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as output:
            command = [sys.executable, "-m", "services.rollout", "--config", str(config)]
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return check_heartbeat(self.heartbeat, 10).startswith("ready: policy version 0")
        except RuntimeError:
            return False

    def descendants(self) -> list[int]:
        """Every process that the service has started, by the sessions it opened."""
        return [pid for pid in _running() if _parent_chain_has(pid, self.process.pid)]


def _running() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _parent_chain_has(pid: int, ancestor: int) -> bool:
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
        if pid == ancestor:
            return True
    return False


def alive(pids: list[int]) -> list[int]:
    """Those that still run; one that has ended but was not reaped does not count."""
    running = []
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                running.append(pid)
        except OSError:
            pass
    return running


@pytest.fixture
def service(bench: Bench, tmp_path: Path) -> Iterator[Service]:
    service = Service(bench, tmp_path)
    yield service
    service.process.kill()
    service.process.wait()


async def test_it_says_when_it_is_ready_and_hands_back_its_groups_on_sigterm(
    bench: Bench, service: Service, retriever: StandInRetriever
) -> None:
    await bench.until(lambda: service.heartbeat.exists())
    assert service.heartbeat.read_text().startswith("starting")
    await bench.until(service.ready, 280)
    assert [(report.state, report.version) for report in bench.board.live_engines()] == [("ready", 0)]
    bench.store.feed(make_group("quick", 1, sampling=make_sampling(temperature=0.0)))
    await bench.until(lambda: bench.store.accounts().finished)
    retriever.delay_s = 30.0
    bench.store.feed(make_group("slow", 1, sampling=make_sampling(temperature=0.0)))
    await bench.until(lambda: len(retriever.requests) == 2)
    started = service.descendants()
    assert len(started) >= 3  # SGLang's server, scheduler, detokenizer
    service.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(service.process.wait, 30) == 0, service.log.read_text()
    accounts = bench.store.accounts()
    assert (accounts.finished, accounts.waiting, accounts.leased) == (1, 1, 0)
    assert bench.board.live_engines() == []
    assert alive(started) == []
    assert "handed back 1 groups" in service.log.read_text()


async def test_killed_in_the_middle_of_a_group_it_leaves_no_process_and_another_plays_what_is_missing(
    bench: Bench, service: Service, retriever: StandInRetriever
) -> None:
    await bench.until(service.ready, 280)
    group = make_group("t0", 4, sampling=make_sampling(temperature=0.0))
    retriever.delay_s = 1.0
    bench.store.feed(group)
    await bench.until(lambda: len(bench.store.missing_samples(group)) < 4)  # two at a time: the other two are under way
    started = service.descendants()
    service.process.kill()
    kept = {t.id: t.response_ids for t in bench.store.load_many(group.trajectory_ids()) if t}
    assert kept and bench.store.accounts().leased == 1
    await bench.until(lambda: not alive(started), 10)
    retriever.delay_s = 0.0
    async with bench.worker("second"):
        await bench.until(lambda: bench.store.accounts().finished)
    trajectories = [t for t in bench.store.load_many(group.trajectory_ids()) if t]
    assert len(trajectories) == 4
    assert {t.id: t.response_ids for t in trajectories if t.worker != "second"} == kept
    assert set(bench.requested()) == set(group.trajectory_ids())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"FORAGE_MODEL__PATH": "/nowhere"}, "/nowhere is not a Hugging Face folder"),
        ({"FORAGE_ROLLOUT__NO": "1"}, "rollout.no: unknown key"),
    ],
)
async def test_a_run_that_cannot_work_ends_at_once_with_one_clear_line(change: dict[str, str], reason: str) -> None:
    command = [sys.executable, "-m", "services.rollout"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FORAGE_")} | change
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert reason in result.stdout + result.stderr and "Traceback" not in result.stderr
