"""What Prometheus reads: sums over the processes of a worker, those that were killed included."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.contract.grading import send_for_grading
from tests.conftest import free_port
from tests.factories import make_trajectory
from tests.reward.conftest import Bench, wait_until

REWARDS = """
import os, time
def reward(episode):
    if episode.answer == "die":
        os._exit(1)
    while episode.answer == "loop":
        try:
            time.sleep(1)
        except Exception:
            pass
    if episode.answer == "raise":
        raise ValueError("no")
    return episode.reward
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("measured")
    (folder / "measured_rewards.py").write_text(REWARDS)
    port = free_port()
    made = Bench(folder, f'metrics_port = {port}\nfunction = "measured_rewards:reward"\nmax_tries = 1\n')
    made.start_worker()
    yield made
    made.close()


def scrape(bench: Bench) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{bench.config.reward.metrics_port}/metrics", timeout=10) as reply:
        families = text_string_to_metric_families(reply.read().decode())
        return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


def test_outcomes_failures_seconds_and_rewards_are_counted(measured: Bench) -> None:
    bench = measured
    for group, answer in enumerate(["Paris", "Rome", "die", "loop", "raise", "Paris"]):
        bench.play(f"t{group}", answer)
        send_for_grading(bench.app, f"t{group}/0")
    send_for_grading(bench.app, "nobody/0")
    wait_until(lambda: len(bench.letters()) == 3 and len(bench.notices()) == 3, 60, "all dealt with")
    send_for_grading(bench.app, "t0/0")
    counted = "forage_reward_messages_total"
    wait_until(lambda: scrape(bench).get((counted, "graded_before")) == 1, what="the last message counted")
    seen = scrape(bench)
    assert (seen[counted, "graded"], seen[counted, "buried"]) == (3, 3)
    assert seen[counted, "gone"] >= 1, "a message that a slow machine delivers twice finds its group gone too"
    failures = {labels[0]: value for (name, *labels), value in seen.items() if name == "forage_reward_failures_total"}
    assert failures["error"] == 1
    # On a slow machine the time limit passes before anybody has noticed that the process is dead.
    assert failures["hard_time_limit"] >= 1 and failures["hard_time_limit"] + failures.get("process_lost", 0) == 2
    assert seen["forage_reward_value_count", "capital"] == 3
    assert seen["forage_reward_value_sum", "capital"] == 2.0, "mean 2/3"
    assert seen["forage_reward_value_bucket", "0.0", "capital"] == 1
    outcomes = sum(value for (name, *_), value in seen.items() if name == counted)
    assert seen["forage_reward_grade_seconds_count",] == outcomes


def test_a_worker_that_is_told_to_stop_leaves_no_files_behind(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    try:
        scratch = bench.folder / "scratch"
        scratch.mkdir()
        bench.environment["TMPDIR"] = str(scratch)
        worker = bench.start_worker()
        bench.store.store(make_trajectory("t0"))
        send_for_grading(bench.app, "t0/0")
        wait_until(lambda: bench.is_graded("t0/0"))
        assert list(scratch.glob("forage-reward-*/*.db"))
        worker.process.terminate()
        worker.process.wait(20)
        assert not list(scratch.glob("forage-reward-*"))
    finally:
        bench.close()
