"""A whole run of the trainer on a tiny random Llama that a test kills and starts again, and what is left when it has ended.

The trainer's half of the suite is real: its program, Megatron, Redis, files. Engine and grader are a stand-in that answers every
group at once, by a seed and the very weights that are served: other weights would give other answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from services.contract.accounts import Accounts
from services.contract.config import Config, RedisConfig, show_config
from services.contract.groups import GroupStore, Lease
from services.contract.messages import PromptGroup, Span, Trajectory, VersionSpan
from services.contract.policy import PolicyBoard, PolicyVersion
from services.contract.store import connect
from services.trainer.durable.checkpoints import Checkpoints
from services.trainer.durable.ledger import Ledger
from tests.conftest import free_port
from tests.factories import grade
from tests.trainer.tiny_models import save_tiny
from tests.trainer.trainer_nursery import Job, Point

STEPS, GROUPS, SAMPLES, DEMONSTRATIONS, HELD_OUT = 3, 2, 2, 6, 2
QUESTIONS = 5
"""Fewer than are trained on: the second epoch's shuffle is part of it."""
LEASE_S = 5
"""What the stand-in took and has not finished for so long it takes again: its connection may have broken with the answer."""
TIMES = re.compile(r"at|time/.*|warm_start/seconds|eval/(seconds|.*version)|staleness/(version|lookahead|groups_.*)")
"""Figures of a row that a restart may change: times, version numbers, counts since the process began."""


