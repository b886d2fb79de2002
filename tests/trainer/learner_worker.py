"""One rank of the learner's tests: does everything that a layout is tested for, and rank 0 writes down what came out.

    RANK=0 WORLD_SIZE=2 … python -m tests.trainer.learner_worker JOB RESULT

Run as a process of its own, so that Megatron and what a CPU needs for it never enter the test process.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from services.contract.config import Config, ObjectiveConfig  # noqa: E402
from services.trainer.megatron import distributed  # noqa: E402
from services.trainer.megatron.architecture import UnsupportedModelError  # noqa: E402
from services.trainer.megatron.batching import Row, micro_batch  # noqa: E402
from services.trainer.megatron.learner import Learner  # noqa: E402
from services.trainer.megatron.logprobs import token_logprobs  # noqa: E402
from services.trainer.megatron.loss import Loss, PolicyLoss, SupervisedLoss  # noqa: E402
from tests.trainer.plain_torch import LEARNING_RATES, TRAINER  # noqa: E402


class EveryRow(PolicyLoss):
    """Computes rows without advantage too, to compare with leaving them out."""

    def contributes(self, row: Row) -> bool:
        return True


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.export()}


def train(learner: Learner, rows: list[Row], loss: Loss) -> list[dict[str, float]]:
    return [learner.train_step(rows, loss, rate) for rate in LEARNING_RATES]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def model_report(config: Config, folder: Path, rows: list[Row]) -> dict[str, Any]:
    """What is compared with plain torch."""
    learner = Learner(config, folder)
    report: dict[str, Any] = {"loaded": weights(learner), "logprobs": learner.logprobs(rows)}
    report["grpo"] = train(learner, rows, PolicyLoss(ObjectiveConfig(kl_coef=0.3, kl_estimator="k3")))
    report["grpo_weights"] = weights(learner)
    report["trained_logprobs"] = learner.logprobs(rows)
    learner.set_reference(folder)
    report["reference_logprobs"] = learner.reference_logprobs(rows)
    learner = Learner(config, folder)
    report["supervised"] = train(learner, rows, SupervisedLoss())
    report["supervised_weights"] = weights(learner)
    return report


def resume_report(config: Config, folder: Path, rows: list[Row], scratch: Path) -> dict[str, Any]:
    """Save in the middle, go on; load into a fresh learner (and into a used one), go on: must be the same to the bit."""
    checkpoint = (
        scratch / f"{folder.name}-{dist.get_world_size()}-{config.trainer.tensor_parallel}-{config.trainer.pipeline_parallel}"
    )
    if dist.get_rank() == 0:
        checkpoint.mkdir()
    dist.barrier()
    first, loss = Learner(config, folder), SupervisedLoss()
    for rate in LEARNING_RATES[:2]:
        first.train_step(rows, loss, rate)
    first.save(checkpoint)
    drawn = torch.rand(3)
    ahead = [first.train_step(rows, loss, rate) for rate in LEARNING_RATES]
    fresh = Learner(config, folder)
    fresh.load(checkpoint)
    drawn_again = torch.rand(3)
    again = [fresh.train_step(rows, loss, rate) for rate in LEARNING_RATES]
    after = weights(fresh)
    first.load(checkpoint)
    rewound = [first.train_step(rows, loss, rate) for rate in LEARNING_RATES]
    return {
        "norms": [[m["grad_norm"] for m in steps] for steps in (ahead, again, rewound)],
        "fresh_equal": same(after, weights(first)),
        "random_equal": torch.equal(drawn, drawn_again),
        "checkpoint": str(checkpoint),
    }


def cross_report(config: Config, folder: Path, rows: list[Row], checkpoint: Path) -> dict[str, Any]:
    """Load what another layout saved, and go on from there."""
    learner = Learner(config, folder)
    learner.load(checkpoint)
    return {"norms": [step["grad_norm"] for step in train(learner, rows, SupervisedLoss())]}


def invariance_report(values: dict[str, Any], folder: Path, rows: list[Row]) -> dict[str, Any]:
    """Gradient norm of the first step under different micro-batch sizes and with and without leaving rows out."""

    def first_step(max_tokens: int, loss: Loss, given: list[Row] = rows) -> dict[str, float]:
        config = Config.model_validate({"trainer": values | {"max_tokens_per_microbatch": max_tokens}})
        return Learner(config, folder).train_step(given, loss, 1e-3)

    grpo, no_signal = PolicyLoss(ObjectiveConfig()), [Row(**{**vars(row), "advantage": 0.0}) for row in map(plain_row, rows)]
    return {
        "rollout_mean": {n: first_step(n, grpo) for n in (8, 64, 4096)},
        "every_row": first_step(64, EveryRow(ObjectiveConfig())),
        "token_mean": {
            n: first_step(n, PolicyLoss(ObjectiveConfig(aggregate="token_mean", importance="icepop"))) for n in (8, 4096)
        },
        "no_signal": first_step(64, grpo, no_signal),
        "one_row": first_step(64, grpo, rows[:1]),
    }


def error_report(config: Config, folder: Path, rows: list[Row], scratch: Path) -> dict[str, str]:
    """What the learner says to a loss that is not finite (and that it then kept the weights), and to missing weights."""
    learner = Learner(config, folder)
    before = weights(learner)
    said = {}
    try:
        learner.train_step([Row(**{**vars(plain_row(row)), "weight": float("nan")}) for row in rows], SupervisedLoss(), 1e-3)
    except FloatingPointError as error:
        said["loss"] = str(error) if same(before, weights(learner)) else "the weights have changed"
    shutil.copytree(folder, scratch / "broken")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, scratch / "broken" / "model.safetensors")
    try:
        Learner(config, scratch / "broken")
    except UnsupportedModelError as error:
        said["weights"] = str(error)
    return said


def plain_row(row: Row) -> Row:
    """A copy without cached values."""
    return Row(**{name: getattr(row, name) for name in Row.__dataclass_fields__})


def selection_report(config: Config, folder: Path, rows: list[Row]) -> float:
    """Largest difference between log-probs from selected logits and from logits everywhere."""
    learner = Learner(config, folder)
    batch = micro_batch(rows, range(len(rows)), torch.device("cpu"))
    found = []
    with torch.no_grad():
        for positions in (None, batch.positions):
            learner.policy.positions = positions
            logits = learner.policy(batch.input_ids, None, None)[0 if positions is not None else slice(None)]
            if positions is None:
                logits = logits.transpose(0, 1).reshape(-1, logits.shape[-1])[batch.positions]
            found.append(token_logprobs(logits, batch.targets, batch.temperatures, learner.architecture.vocab))
    return float((found[0] - found[1]).abs().max())


def main() -> None:
    job: dict[str, Any] = torch.load(sys.argv[1], weights_only=False)
    values = {"threads": 1, "max_tokens_per_microbatch": 64, **TRAINER, **job["trainer"]}
    config = Config.model_validate({"trainer": values})
    distributed.init(config)
    rows = [Row(**row) for row in job["rows"]]
    result: dict[str, Any] = {"models": {}, "resume": {}}
    for folder in job["models"]:
        result["models"][folder.name] = model_report(config, folder, rows)
        result["resume"][folder.name] = resume_report(config, folder, rows, job["scratch"])
    if job.get("invariance"):
        result["invariance"] = invariance_report(values, job["models"][0], rows)
    if job.get("selection"):
        result["selection"] = selection_report(config, job["models"][0], rows)
    if dist.get_world_size() == 1:
        result["errors"] = error_report(config, job["models"][0], rows, job["scratch"])
    if job.get("foreign_checkpoint"):
        result["cross"] = cross_report(config, job["models"][0], rows, job["foreign_checkpoint"])
    if dist.get_rank() == 0:
        torch.save(result, sys.argv[2])
    distributed.shutdown()


if __name__ == "__main__":
    main()
