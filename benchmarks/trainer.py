"""One training step of the learner against plain transformers + torch: CPU seconds and memory, on the quickstart's own lengths.

    python -m benchmarks.trainer --model var/data/models/policy

| who       | what it does                                                                                             |
|-----------|----------------------------------------------------------------------------------------------------------|
| `learner` | `Learner.train_step`                                                                                     |
| `packed`  | transformers + AdamW on the learner's own micro-batches, packed; logits at the model tokens alone        |
| `padded`  | transformers + AdamW, `--padded-rows` rows a micro-batch as they come, padded to the longest, all logits |

All three take the same rows, loss, clipping and AdamW step; their losses are compared, so that none computes less. Each runs
in a process of its own, one after another, because memory is measured as the process's peak. The best of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from services.contract.config import Config
from services.trainer.megatron import distributed
from services.trainer.megatron.architecture import read_architecture
from services.trainer.megatron.batching import Row, micro_batch
from services.trainer.megatron.packing import plan

LEARNING_RATE = 1e-6
LENGTHS = Path(__file__).with_name("quickstart_rows.json")
LIMITS = {"packed": (1.10, 1.10), "padded": (1 / 1.3, 1.10)}
"""Of the learner over each baseline: CPU seconds, peak memory."""


def make_rows(every: int, vocab: int) -> list[Row]:
    """Every so many rows of a real step, with random tokens: the lengths decide the cost."""
    draw = random.Random(0)
    rows = []
    for prompt, *spans in json.loads(LENGTHS.read_text())["rows"][::every]:
        mask = [own for i, tokens in enumerate(spans) for own in [1 - i % 2] * tokens]
        token_ids = [draw.randrange(vocab) for _ in range(prompt + len(mask))]
        rows.append(Row(token_ids=token_ids, prompt_length=prompt, loss_mask=mask))
    return rows


def learner_step(options: argparse.Namespace, rows: list[Row]) -> Callable[[], float]:
    from services.trainer.megatron.learner import Learner
    from services.trainer.megatron.loss import SupervisedLoss

    trainer = {"threads": options.threads, "max_tokens_per_microbatch": options.max_tokens}
    config = Config.model_validate({"trainer": trainer})
    distributed.init(config)
    learner = Learner(config, options.model)

    def step() -> float:
        metrics = learner.train_step(rows, SupervisedLoss(), LEARNING_RATE)
        print(f"learner: padding {metrics['padding']:.1%}, {metrics['microbatches']:.0f} micro-batches", file=sys.stderr)
        return metrics["loss"]

    return step


def packed_logprobs(options: argparse.Namespace, model: Any, rows: list[Row]) -> list[Callable[[], torch.Tensor]]:
    """For each of the learner's micro-batches what gives the log-probs of its model tokens."""
    architecture = read_architecture(options.model)
    lengths = [row.input_length for row in rows]
    work = [architecture.forward_flops(row.input_length, len(row.targets)) for row in rows]

    def logprobs(indices: list[int]) -> torch.Tensor:
        batch = micro_batch(rows, indices, torch.device("cpu"))
        positions = torch.cat([torch.arange(rows[i].input_length) for i in indices])[None]
        logits = model(batch.input_ids, position_ids=positions, use_cache=False, logits_to_keep=batch.positions).logits[0]
        return logits.log_softmax(-1).gather(1, batch.targets[:, None])

    return [lambda indices=indices: logprobs(indices) for indices in plan(lengths, work, 1, options.max_tokens)[0]]


def padded_logprobs(options: argparse.Namespace, model: Any, rows: list[Row]) -> list[Callable[[], torch.Tensor]]:
    def logprobs(chosen: list[Row]) -> torch.Tensor:
        longest = max(len(row.token_ids) for row in chosen)
        padded = torch.tensor([[*row.token_ids, *[0] * (longest - len(row.token_ids))] for row in chosen])
        attended = torch.tensor([[1] * len(row.token_ids) + [0] * (longest - len(row.token_ids)) for row in chosen])
        logits = model(padded, attention_mask=attended, use_cache=False).logits[:, :-1]
        everywhere = logits.log_softmax(-1).gather(2, padded[:, 1:, None])[..., 0]
        return torch.cat([everywhere[i, [t - 1 for t in row.targets]] for i, row in enumerate(chosen)])

    step = options.padded_rows
    return [lambda chosen=rows[i : i + step]: logprobs(chosen) for i in range(0, len(rows), step)]