def write_inputs(folder: Path) -> Path:
    """Model, tokenizer, questions and demonstrations, as `prepare` leaves them."""
    model = save_tiny("llama-tied", folder / "models" / "policy")
    make_tokenizer().save_pretrained(model)
    (folder / "questions").mkdir()
    for name, count in (("train", QUESTIONS), ("eval", HELD_OUT)):
        rows = [
            {"id": f"{name}{i}", "source": "sums", "question": f"{i} + {i}?", "golden_answers": [str(2 * i)]} for i in range(count)
        ]
        (folder / "questions" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = []
    for i in range(DEMONSTRATIONS):
        segments = [{"kind": "model", "text": f"<answer>{i}</answer>"}]
        lines.append(json.dumps({"example_id": f"sums:{i}", "question": f"{i}?", "segments": segments}))
    (folder / "demonstrations.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and three special ones: 259, as many as the tiny model has."""
    names = ["<|pad|>", "<|start|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")


def make_config(name: str, folder: Path, inputs: Path, redis_url: str, **trainer: Any) -> Config:
    """Three steps of everything: a warm start, evaluations in between, a reference that changes, several parts a batch."""
    objective = {"kl_coef": 0.1, "reference_every": 2, "minibatches": 2}
    settings = {"threads": 1, "steps": STEPS, "groups_per_step": GROUPS, "samples_per_prompt": SAMPLES, "learning_rate": 1e-3}
    settings |= {"checkpoint_every": 2, "eval_every": 2, "eval_questions": HELD_OUT, "max_tokens_per_microbatch": 24}
    settings |= {"warm_start": {"epochs": 1, "batch_size": 2, "learning_rate": 1e-3}, "collect_timeout_s": 1200}
    sections = {
        "run": {"name": name, "directory": folder / "runs", "seed": 3},
        "model": {"max_context": 128},
        "data": {"directory": inputs, "chat_template": False, "instruction": "{question}"},
        "rollout": {"max_turn_tokens": 16, "max_response_tokens": 32},
        "trainer": settings | trainer | {"objective": objective | trainer.get("objective", {})},
        "weights": {"directory": folder / "weights"},
        "redis": {"url": redis_url, "retry_s": 240},
    }
    return Config.model_validate(sections)


class StandIn(threading.Thread):
    """Engine and grader in one: plays each group with the policy that is current, and grades it."""

    def __init__(self, config: Config) -> None:
        super().__init__(daemon=True)
        client = connect(RedisConfig(url=config.redis.url, retry_s=240))
        self.store, self.board = GroupStore(client, config.run.name), PolicyBoard(client, config.run.name)
        self.over = threading.Event()
        self.played = 0
        """Training groups."""
        self.before_playing: Callable[[], object] = lambda: None
        """Called when a training group is taken, and counted."""
        self.takes: Callable[[PromptGroup], bool] = lambda group: True
        """Called with every group that is leased; one that is not taken goes back and is offered again."""

    def run(self) -> None:
        while not self.over.is_set():
            for lease in self.store.lease("stand-in", 10, 100) or self.store.claim("stand-in", LEASE_S, 10):
                self._play(lease)

    def _play(self, lease: Lease) -> None:
        if not self.takes(lease.group):
            self.store.hand_back(lease)
            time.sleep(0.05)  # it is offered again at once
            return
        policy = self.board.current()
        assert policy and policy.version >= lease.group.issued_version, "a group was fed for a version that is not served"
        if lease.group.purpose == "train":
            self.played += 1
            self.before_playing()
        for sample in range(lease.group.samples):
            trajectory = play(lease.group, sample, policy)
            self.store.store(trajectory, lease)
            reward = random.Random(f"{trajectory.response_ids}").random()
            grade(self.store, trajectory.id, reward, exact_match=reward)
        self.store.finish(lease)

    def stop(self) -> None:
        self.over.set()
        self.join()


def play(group: PromptGroup, sample: int, policy: PolicyVersion) -> Trajectory:
    """A search, what came back, an answer: tokens and log-probs drawn by the weights' digest, the group and the sample."""
    name = group.group_id if group.purpose == "train" else group.example_id  # an evaluation's ids hold the version
    draw = random.Random(f"{served_weights(policy)}/{name}/{sample}")
    own, seen, answer = draw.randint(2, 6), draw.randint(0, 6), draw.randint(1, 4)
    ends = (own, own + seen, own + seen + answer)
    spans = [Span("model", 0, own, "", [VersionSpan(policy.version, 0, own)])]
    spans += [Span("observation", own, ends[1], "", query="sum")] if seen else []
    spans += [Span("model", ends[1], ends[2], "", [VersionSpan(policy.version, ends[1], ends[2])])]
    mask = [1] * own + [0] * seen + [1] * answer
    return Trajectory(
        id=f"{group.group_id}/{sample}",
        group_id=group.group_id,
        prompt_ids=[draw.randrange(3, 259) for _ in range(5)],
        response_ids=[draw.randrange(3, 259) for _ in mask],
        logprobs=[draw.uniform(-6, -5) * m for m in mask],
        spans=spans,
        status="completed",
        stop_reason="answered",
        temperature=1.0,
        question=group.question,
        source=group.source,
        golden_answers=group.golden_answers,
        answer="4",
    )


def served_weights(policy: PolicyVersion) -> str:
    """The digest of the weights in a policy's folder."""
    return hashlib.sha256((Path(policy.path) / "model.safetensors").read_bytes()).hexdigest()


class Nursery:
    """Where trainers come from; see trainer_nursery.py."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "tests.trainer.trainer_nursery"]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, job: Job) -> list[int]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(msgspec.json.encode(job) + b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Outcome(msgspec.Struct, frozen=True):
    """What a finished run leaves behind, without times and version numbers."""

    weights: str
    """Digest of the final model."""
    trained: list[list[str]]
    """Groups of each step."""
    answers: list[Any]
    """What the trained trajectories said: id, reward and the learner's view of their length."""
    rows: list[dict[str, Any]]
    """The journal."""
    ledger: Ledger
    accounts: Accounts


class RunToKill:
    """One run: `start` starts the trainer and returns when it has ended or was killed."""

    def __init__(self, nursery: Nursery, config: Config, own: Path) -> None:
        """own: a folder for the configuration and the log, on another disk than the run's if that is to fill up."""
        self.nursery, self.config = nursery, config
        self.folder = config.run.folder
        self.toml, self.log = own / "run.toml", own / "log"
        self.toml.write_text(show_config(config))
        self.stand_in = StandIn(config)
        self.stand_in.start()

    def start(self, *kill_at: Point, ranks: int = 1, by: int = signal.SIGKILL) -> list[int]:
        """Exit code of each rank."""
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environments = [shared | {"RANK": str(rank)} for rank in range(ranks)]
        return self.nursery.run(Job(str(self.toml), str(self.log), environments, list(kill_at), by))

    def finish(self, ranks: int = 1) -> Outcome:
        assert self.start(ranks=ranks) == [0] * ranks, self.log.read_text()[-6000:]
        return self.outcome()

    def outcome(self) -> Outcome:
        steps = [json_lines(path) for path in sorted((self.folder / "transcripts").glob("step*.jsonl"))]
        found = Checkpoints(self.folder / "checkpoints", keep=2).latest()
        assert found
        return Outcome(
            weights=hashlib.sha256((self.folder / "final" / "model.safetensors").read_bytes()).hexdigest(),
            trained=[sorted({row["id"].split("/")[0] for row in rows}) for rows in steps],
            answers=[(row["id"], row["reward"]) for rows in steps for row in rows],
            rows=[{k: v for k, v in row.items() if not TIMES.fullmatch(k)} for row in json_lines(self.folder / "metrics.jsonl")],
            ledger=found[1],
            accounts=self.stand_in.store.accounts(),
        )

    def said(self, text: str) -> bool:
        return text in self.log.read_text()

    def bodies(self) -> list[bytes]:
        """Trajectories and rewards that are still in Redis."""
        keys, client = self.stand_in.store.keys, self.stand_in.store.client
        return [name for pattern in (keys.trajectory("*"), keys.reward("*")) for name in client.scan_iter(pattern)]

    def close(self) -> None:
        self.stand_in.stop()


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
