"""Kill what grades, or what it grades from, in the middle: every trajectory is graded in the end, and announced once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from services.contract.grading import send_for_grading
from tests.factories import make_trajectory
from tests.reward.conftest import Bench, GradingWorker, answers_ping, wait_until


def hold_in_the_middle(bench: Bench, worker: GradingWorker, trajectory_id: str, stage: str = "handed over") -> int:
    """Freeze the worker's only pool process with a task in its hands, before or after it began. Returns the process id."""
    (process,) = worker.pool()
    os.kill(process, signal.SIGSTOP)
    send_for_grading(bench.app, trajectory_id)
    wait_until(lambda: bench.in_hand() == 1, what="the task in the worker's hands")
    if stage == "running":
        bench.store.client.execute_command("CLIENT PAUSE", 1500, "ALL")  # the task begins, and waits for its trajectory
        os.kill(process, signal.SIGCONT)
        time.sleep(0.7)
        os.kill(process, signal.SIGSTOP)
    assert not bench.is_graded(trajectory_id)
    return process


def announced(bench: Bench) -> list[str]:
    return sorted(notice.trajectory_id for notice in bench.notices())


@pytest.mark.parametrize("stage", ["handed over", "running"])
def test_a_task_is_delivered_again_after_its_worker_was_killed(own_bench: Bench, stage: str) -> None:
    bench = own_bench
    first = bench.start_worker()
    bench.store.store(make_trajectory("t0"))
    hold_in_the_middle(bench, first, "t0/0", stage)
    first.kill_all()
    bench.start_worker()
    wait_until(lambda: bench.is_graded("t0/0"), 25, "the second worker grades it")
    wait_until(lambda: bench.in_hand() == 0)
    assert announced(bench) == ["t0/0"]


@pytest.mark.parametrize("stage", ["handed over", "running"])
def test_a_task_is_done_again_by_the_same_worker_when_only_its_process_was_killed(own_bench: Bench, stage: str) -> None:
    bench = own_bench
    worker = bench.start_worker()
    bench.store.store(make_trajectory("t0"))
    os.kill(hold_in_the_middle(bench, worker, "t0/0", stage), signal.SIGKILL)
    wait_until(lambda: bench.is_graded("t0/0"), 15, "a new process of the same worker grades it")
    assert announced(bench) == ["t0/0"]


def test_a_killed_worker_leaves_no_process_behind(own_bench: Bench) -> None:
    worker = own_bench.start_worker()
    pool = worker.pool()
    worker.process.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pool), 10, "pool processes gone")


def test_a_hanging_pool_shows_in_the_heartbeat(own_bench: Bench) -> None:
    worker = own_bench.start_worker()
    own_bench.store.store(make_trajectory("t0"))
    process = hold_in_the_middle(own_bench, worker, "t0/0")
    wait_until(lambda: time.time() - worker.heartbeat.stat().st_mtime > 3, 20, "no beat any more")
    os.kill(process, signal.SIGCONT)
    wait_until(lambda: time.time() - worker.heartbeat.stat().st_mtime < 2, 20, "beats again")
    wait_until(lambda: own_bench.is_graded("t0/0"))
    assert announced(own_bench) == ["t0/0"]


def test_a_redis_that_restarts_is_waited_for_by_sender_and_worker(own_bench: Bench) -> None:
    bench = own_bench
    worker = bench.start_worker()
    for sample in range(4):
        bench.store.store(make_trajectory("t0", sample))
    send_for_grading(bench.app, "t0/0")
    wait_until(lambda: bench.is_graded("t0/0"))
    bench.server.kill()
    wait_until(lambda: worker.state().startswith("starting"), what="the heartbeat says that the broker is away")
    comeback = threading.Timer(2.0, bench.server.start)
    comeback.start()
    for sample in (1, 2, 3):
        send_for_grading(bench.app, f"t0/{sample}")
    wait_until(lambda: len(bench.notices()) == 4, 25, "all graded")
    wait_until(worker.is_ready)
    assert announced(bench) == [f"t0/{sample}" for sample in range(4)]
    comeback.join()


def test_a_task_that_was_running_when_redis_went_is_done_in_the_end(own_bench: Bench) -> None:
    bench = own_bench
    worker = bench.start_worker()
    bench.store.store(make_trajectory("t0"))
    process = hold_in_the_middle(bench, worker, "t0/0")
    bench.server.kill()
    os.kill(process, signal.SIGCONT)
    time.sleep(2.5)  # longer than the task's patience: it gives up and cannot hand the message back
    bench.server.start()
    wait_until(lambda: bench.is_graded("t0/0"), 30, f"graded after all: {worker.output()}")
    assert announced(bench) == ["t0/0"]


class Relay:
    """Passes bytes on to a server. `fall_silent`: connections made so far stay open and carry nothing any more, new ones work."""

    def __init__(self, port: int) -> None:
        self.target, self.era = port, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def fall_silent(self) -> None:
        self.era += 1

    def close(self) -> None:
        for end in [self.listener, *self.open]:
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                self.open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, sink, self.era), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, era: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.era == era:
                    sink.sendall(data)
            if self.era == era:
                sink.shutdown(socket.SHUT_WR)


IMPATIENT = """
from services.contract import grading, store
grading.BROKER_SILENCE_S = store.SILENCE_S = 3
from services.reward.__main__ import main
main()
"""
"""A worker that waits seconds for a silent Redis where others wait half a minute."""


def test_a_broker_that_falls_silent_is_connected_to_anew(own_bench: Bench) -> None:
    bench = own_bench
    bench.program = ["-c", IMPATIENT]
    relay = Relay(bench.server.port)
    bench.environment["FORAGE_REDIS__URL"] = f"redis://127.0.0.1:{relay.port}/0"
    worker = bench.start_worker()
    bench.store.store(make_trajectory("t0"))
    relay.fall_silent()
    time.sleep(3)  # until Redis has stopped to answer what the lost connection had asked: it would answer with the message
    send_for_grading(bench.app, "t0/0")
    wait_until(lambda: bench.is_graded("t0/0"), 120, f"graded: {worker.output()}")
    wait_until(lambda: answers_ping(bench), 120, f"answers: {worker.output()}")
    relay.close()


def test_two_workers_share_the_queue_and_announce_each_trajectory_once(own_bench: Bench) -> None:
    bench = own_bench
    workers = [bench.start_worker(), bench.start_worker()]
    ids = [f"t{group}/{sample}" for group in range(20) for sample in range(4)]
    for trajectory_id in ids:
        group, sample = trajectory_id.split("/")
        bench.store.store(make_trajectory(group, int(sample)))
    for trajectory_id in ids * 2:
        send_for_grading(bench.app, trajectory_id)
    wait_until(lambda: bench.broker.llen("forage.test.grade") + bench.in_hand() == 0 and len(bench.notices()) >= len(ids))
    assert announced(bench) == sorted(ids)
    shares = [worker.output().count(": reward 1 ") for worker in workers]
    assert min(shares) >= 5, shares
