"""Whole runs of the real trainer on a tiny random model, in one process of their own.

Engine and graders are a stand-in: a thread that answers every group that is fed, with the policy version that is current, from the
group's id.

    python -m tests.trainer.short_run JOB.json

The job: a list of configurations, run one after the other.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TRAINER = {"threads": 1, "steps": 3, "groups_per_step": 2, "samples_per_prompt": 2, "checkpoint_every": 2, "eval_questions": 2}


def make_model(folder: Path) -> Path:
    """A random Llama with a tokenizer."""
    import torch
    import transformers

    from tests.rollout.tiny_model import make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    sizes = transformers.LlamaConfig(**TINY, vocab_size=len(tokenizer), tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(sizes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_config(folder: Path, name: str, redis_url: str, **trainer: Any) -> dict[str, Any]:
    """Values of a run under `folder`, whose model, questions and demonstrations it writes where they are missing."""
    model = folder / "model"
    if not model.exists():
        make_model(model)
        question = {"source": "capital", "question": "What is the capital of France?", "golden_answers": ["Paris"]}
        rows = [json.dumps(question | {"id": str(i)}) for i in range(4)]
        segments = [{"kind": "model", "text": "<answer>Paris</answer>"}]
        lesson = json.dumps({"example_id": "capital:1", "question": question["question"], "segments": segments})
        (folder / "questions.jsonl").write_text("\n".join(rows) + "\n")
        (folder / "demonstrations.jsonl").write_text(f"{lesson}\n{lesson}\n")
    questions = str(folder / "questions.jsonl")
    data = {"source": "folder", "train_questions": questions, "eval_questions": questions}
    data |= {"demonstrations": str(folder / "demonstrations.jsonl")}
    return {
        "run": {"name": name, "directory": str(folder / "runs")},
        "model": {"source": "folder", "path": str(model)},
        "data": data
        | {"demonstrations": str(folder / "demonstrations.jsonl"), "chat_template": False, "instruction": "{question}"},
        "weights": {"directory": str(folder / "weights")},
        "redis": {"url": redis_url, "retry_s": 30},
        "trainer": TRAINER | {"warm_start": {"epochs": 1, "batch_size": 2}} | trainer,
    }


def run_all(folder: Path, configs: list[dict[str, Any]]) -> str:
    """Run them in a process of its own; returns its output. Raises RuntimeError with it when a run fails."""
    job = folder / "job.json"
    job.write_text(json.dumps(configs))
    command = [sys.executable, "-m", "tests.trainer.short_run", str(job)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a run failed:\n{(done.stdout + done.stderr)[-6000:]}")
    return done.stdout


class StandIn(threading.Thread):
    """Engine and graders of one run: answers whatever is fed. A group's samples differ in reward."""

    def __init__(self, config: Any) -> None:
        from services.contract.groups import GroupStore
        from services.contract.policy import PolicyBoard
        from services.contract.store import connect

        super().__init__(daemon=True)
        client = connect(config.redis)
        self.store, self.board = GroupStore(client, config.run.name), PolicyBoard(client, config.run.name)
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            for lease in self.store.lease("stand-in", 1, 50):
                current = self.board.current()  # set before anything is fed
                assert current
                self.answer(lease, current.version)

    def answer(self, lease: Any, version: int) -> None:
        from tests.factories import grade, make_trajectory

        group = lease.group
        for sample in range(group.samples):
            draw = random.Random(f"{group.group_id}/{sample}")
            answered = make_trajectory(group.group_id, sample, versions=(version,), temperature=group.sampling.temperature or 1.0)
            answered.response_ids = [draw.randrange(3, 300) for _ in answered.response_ids]
            self.store.store(answered, lease)
            reward = float(sample % 2)
            assert grade(self.store, answered.id, reward, exact_match=reward, sub_match=reward, f1=reward, format=1.0)
        self.store.finish(lease)


def main() -> None:
    from services.contract.config import Config
    from services.contract.telemetry import configure_logging
    from services.trainer.megatron import distributed

    configure_logging("trainer")
    configs = [Config.model_validate(values) for values in json.loads(Path(sys.argv[1]).read_text())]
    distributed.init(configs[0])
    for config in configs:
        train(config)
    distributed.shutdown()


def train(config: Any) -> None:
    from services.trainer.main import train as train_to_the_end
    from services.trainer.run import Run

    player = StandIn(config)
    player.start()
    train_to_the_end(Run(config))
    player.done.set()
    player.join()


if __name__ == "__main__":
    main()
