"""Celery's own tools against a real worker: before and after the broker was away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from typing import Any

import pytest

from services.contract.grading import send_for_grading
from tests.conftest import free_port
from tests.factories import make_trajectory
from tests.reward.conftest import Bench, GradingWorker, answers_ping, wait_until

CELERY = [sys.executable, "-m", "celery", "-A", "services.reward.celery_app"]


def environment(bench: Bench) -> dict[str, str]:
    return {**os.environ, **bench.environment, "FORAGE_CONFIG": str(bench.config_file)}


def inspect(bench: Bench, what: str) -> dict[str, Any]:
    """What the only worker answers to `celery inspect WHAT`."""
    command = [*CELERY, "--quiet", "inspect", "--timeout", "5", "--json", what]
    ended = subprocess.run(command, env=environment(bench), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (answer,) = json.loads(ended.stdout).values()
    return answer


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("ping", lambda answer: answer == {"ok": "pong"}),
        ("active", lambda answer: answer == []),
        ("stats", lambda answer: answer["pool"]["max-concurrency"] == 1 and answer["prefetch_count"] == 1),
        ("registered", lambda answer: answer == ["forage.grade"]),
        ("active_queues", lambda answer: [queue["name"] for queue in answer] == ["forage.test.grade"]),
    ],
)
def test_celery_inspect_is_answered(bench: Bench, worker: GradingWorker, what: str, expected: Any) -> None:
    answer = inspect(bench, what)
    assert expected(answer), answer


def test_a_worker_grades_and_answers_after_each_of_several_broker_restarts(own_bench: Bench) -> None:
    bench = own_bench
    worker = bench.start_worker()
    for restart, away_s in enumerate((0.0, 0.0, 1.0, 4.0)):
        bench.server.kill()
        time.sleep(away_s)
        bench.server.start()
        bench.store.store(make_trajectory(f"t{restart}"))
        send_for_grading(bench.app, f"t{restart}/0")
        wait_until(lambda graded=f"t{restart}/0": bench.is_graded(graded), 40, f"graded: {worker.output()}")
        wait_until(lambda: answers_ping(bench), 60, f"answers: {worker.output()}")
    assert inspect(bench, "active") == []


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return reply.read()


def test_flower_shows_the_worker_and_what_it_graded(bench: Bench, worker: GradingWorker) -> None:
    port = free_port()
    options = ["flower", f"--port={port}", "--address=127.0.0.1", "--inspect_timeout=5000"]
    log = (bench.folder / "flower.log").open("w")
    settings = environment(bench) | {"FLOWER_UNAUTHENTICATED_API": "true"}
    flower = subprocess.Popen([*CELERY, *options], env=settings, stdout=log, stderr=subprocess.STDOUT)

    def workers() -> dict[str, Any]:
        try:
            return json.loads(get(f"http://127.0.0.1:{port}/api/workers?refresh=1"))
        except OSError:
            return {}

    def tasks() -> list[tuple[str, str]]:
        shown = json.loads(get(f"http://127.0.0.1:{port}/api/tasks")).values()
        return [(task["name"], task["state"]) for task in shown]

    def graded_and_shown() -> bool:
        """Flower asks the worker for its events when it starts; what was graded before is not shown."""
        send_for_grading(bench.app, "flower/0")
        time.sleep(0.5)
        return ("forage.grade", "SUCCESS") in tasks()

    try:
        wait_until(workers, 90, f"flower knows the worker: {(bench.folder / 'flower.log').read_text()}")
        (known,) = workers().values()
        assert "forage.grade" in known["registered"] and known["stats"]["pool"]["max-concurrency"] == 1
        bench.store.store(make_trajectory("flower"))
        wait_until(graded_and_shown, 30, "flower shows the task")
    finally:
        flower.terminate()
        flower.wait(20)
