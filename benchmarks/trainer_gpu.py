"""Training steps of Qwen2.5's shapes on a GPU against plain transformers: tokens/s, model FLOP utilisation, memory.

    python -m benchmarks.trainer_gpu --shape qwen2.5-0.5b
    python -m benchmarks.trainer_gpu --shape tiny --device cpu --rows 4     that it runs; its figures mean nothing

| who       | what it does                                                                                                   |
|-----------|----------------------------------------------------------------------------------------------------------------|
| `learner` | `Learner.train_step` in bfloat16 with float32 originals: micro-batches of `--tokens`, flash attention, packed   |
| `plain`   | transformers in bfloat16 with SDPA, one row of `--tokens` a forward, AdamW on the bfloat16 weights, all logits  |

Weights are random, rows are `--tokens` long, and the model is trained on the last three quarters of each. With shorter rows
(`--row-tokens`) the learner packs, while the baseline takes them one by one. Utilisation is three forward passes' worth of
`Architecture.forward_flops`, over the time, over `--peak-tflops`. Each runs in a process of its own. **Not run on a GPU yet.**
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from services.contract.config import Config
from services.trainer.megatron import distributed
from services.trainer.megatron.architecture import read_architecture
from services.trainer.megatron.batching import Row

SHAPES = {
    "qwen2.5-0.5b": {"hidden": 896, "ffn": 4864, "layers": 24, "heads": 14, "kv_heads": 2, "vocab": 151936},
    "qwen2.5-1.5b": {"hidden": 1536, "ffn": 8960, "layers": 28, "heads": 12, "kv_heads": 2, "vocab": 151936},
    "tiny": {"hidden": 64, "ffn": 128, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 512},
}
LEARNING_RATE = 1e-6
WARM_UP = 2
H200_BF16_TFLOPS = 989.0
"""NVIDIA's figure for dense bfloat16 products, which no real product reaches."""


def write_model(shape: str, folder: Path) -> None:
    """A Hugging Face folder with random weights of the shape, its embeddings tied as the small Qwen2.5's are."""
    import transformers

    size = SHAPES[shape]
    config = transformers.Qwen2Config(
        hidden_size=size["hidden"],
        intermediate_size=size["ffn"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        vocab_size=size["vocab"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config)
    model.bfloat16().save_pretrained(folder)


def make_rows(options: argparse.Namespace) -> list[Row]:
    draw = torch.Generator().manual_seed(0)
    prompt = options.row_tokens // 4
    return [
        Row(
            token_ids=torch.randint(SHAPES[options.shape]["vocab"], (options.row_tokens + 1,), generator=draw).tolist(),
            prompt_length=prompt,
            loss_mask=[1] * (options.row_tokens + 1 - prompt),
        )
        for _ in range(options.rows * options.tokens // options.row_tokens)
    ]


def learner_step(options: argparse.Namespace, model: Path, rows: list[Row]) -> Callable[[], object]:
    from services.trainer.megatron.learner import Learner
    from services.trainer.megatron.loss import SupervisedLoss

    trainer = {"device": options.device, "dtype": "bfloat16", "max_tokens_per_microbatch": options.tokens}
    config = Config.model_validate({"trainer": trainer})
    distributed.init(config)
    learner = Learner(config, model)
    return lambda: learner.train_step(rows, SupervisedLoss(), LEARNING_RATE)


def plain_step(options: argparse.Namespace, model: Path, rows: list[Row]) -> Callable[[], object]:
    import transformers

    policy = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa")
    policy.to(options.device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, fused=True)
    total = sum(len(row.targets) for row in rows)

    def step() -> None:
        optimizer.zero_grad()
        for row in rows:
            ids = torch.tensor([row.token_ids], device=options.device)
            logits = policy(ids, use_cache=False).logits[0, row.prompt_length - 1 : -1].float()
            (torch.nn.functional.cross_entropy(logits, ids[0, row.prompt_length :], reduction="sum") / total).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()

    return step


def measure(options: argparse.Namespace) -> None:
    """In a process of its own: two steps to warm up, then the rounds. Prints a line of JSON."""
    with tempfile.TemporaryDirectory() as name:
        write_model(options.shape, Path(name))
        architecture, rows = read_architecture(Path(name)), make_rows(options)
        step = (learner_step if options.part == "learner" else plain_step)(options, Path(name), rows)
    for _ in range(WARM_UP):
        step()
    seconds = min(timed(step, options.device) for _ in range(options.rounds))
    flops = 3 * sum(architecture.forward_flops(row.input_length, len(row.targets)) for row in rows)
    tokens = sum(row.input_length for row in rows)
    rates = {"tokens_s": tokens / seconds, "mfu": flops / seconds / options.peak_tflops / 1e12}
    print(json.dumps(rates | {"gib": peak_gib(options.device)}))


def timed(action: Callable[[], object], device: str) -> float:
    """Seconds, until the GPU has done it too."""
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run(part: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.trainer_gpu", "--part", part, *sys.argv[1:]]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def compare() -> None:
    found = {part: run(part) for part in ("learner", "plain")}
    for part, values in found.items():
        print(f"{part:8} {values['tokens_s']:9.0f} tokens/s   MFU {values['mfu']:6.1%}   peak {values['gib']:6.2f} GiB")
    ours, plain = found["learner"], found["plain"]
    print(f"learner / plain: tokens/s {ours['tokens_s'] / plain['tokens_s']:.2f} ×, memory {ours['gib'] / plain['gib']:.2f} ×")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rows", type=int, default=16, help="micro-batches' worth of rows in a step")
    parser.add_argument("--tokens", type=int, default=4096, help="trainer.max_tokens_per_microbatch")
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, default=H200_BF16_TFLOPS)
    parser.add_argument("--part", choices=["learner", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    measure(options) if options.part else compare()


if __name__ == "__main__":
    main()