def plain_step(options: argparse.Namespace, rows: list[Row]) -> Callable[[], float]:
    import transformers

    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    make = packed_logprobs if options.part == "packed" else padded_logprobs
    micro_batches, total = make(options, model, rows), sum(len(row.targets) for row in rows)

    def step() -> float:
        optimizer.zero_grad()
        sums = 0.0
        for logprobs in micro_batches:
            loss = -logprobs().sum() / total
            loss.backward()
            sums += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return sums

    return step


def measure(options: argparse.Namespace) -> None:
    """In a process of its own: one step to warm up, then the rounds. Prints a line of JSON."""
    rows = make_rows(options.every, read_architecture(options.model).vocab)
    step = (learner_step if options.part == "learner" else plain_step)(options, rows)
    first = step()
    times = [timed(step) for _ in range(options.rounds)]
    best = {"wall": min(wall for wall, _ in times), "cpu": min(cpu for _, cpu in times), "gib": peak_gib(), "loss": first}
    print(json.dumps(best | {"tokens": sum(row.input_length for row in rows)}))


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """(seconds by the clock, CPU seconds of all threads)."""
    started, processor = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - started, time.process_time() - processor


def peak_gib() -> float:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_storage(options: argparse.Namespace) -> None:
    from services.trainer.megatron.learner import Learner
    from services.trainer.megatron.loss import SupervisedLoss

    config = Config.model_validate({"trainer": {"threads": options.threads}})
    distributed.init(config)
    learner = Learner(config, options.model)
    learner.train_step([Row(token_ids=[1, 2], prompt_length=1, loss_mask=[1])], SupervisedLoss(), LEARNING_RATE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved, loaded = timed(lambda: learner.save(folder))[0], timed(lambda: learner.load(folder))[0]
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**30
    exported = timed(lambda: [None for _ in learner.export()])[0]
    print(json.dumps({"size": size, "save": saved, "load": loaded, "export": exported, "gib": peak_gib()}))


def run(part: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.trainer", "--part", part, *sys.argv[1:]]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def compare() -> bool:
    """Prints the table; whether the learner is within its limits."""
    found = {part: run(part) for part in ("learner", "packed", "padded")}
    ours, good = found["learner"], True
    for part, values in found.items():
        if abs(values["loss"] - ours["loss"]) > 1e-4 * ours["loss"]:
            raise SystemExit(f"{part} computes another loss: {values['loss']} instead of {ours['loss']}")
        rates = f"{values['tokens'] / values['wall']:.0f} tokens/s, {values['tokens'] / values['cpu']:.0f} a CPU second"
        print(f"{part:8} {values['cpu']:6.1f} CPU s for {values['tokens']:.0f} tokens ({rates}), peak {values['gib']:.2f} GiB")
    for part, (time_limit, memory_limit) in LIMITS.items():
        times, memory = ours["cpu"] / found[part]["cpu"], ours["gib"] / found[part]["gib"]
        good = good and times <= time_limit and memory <= memory_limit
        print(f"learner / {part}: CPU seconds {times:.2f} × (at most {time_limit:.2f}), memory {memory:.2f} × ({memory_limit:.2f})")
    s = run("storage")
    print(f"checkpoint of {s['size']:.2f} GiB: save {s['save']:.1f} s, load {s['load']:.1f} s; export {s['export']:.2f} s")
    return good


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("var/data/models/policy"))
    parser.add_argument("--every", type=int, default=4, help="take every so many of the 64 rows")
    parser.add_argument("--padded-rows", type=int, default=8, help="rows of a micro-batch of the padded baseline")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=1024, help="trainer.max_tokens_per_microbatch")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--part", choices=["learner", "packed", "padded", "storage"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.part is None:
        sys.exit(0 if compare() else 1)
    measure_storage(options) if options.part == "storage" else measure(options)


if __name__ == "__main__":
    main()
