"""A real Celery worker on a real Redis: it grades once, shrugs off poison, and says truthfully how it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.contract.config import RedisConfig
from services.contract.grading import GRADE_TASK, grading_queue, send_for_grading
from services.contract.store import connect
from services.contract.telemetry import check_heartbeat
from services.reward.grade import grade
from tests.factories import make_trajectory
from tests.reward.conftest import Bench, GradingWorker, wait_until


def settle(bench: Bench, marker: str) -> None:
    """Wait until everything sent before has been dealt with: with one process, messages are graded in order."""
    bench.store.store(make_trajectory(marker))
    send_for_grading(bench.app, f"{marker}/0")
    wait_until(lambda: bench.is_graded(f"{marker}/0"), what=f"{marker} graded")
    wait_until(lambda: bench.in_hand() == 0, what="all acknowledged")


def test_a_trajectory_is_graded_and_announced(bench: Bench, worker: GradingWorker) -> None:
    for sample, answer in enumerate(["the Paris!", "Rome"]):
        bench.store.store(make_trajectory("graded", sample, answer=answer))
        send_for_grading(bench.app, f"graded/{sample}")
    wait_until(lambda: bench.is_graded("graded/1"))
    assert [bench.rewards()[f"graded/{sample}"] for sample in (0, 1)] == [1.0, 0.0]
    stored = bench.store.load("graded/0")
    assert stored and stored.reward == 1.0
    assert stored.reward_parts == grade(make_trajectory(answer="the Paris!"), bench.config.reward).parts


def test_asking_many_times_announces_once(bench: Bench, worker: GradingWorker) -> None:
    bench.store.store(make_trajectory("once"))
    for _ in range(5):
        send_for_grading(bench.app, "once/0")
    settle(bench, "after-once")
    assert [n.trajectory_id for n in bench.notices()].count("once/0") == 1


def test_whole_numbers_among_the_log_probs_do_not_keep_a_trajectory_ungraded(bench: Bench, worker: GradingWorker) -> None:
    bench.store.store(make_trajectory("whole", logprobs=[-1, -2, 0, 0, 0, -1, 0]))
    send_for_grading(bench.app, "whole/0")
    wait_until(lambda: bench.is_graded("whole/0"))


@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        (GRADE_TASK, ["nobody/0"]),
        (GRADE_TASK, []),
        (GRADE_TASK, ["a", "b"]),
        (GRADE_TASK, [{"a": [1]}]),
        (GRADE_TASK, [None]),
        ("forage.unknown", ["t0/0"]),
    ],
)
def test_poison_does_not_stop_the_queue(bench: Bench, worker: GradingWorker, task: str, arguments: list) -> None:
    bench.app.send_task(task, args=arguments)
    settle(bench, f"after-{task}-{arguments}")
    assert worker.is_ready()


@pytest.mark.parametrize(
    "message",
    [
        b'{"body": "!", "headers": {}, "properties": {"delivery_info": {}}}',
        b'{"body": "!"}',
        b"[1, 2]",
        b"3",
        b"\xff\xfe no JSON",
        b"",
    ],
)
def test_bytes_that_are_no_message_do_not_stop_the_queue(bench: Bench, worker: GradingWorker, message: bytes) -> None:
    bench.broker.lpush(grading_queue("test"), message)
    settle(bench, f"after-{message.hex()}")
    assert worker.is_ready()


def test_what_was_released_meanwhile_is_a_debug_line(bench: Bench, worker: GradingWorker) -> None:
    send_for_grading(bench.app, "released/0")
    settle(bench, "after-released")
    assert "released/0: gone, nothing to grade" in worker.output()
    assert not bench.is_graded("released/0")


def test_it_starts_with_one_clear_line(worker: GradingWorker) -> None:
    (line,) = [line for line in worker.output().splitlines() if "ready:" in line]
    assert "Warning" not in worker.output()
    assert "1 process(es) take tasks from forage.test.grade at redis://" in line


def test_the_heartbeat_goes_stale_when_the_worker_hangs_and_recovers(worker: GradingWorker) -> None:
    wait_until(lambda: check_heartbeat(worker.heartbeat, 3.0).startswith("ready"))
    os.kill(worker.process.pid, signal.SIGSTOP)
    try:
        time.sleep(3.5)
        with pytest.raises(RuntimeError, match="last heartbeat"):
            check_heartbeat(worker.heartbeat, 3.0)
    finally:
        os.kill(worker.process.pid, signal.SIGCONT)
    wait_until(lambda: time.time() - worker.heartbeat.stat().st_mtime < 2)
    check_heartbeat(worker.heartbeat, 3.0)


def test_sigterm_ends_it_at_once_and_cleanly(own_bench: Bench) -> None:
    worker = own_bench.start_worker()
    pool = worker.pool()
    worker.process.terminate()
    assert worker.process.wait(15) == 0
    assert pool and not [pid for pid in pool if Path(f"/proc/{pid}").exists()]
    assert "stopped" in worker.output().splitlines()[-1]


def run_to_the_end(environment: dict[str, str], config: Path, seconds: float = 20) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.reward", "--config", str(config)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=seconds)


def test_a_mistake_in_the_configuration_stops_the_start(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("[reward]\nfinal_format_score = 2.0\n")
    ended = run_to_the_end({}, config)
    assert ended.returncode == 1
    assert "reward.final_format_score must be below reward.correct" in ended.stderr and "Traceback" not in ended.stderr


def test_a_reward_function_that_cannot_be_used_stops_the_start(bench: Bench, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('[reward]\nfunction = "nowhere:reward"\n')
    ended = run_to_the_end(bench.environment, config)
    assert ended.returncode == 1
    assert "reward.function nowhere:reward: cannot import nowhere" in ended.stderr and "Traceback" not in ended.stderr


def test_a_metrics_port_that_is_taken_stops_the_start(bench: Bench, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f"[reward]\nmetrics_port = {bench.server.port}\n")
    ended = run_to_the_end(bench.environment, config)
    assert ended.returncode == 1
    assert "set reward.metrics_port to a free port" in ended.stderr and "Traceback" not in ended.stderr


def test_a_redis_that_never_comes_is_one_clear_error_and_an_unhealthy_start(tmp_path: Path) -> None:
    config, heartbeat = tmp_path / "run.toml", tmp_path / "heartbeat"
    config.write_text('[redis]\nurl = "redis://127.0.0.1:1/0"\nretry_s = 1\n')
    ended = run_to_the_end({"FORAGE_HEARTBEAT_FILE": str(heartbeat)}, config)
    assert ended.returncode == 1
    assert "has been away for 1 s" in ended.stderr and "Traceback" not in ended.stderr
    with pytest.raises(RuntimeError, match="starting: not connected"):
        check_heartbeat(heartbeat, 60)


def test_a_wrong_password_is_told_and_never_printed(bench: Bench, tmp_path: Path) -> None:
    connect(RedisConfig(url=bench.server.url)).config_set("requirepass", "right")
    try:
        ended = run_to_the_end(bench.environment | {"FORAGE_REDIS__PASSWORD": "hush"}, bench.config_file)
    finally:
        bench.store.client.connection_pool.disconnect()
        connect(RedisConfig(url=bench.server.url, password="right")).config_set("requirepass", "")  # type: ignore[arg-type]
    assert ended.returncode == 1
    assert "FORAGE_REDIS__PASSWORD" in ended.stderr
    assert "hush" not in ended.stderr + ended.stdout and "Traceback" not in ended.stderr
