"""PPO from the first stage to the last: the critic in checkpoints, what may be changed between two starts, and what may not."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
import torch

from services.contract.groups import GroupStore
from services.contract.messages import Demonstration, PromptGroup, Question, Segment, Span, Trajectory, VersionSpan
from services.prepare.models import write_tiny
from tests.conftest import RedisServer, free_port
from tests.factories import grade

ROOT = Path(__file__).parents[2]
RUNS = ("ppo", "grpo")
PPO = {"advantage": "gae", "critic_warmup_steps": 1, "critic_learning_rate": 1e-3}


def answer(group: PromptGroup, sample: int) -> Trajectory:
    """What an engine might have played: random tokens, a search between them. The same for the same sample."""
    draw = random.Random(f"{group.group_id}/{sample}")
    first, seen, last = draw.randint(1, 4), draw.randint(1, 4), draw.randint(1, 4)
    end, version = first + seen + last, group.issued_version
    own = [1] * first + [0] * seen + [1] * last
    spans = [
        Span("model", 0, first, "", [VersionSpan(version, 0, first)]),
        Span("observation", first, first + seen, ""),
        Span("model", first + seen, end, "", [VersionSpan(version, first + seen, end)]),
    ]
    return Trajectory(
        id=f"{group.group_id}/{sample}",
        group_id=group.group_id,
        prompt_ids=[draw.randrange(1000) for _ in range(4)],
        response_ids=[draw.randrange(1000) for _ in own],
        logprobs=[-10.8 * mine for mine in own],
        spans=spans,
        status="completed",
        stop_reason="answered",
        temperature=group.sampling.temperature,
        question=group.question,
        source=group.source,
        golden_answers=group.golden_answers,
    )


def play(store: GroupStore, over: threading.Event) -> None:
    """Stands in for rollout worker, engine and grader: every group that is fed comes back graded."""
    while not over.is_set():
        for lease in store.lease("stand-in", 8, 100):
            played = [answer(lease.group, sample) for sample in range(lease.group.samples)]
            store.store_many([(trajectory, lease) for trajectory in played])
            store.finish(lease)
            for trajectory in played:
                grade(store, trajectory.id, len(trajectory.response_ids) % 4 / 3)


def run_beside_players(command: list[str], environment: dict[str, str], client: redis.Redis) -> subprocess.CompletedProcess[str]:
    """The trainer's process, with a player for each run. A player's error ends both, and is raised."""
    over = threading.Event()
    with ThreadPoolExecutor(len(RUNS) + 1) as pool:
        playing = [pool.submit(play, GroupStore(client, name), over) for name in RUNS]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        watching = pool.submit(process.communicate)
        wait([*playing, watching], return_when=FIRST_COMPLETED)
        over.set()
        if not watching.done():
            process.kill()
        output = watching.result()[0]
    for player in playing:
        player.result()
    return subprocess.CompletedProcess(command, process.returncode, output)


def write_data(folder: Path) -> None:
    question = "What is the capital of France?"
    every = [Question(str(n), "capital", question, ["Paris"]) for n in range(4)]
    segments = [
        Segment("model", "<search>France</search>"),
        Segment("observation", "Paris"),
        Segment("model", "<answer>Paris</answer>"),
    ]
    for name, rows in {"train": every, "eval": every[:1], "shown": [Demonstration("capital:1", question, segments)] * 2}.items():
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(msgspec.json.encode(row) for row in rows))


def config(
    folder: Path, url: str, name: str, steps: int, objective: dict[str, Any], samples: int = 1, warm: int = 1
) -> dict[str, Any]:
    files = {"train_questions": "train", "eval_questions": "eval", "demonstrations": "shown"}
    return {
        "run": {"name": name, "directory": folder / "runs"},
        "model": {"source": "folder", "path": folder / "model", "max_context": 512},
        "data": {key: folder / f"{file}.jsonl" for key, file in files.items()} | {"instruction": "{question}"},
        "rollout": {"max_turn_tokens": 16, "max_response_tokens": 64},
        "redis": {"url": url},
        "weights": {"directory": folder / "weights"},
        "trainer": {
            "threads": 1,
            "steps": steps,
            "groups_per_step": 4,
            "samples_per_prompt": samples,
            "checkpoint_every": 1,
            "collect_timeout_s": 300,
            "objective": objective,
            "warm_start": {"epochs": 1, "batch_size": 2},
        },
    }


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> dict[str, Any]:
    """One process, one start of the trainer after another."""
    folder = tmp_path_factory.mktemp("run")
    client = redis.Redis(port=redis_server.port)
    client.flushall()
    write_tiny(folder / "model", seed=0, max_context=512)
    write_data(folder)
    starts = {
        "begun": ("ppo", 2, PPO),
        "gone on": ("ppo", 3, PPO),
        "KL afterwards": ("ppo", 4, PPO | {"kl_coef": 0.1}),
        "with KL": ("grpo", 1, {"kl_coef": 0.1}, 2),
        "critic afterwards": ("grpo", 2, PPO | {"kl_coef": 0.1}, 2),
    }
    torch.save({label: config(folder, redis_server.url, *start) for label, start in starts.items()}, folder / "job.pt")
    address = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.trainer.run_worker", str(folder / "job.pt"), str(folder / "result.pt")]
    done = run_beside_players(command, os.environ | address, client)
    assert done.returncode == 0, done.stdout[-6000:]
    return torch.load(folder / "result.pt", weights_only=False)


pytestmark = pytest.mark.timeout(900)


def test_ppo_goes_from_the_warm_start_to_the_final_model(reports: dict[str, Any]) -> None:
    assert reports["begun"]["stage"] == "done" and "final" in reports["begun"]["folders"]
    assert [row["step"] for row in reports["begun"]["rows"]] == [1, 2]


def test_the_policy_learns_only_after_the_critics_warm_up(reports: dict[str, Any]) -> None:
    first, second = reports["begun"]["rows"]
    assert (first["objective/learning_rate"], first["objective/grad_norm"]) == (0, 0)
    assert second["objective/learning_rate"] > 0 and second["objective/grad_norm"] > 0
    assert first["objective/critic_learning_rate"] == second["objective/critic_learning_rate"] == 1e-3


def test_a_step_of_the_critic_alone_publishes_nothing(reports: dict[str, Any]) -> None:
    assert [row["staleness/version"] for row in reports["begun"]["rows"]] == [1, 2], "1 is the warm start"


def test_a_step_tells_of_its_critic(reports: dict[str, Any]) -> None:
    names = ("value_loss", "value_clip_fraction", "explained_variance", "returns_mean", "value_mean", "critic_grad_norm")
    told = {f"objective/{name}" for name in names}
    assert all(told <= row.keys() for row in reports["begun"]["rows"])
    assert reports["begun"]["rows"][0]["objective/value_mean"] == 0, "the critic begins with a head of zeros"


def test_a_run_that_goes_on_has_its_critic_of_before(reports: dict[str, Any]) -> None:
    gone_on = reports["gone on"]
    assert gone_on["critic_steps"] == [3]
    assert gone_on["rows"][-1]["step"] == 3 and gone_on["rows"][-1]["objective/value_mean"] != 0


def test_a_kl_that_is_asked_for_later_does_not_take_the_starting_model_for_the_reference(reports: dict[str, Any]) -> None:
    assert "never kept because trainer.objective.kl_coef was 0 when GRPO began" in reports["KL afterwards"]["refused"]


def test_the_policy_after_the_warm_start_is_kept_as_the_reference(reports: dict[str, Any]) -> None:
    assert "reference" in reports["with KL"]["folders"] and "reference" not in reports["begun"]["folders"]
    # One optimizer step, from the reference itself: they have not parted yet.
    assert reports["with KL"]["rows"][0]["objective/reference_kl"] == pytest.approx(0, abs=1e-6)


def test_a_critic_that_is_asked_for_later_is_refused(reports: dict[str, Any]) -> None:
    assert "has no critic: the steps before it were made without one" in reports["critic afterwards"]["refused"]


def test_the_final_model_is_never_the_starting_one_in_place_of_a_version_that_is_gone(reports: dict[str, Any]) -> None:
    assert re.search("the policy .*v000002 is gone", reports["begun"]["final"])
