"""A worker on real Redis, real SGLang and a retriever over HTTP: each row of the table in services/rollout/worker.py."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from services.contract import weights
from services.contract.messages import PromptGroup, Sampling, Trajectory
from services.contract.policy import PolicyVersion
from services.rollout import retrieval
from services.rollout.engine import Engine
from services.rollout.failures import EngineError
from services.rollout.generation import ABORTED, Generation
from tests.factories import make_group, make_sampling, make_trajectory
from tests.rollout.conftest import Bench
from tests.rollout.standins import StandInRetriever
from tests.rollout.tiny_model import ANSWER, QUERY, make_variant, reference_logprobs

pytestmark = pytest.mark.asyncio(loop_scope="session")


def group(name: str = "t0", samples: int = 3, **changes: Any) -> PromptGroup:
    drawn = {name: changes.pop(name) for name in ("temperature", "top_p") if name in changes}
    sampling = make_sampling(max_turn_tokens=40, **drawn)
    return make_group(name, samples, sampling=sampling, **changes)


def stored(bench: Bench, of: PromptGroup) -> list[Trajectory]:
    return [trajectory for trajectory in bench.store.load_many(of.trajectory_ids()) if trajectory]


async def test_a_group_is_played_stored_and_sent_for_grading(bench: Bench, retriever: StandInRetriever) -> None:
    sent = group(temperature=0.0)
    bench.store.feed(sent)
    async with bench.worker():
        await bench.until(lambda: bench.store.accounts().finished)
    trajectories = stored(bench, sent)
    assert [trajectory.answer for trajectory in trajectories] == [ANSWER] * 3
    assert {trajectory.stop_reason for trajectory in trajectories} == {"answered"}
    assert all(trajectory.searches == 1 and trajectory.worker == "w" for trajectory in trajectories)
    assert [request["queries"] for request in retriever.requests] == [[QUERY]] * 3
    assert sorted(bench.requested()) == sent.trajectory_ids()
    bench.store.accounts().check()


async def test_the_logprobs_of_whole_episodes_are_those_of_transformers(bench: Bench) -> None:
    """All turns, also those that follow a cached prefix."""
    bench.store.feed(group("warm", 4, temperature=1.4))
    bench.store.feed(group("greedy", 1, temperature=0.0))
    async with bench.worker():
        await bench.until(lambda: bench.store.accounts().finished == 2)
    trajectories = stored(bench, group("warm", 4)) + stored(bench, group("greedy", 1))
    assert len(trajectories) == 5 and any(trajectory.searches for trajectory in trajectories)
    for trajectory in trajectories:
        temperature = trajectory.temperature or 1.0
        expected = reference_logprobs(bench.model, trajectory.prompt_ids, trajectory.response_ids, temperature)
        pairs = zip(trajectory.logprobs, expected, trajectory.loss_mask, strict=True)
        assert max(abs(found - wanted) for found, wanted, ours in pairs if ours) < 1e-3


async def test_only_missing_samples_are_played_and_all_are_sent_for_grading(bench: Bench) -> None:
    sent = group()
    bench.store.feed(sent)
    bench.store.store(make_trajectory("t0", 1, answer="kept"))
    async with bench.worker():
        await bench.until(lambda: bench.store.accounts().finished)
    assert [trajectory.answer == "kept" for trajectory in stored(bench, sent)] == [False, True, False]
    assert sorted(bench.requested()) == sent.trajectory_ids()


async def test_a_group_that_was_whole_but_not_finished_is_only_sent_for_grading(bench: Bench) -> None:
    bench.store.feed(group(samples=2))
    for sample in range(2):
        bench.store.store(make_trajectory("t0", sample))
    async with bench.worker(generate=_never):
        await bench.until(lambda: bench.store.accounts().finished)
    assert sorted(bench.requested()) == ["t0/0", "t0/1"]


async def _never(input_ids: list[int], sampling: Sampling, limit: int) -> Generation:
    raise AssertionError("nothing was missing")


async def test_a_silent_workers_group_is_taken_over(bench: Bench) -> None:
    bench.store.feed(group(samples=2))
    assert bench.store.lease("dead", 1, 10)
    async with bench.worker(lease_s=0.5):
        await bench.until(lambda: bench.store.accounts().finished)
    assert b"taken over from a silent worker" in bench.client.xrange(bench.store.keys.events)[0][1][b"event"]  # type: ignore[index]


async def test_a_long_group_stays_with_the_worker_that_refreshes_it(bench: Bench, retriever: StandInRetriever) -> None:
    retriever.delay_s = 2.0
    bench.store.feed(group(samples=1, temperature=0.0))
    async with bench.worker("first", lease_s=0.6):
        await bench.until(lambda: retriever.requests)
        async with bench.worker("second", lease_s=0.6):
            await bench.until(lambda: bench.store.accounts().finished)
    assert stored(bench, group(samples=1))[0].worker == "first"
    assert len(retriever.requests) == 1


async def test_a_group_that_another_worker_has_claimed_is_dropped(bench: Bench, retriever: StandInRetriever) -> None:
    retriever.delay_s = 3.0
    bench.store.feed(group(samples=1, temperature=0.0))
    async with bench.worker(lease_s=1.5) as worker:
        await bench.until(lambda: retriever.requests)
        assert bench.store.claim("thief", 0.0, 1)
        await bench.until(lambda: not worker._playing)
    assert stored(bench, group(samples=1)) == [] and bench.store.accounts().leased == 1


async def test_a_retriever_that_keeps_failing_ends_in_a_dead_letter_and_no_trajectory(
    bench: Bench, retriever: StandInRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "FIRST_PAUSE_S", 0.01)
    retriever.always = 500
    sent = group(temperature=0.0)
    bench.store.feed(sent)
    async with bench.worker():
        await bench.until(lambda: bench.store.accounts().dead)
    (letter,) = bench.store.read_dead()
    assert letter.attempts == 2 and f"{retriever.url}/retrieve failed 3 times" in letter.reason
    assert stored(bench, sent) == [] and bench.requested() == []
    assert len(retriever.requests) == 3 * 3 * 2  # samples, requests each, attempts
    bench.store.accounts().check()


async def test_a_retriever_that_comes_back_in_time_costs_nothing(bench: Bench, retriever: StandInRetriever) -> None:
    retriever.statuses = [500, 503]
    bench.store.feed(group(temperature=0.0))
    async with bench.worker():
        await bench.until(lambda: bench.store.accounts().finished)
    assert {(t.attempt, t.answer) for t in stored(bench, group())} == {(1, ANSWER)}


async def test_samples_that_went_well_are_kept_when_another_fails(bench: Bench) -> None:
    calls: list[int] = []

    async def fails_once(input_ids: list[int], sampling: Sampling, limit: int) -> Generation:
        calls.append(1)
        if len(calls) == 1:
            raise EngineError("the engine is gone")
        return await bench.engine.generate(input_ids, sampling, limit)

    bench.store.feed(group(temperature=0.0))
    async with bench.worker(generate=fails_once, generation_retries=0):
        await bench.until(lambda: bench.store.accounts().finished)
    assert sorted(trajectory.attempt for trajectory in stored(bench, group())) == [1, 1, 2]


@pytest.mark.parametrize("failures", [1, 3])
async def test_a_turn_that_the_engine_breaks_off_is_played_again_at_no_cost_to_the_group(bench: Bench, failures: int) -> None:
    calls: list[int] = []

    async def breaks_off(input_ids: list[int], sampling: Sampling, limit: int) -> Generation:
        calls.append(1)
        return ABORTED if len(calls) <= failures else await bench.engine.generate(input_ids, sampling, limit)

    bench.store.feed(group(samples=1, temperature=0.0))
    async with bench.worker(generate=breaks_off, generation_retries=3):
        await bench.until(lambda: bench.store.accounts().finished)
    (trajectory,) = stored(bench, group(samples=1))
    assert (trajectory.attempt, trajectory.stop_reason) == (1, "answered")


async def test_an_engine_that_keeps_breaking_off_costs_attempts_and_leaves_no_trajectory(bench: Bench) -> None:
    async def breaks_off(input_ids: list[int], sampling: Sampling, limit: int) -> Generation:
        return ABORTED

    bench.store.feed(group(samples=1, temperature=0.0))
    async with bench.worker(generate=breaks_off, generation_retries=1):
        await bench.until(lambda: bench.store.accounts().dead)
    (letter,) = bench.store.read_dead()
    assert (letter.attempts, letter.reason) == (2, "the engine broke off a turn")
    assert stored(bench, group(samples=1)) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": "word " * 600}, "ValueError: the prompt of capital:1 has .* tokens.*raise model.max_context"),
        ({"top_p": 2.0}, "EngineRefused: .*top_p"),
    ],
)
async def test_what_a_second_try_cannot_mend_is_dead_at_once(bench: Bench, changes: dict[str, Any], reason: str) -> None:
    bench.store.feed(group(**changes))
    async with bench.worker():
        await bench.until(lambda: bench.store.accounts().dead)
    (letter,) = bench.store.read_dead()
    assert letter.attempts == 1
    assert re.search(reason, letter.reason), letter.reason


async def test_a_deadline_that_passes_costs_an_attempt(bench: Bench, retriever: StandInRetriever) -> None:
    retriever.delay_s = 5.0
    bench.store.feed(group(samples=1, temperature=0.0, deadline_s=1.0))
    async with bench.worker(max_attempts=2):
        await bench.until(lambda: bench.store.accounts().dead, 8)
    (letter,) = bench.store.read_dead()
    assert letter.attempts == 2
    assert letter.reason == "deadline: not finished within 1 s of being taken"


async def test_a_late_group_may_go_on_with_the_samples_it_has(bench: Bench) -> None:
    sent = group(samples=4, temperature=0.0, deadline_s=10.0)
    hanging = asyncio.Event()

    async def some_hang(input_ids: list[int], sampling: Sampling, limit: int) -> Generation:
        calls.append(1)
        if len(calls) > 3:  # the last sample has its passages and never gets an answer
            await hanging.wait()
        return await bench.engine.generate(input_ids, sampling, limit)

    calls: list[int] = []
    bench.store.feed(sent)
    bench.store.store(make_trajectory("t0", 0))
    bench.store.store(make_trajectory("t0", 1))
    async with bench.worker(generate=some_hang, late_groups="release", concurrency=1):
        await bench.until(lambda: bench.store.accounts().finished)
    trajectories = stored(bench, sent)
    assert [t.status for t in trajectories[:3]] == ["completed"] * 3
    assert (trajectories[3].status, trajectories[3].stop_reason, trajectories[3].response_ids) == ("failed", "late", [])
    assert sorted(bench.requested()) == sent.trajectory_ids()


async def test_a_late_group_with_a_single_sample_is_played_again(bench: Bench, retriever: StandInRetriever) -> None:
    retriever.delay_s = 4.0
    bench.store.feed(group(samples=2, temperature=0.0, deadline_s=1.0))
    bench.store.store(make_trajectory("t0", 0))
    async with bench.worker(max_attempts=1, late_groups="release"):
        await bench.until(lambda: bench.store.accounts().dead, 8)
    assert bench.store.read_dead()[0].reason.startswith("deadline")


async def test_waiting_in_the_stream_does_not_count_towards_the_deadline(bench: Bench) -> None:
    bench.store.feed(group(samples=1, temperature=0.0, deadline_s=2.0))
    await asyncio.sleep(2.5)
    async with bench.worker():
        await bench.until(lambda: bench.store.accounts().finished)
    assert bench.store.accounts().dead == 0


async def test_episodes_in_flight_stay_within_the_concurrency(bench: Bench, retriever: StandInRetriever) -> None:
    retriever.delay_s = 0.3
    for index in range(4):
        bench.store.feed(group(f"t{index}", 3, temperature=0.0))
    most = 0
    async with bench.worker(concurrency=4) as worker:
        while bench.store.accounts().finished < 4:
            most = max(most, worker.engines.in_flight)
            await asyncio.sleep(0.02)
    assert 3 <= most <= 4


async def test_one_long_episode_does_not_keep_the_next_group_waiting(bench: Bench) -> None:
    calls: list[int] = []
    go_on = asyncio.Event()

    async def first_hangs(input_ids: list[int], sampling: Sampling, limit: int) -> Generation:
        calls.append(1)
        if len(calls) == 1:
            await go_on.wait()
        return await bench.engine.generate(input_ids, sampling, limit)

    for name in ("a", "b"):
        bench.store.feed(group(name, 2, temperature=0.0))
    async with bench.worker(generate=first_hangs, concurrency=2):
        await bench.until(lambda: bench.store.accounts().finished == 1)
        assert len(stored(bench, group("a", 2))) == 1 and len(stored(bench, group("b", 2))) == 2
        go_on.set()
        await bench.until(lambda: bench.store.accounts().finished == 2)


async def test_a_drained_worker_finishes_what_it_can_and_hands_back_the_rest(bench: Bench, retriever: StandInRetriever) -> None:
    retriever.delay_s = 1.0
    bench.store.feed(group("quick", 1, temperature=0.0))
    async with bench.worker(shutdown_grace_s=2.5) as worker:
        await bench.until(lambda: retriever.requests)
        retriever.delay_s = 20.0
        bench.store.feed(group("slow", 1, temperature=0.0))
        await bench.until(lambda: len(retriever.requests) == 2)
        worker.stop.set()  # type: ignore[attr-defined]
        await asyncio.sleep(0.6)
        await worker.drain()
        accounts = bench.store.accounts()
    assert (accounts.finished, accounts.waiting, accounts.leased) == (1, 1, 0)
    (again,) = bench.store.lease("other", 1, 10)
    assert again.group.group_id == "slow" and again.group.attempt == 1


def publish(bench: Bench, version: int, scale: float = 0.9) -> PolicyVersion:
    root = bench.config.weights_folder
    path = weights.publish(root, version, version - 1, lambda folder: make_variant(bench.model, folder, scale))
    return PolicyVersion(version, str(path))


def reported(bench: Bench) -> Any:
    (report,) = bench.board.live_engines()
    return report


async def test_a_staged_version_is_verified_while_the_old_one_serves(bench: Bench) -> None:
    async with bench.worker():
        bench.board.stage(publish(bench, 1))
        await bench.until(lambda: reported(bench).staged == 1)
        assert (reported(bench).version, reported(bench).state) == (0, "ready")


async def test_a_new_current_version_is_loaded_while_episodes_run_and_none_is_lost(
    bench: Bench, retriever: StandInRetriever
) -> None:
    retriever.delay_s = 1.5
    sent = [group(f"t{index}", 2) for index in range(3)]
    for each in sent:
        bench.store.feed(each)
    async with bench.worker():
        await bench.until(lambda: retriever.requests)
        bench.board.commit(publish(bench, 1))
        await bench.until(lambda: reported(bench).version == 1)
        await bench.until(lambda: bench.store.accounts().finished == 3)
        later = group("later", 2, issued_version=1)
        bench.store.feed(later)
        await bench.until(lambda: bench.store.accounts().finished == 4)
    during = [trajectory for each in sent for trajectory in stored(bench, each)]
    assert len(during) == 6
    assert any({v.version for s in trajectory.spans for v in s.versions} == {0, 1} for trajectory in during)
    assert {trajectory.lowest_version for trajectory in stored(bench, later)} == {1}


async def test_a_torn_version_is_refused_and_the_old_one_keeps_serving(bench: Bench, retriever: StandInRetriever) -> None:
    retriever.delay_s = 1.0
    torn = publish(bench, 1)
    weights_file = Path(torn.path) / "model.safetensors"
    whole = weights_file.read_bytes()
    weights_file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    bench.store.feed(group("before", 1, temperature=0.0))
    async with bench.worker():
        await bench.until(lambda: retriever.requests)
        bench.board.commit(torn)
        await bench.until(lambda: reported(bench).state == "stale")
        bench.store.feed(group("after", 1, issued_version=1))
        await bench.until(lambda: bench.store.accounts().finished)
        assert await bench.engine.reported_version() == "0"
        await asyncio.sleep(0.5)
        assert bench.store.accounts().waiting == 1
        weights_file.write_bytes(whole)  # whole again: the next attempt finds it so
        await bench.until(lambda: bench.store.accounts().finished == 2)
    assert stored(bench, group("after", 1))[0].lowest_version == 1


async def test_a_group_is_not_played_by_an_older_policy_than_it_was_issued_for(bench: Bench) -> None:
    bench.store.feed(group(samples=1, issued_version=1))
    async with bench.worker():
        await asyncio.sleep(0.5)
        assert not stored(bench, group(samples=1))
        bench.board.commit(publish(bench, 1))
        await bench.until(lambda: bench.store.accounts().finished)
    assert stored(bench, group(samples=1))[0].lowest_version == 1


async def test_a_version_that_verifies_but_does_not_load_stops_the_engine(bench: Bench, served: Engine) -> None:
    def write(folder: Path) -> None:
        make_variant(bench.model, folder, 1.0)
        (folder / "model.safetensors").write_bytes(b"not weights")

    path = weights.publish(bench.config.weights_folder, 1, 0, write)
    async with bench.worker() as worker:
        await bench.until(lambda: reported(bench).state == "ready")
        bench.board.commit(PolicyVersion(1, str(path)))
        await bench.until(lambda: not served.running)
        assert not worker.engines.caught_up
