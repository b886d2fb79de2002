"""Training speed of the learner against plain transformers + torch: the same rows, loss and AdamW step, in one process.

    python -m benchmarks.trainer_throughput --model var/data/models/policy

Prints tokens/s of both and their ratio, the peak memory, and the seconds to save, load and export. A row has `--length`
tokens, of which `--own` are the model's (several spans, as in a search episode). Plain torch computes logits everywhere,
as `model(input_ids)` does; its micro-batches are the learner's.
"""

from __future__ import annotations

import argparse
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from services.contract.config import Config
from services.trainer.megatron import distributed
from services.trainer.megatron.batching import Row, micro_batch, plan
from services.trainer.megatron.learner import Learner
from services.trainer.megatron.loss import SupervisedLoss

LEARNING_RATE = 1e-6


def make_rows(count: int, length: int, own: int, vocab: int) -> list[Row]:
    """Lengths spread by a fifth around `length`; a third prompt, then spans of the model's own and of observed tokens."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        total = draw.randint(int(length * 0.8), int(length * 1.2))
        prompt = total // 3
        half = own // 2
        mask = [1] * half + [0] * (total - prompt - own) + [1] * (own - half)
        rows.append(Row(token_ids=[draw.randrange(vocab) for _ in range(total)], prompt_length=prompt, loss_mask=mask))
    return rows


def plain_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: list[Row], max_tokens: int) -> float:
    """The same step in plain torch. Returns the loss."""
    optimizer.zero_grad()
    total = sum(len(row.targets) for row in rows)
    loss_sum = 0.0
    for indices in plan([row.input_length for row in rows], max_tokens):
        batch = micro_batch(rows, indices, torch.device("cpu"))
        logits = model(input_ids=batch.input_ids).logits.transpose(0, 1).flatten(0, 1)
        logprobs = torch.log_softmax(logits, -1)[batch.positions, batch.targets]
        loss = -logprobs.sum() / total
        loss.backward()
        loss_sum += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss_sum


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """(seconds by the clock, CPU seconds of all threads)."""
    started, processor = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - started, time.process_time() - processor


def peak_gib() -> float:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_storage(learner: Learner) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved, loaded = timed(lambda: learner.save(folder))[0], timed(lambda: learner.load(folder))[0]
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**30
    exported = timed(lambda: [None for _ in learner.export()])[0]
    print(
        f"checkpoint of {size:.2f} GiB: save {saved:.1f} s, load {loaded:.1f} s; export {exported:.2f} s; peak {peak_gib():.2f} GiB"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("var/data/models/policy"))
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--length", type=int, default=300, help="mean tokens of a row")
    parser.add_argument("--own", type=int, default=45, help="tokens of a row that are the model's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=1024, help="trainer.max_tokens_per_microbatch")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    options = parse()
    trainer = {"threads": options.threads, "max_tokens_per_microbatch": options.max_tokens}
    config = Config.model_validate({"trainer": trainer})
    distributed.init(config)
    started = time.perf_counter()
    learner = Learner(config, options.model)
    print(f"built and loaded in {time.perf_counter() - started:.1f} s")
    rows = make_rows(options.rows, options.length, options.own, learner.architecture.vocab)
    metrics = learner.train_step(rows, SupervisedLoss(), LEARNING_RATE)
    print(f"{metrics['tokens']:.0f} tokens a step, padding {metrics['padding']:.3f}; learner's peak {peak_gib():.2f} GiB")
    measure_storage(learner)
    compare(options, learner, rows, metrics["tokens"])
    distributed.shutdown()


def compare(options: argparse.Namespace, learner: Learner, rows: list[Row], tokens: float) -> None:
    """Rounds alternate, so that a busy machine slows both alike; the best of each counts."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    plain_step(model, optimizer, rows, options.max_tokens)
    ours, plain = [], []
    for _ in range(options.rounds):
        ours.append(timed(lambda: learner.train_step(rows, SupervisedLoss(), LEARNING_RATE)))
        plain.append(timed(lambda: plain_step(model, optimizer, rows, options.max_tokens)))
    for name, times in (("learner", ours), ("plain transformers + torch", plain)):
        print(f"{name}: {tokens / best(times)[0]:.1f} tokens/s, {tokens / best(times)[1]:.1f} tokens per CPU second")
    wall, processor = (p / o for p, o in zip(best(plain), best(ours), strict=True))
    print(f"ratio learner / plain: {wall:.2f} by the clock, {processor:.2f} by CPU seconds (steadier on a busy machine)")


def best(times: list[tuple[float, float]]) -> tuple[float, float]:
    return min(clock for clock, _ in times), min(processor for _, processor in times)


if __name__ == "__main__":
    main()
