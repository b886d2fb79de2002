"""What a rank of the tests does with the learner's options, its last layer and bad input; each is called on every rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file

from services.contract.config import Config, ObjectiveConfig
from services.trainer.megatron.architecture import UnsupportedModelError
from services.trainer.megatron.batching import Row
from services.trainer.megatron.layers import layer_spec
from services.trainer.megatron.learner import Learner
from services.trainer.megatron.logprobs import token_logprobs
from services.trainer.megatron.loss import Loss, PolicyLoss, SupervisedLoss
from services.trainer.megatron.names import name_map
from tests.trainer.learner_reports import fresh_folder, same, train, weights
from tests.trainer.plain_torch import HEAD_VOCAB, head_case, saved_bytes
from tests.trainer.tiny_models import load_plain


class EveryRow(PolicyLoss):
    """Computes rows without advantage too, to compare with leaving them out."""

    def contributes(self, row: Row) -> bool:
        return True


def invariance(values: dict[str, Any], folder: Path, rows: list[Row]) -> dict[str, Any]:
    """The first step under different micro-batch sizes and with and without leaving rows out."""

    def first_step(max_tokens: int, loss: Loss, given: list[Row] = rows) -> dict[str, float]:
        config = Config.model_validate({"trainer": values | {"max_tokens_per_microbatch": max_tokens}})
        return Learner(config, folder).train_step(given, loss, 1e-3)

    grpo, no_signal = PolicyLoss(ObjectiveConfig()), [changed(row, advantage=0.0) for row in rows]
    return {
        "rollout_mean": {n: first_step(n, grpo) for n in (8, 64, 4096)},
        "every_row": first_step(64, EveryRow(ObjectiveConfig())),
        "token_mean": {
            n: first_step(n, PolicyLoss(ObjectiveConfig(aggregate="token_mean", importance="icepop"))) for n in (8, 4096)
        },
        "no_signal": first_step(64, grpo, no_signal),
        "one_row": first_step(64, grpo, rows[:1]),
    }


def options(values: dict[str, Any], folder: Path, rows: list[Row], scratch: Path) -> dict[str, Any]:
    """The same training under every option that may change its memory but not its result; and in half precision."""
    found = {}
    for option in ("logits_chunk_mib", "recompute_activations", "offload_optimizer", "offload_reference"):
        config = Config.model_validate({"trainer": values | {option: 1}})
        found[option] = trained(config, folder, rows)
    return found | {
        "none": trained(Config.model_validate({"trainer": values}), folder, rows),
        "half": half(values, folder, rows, scratch),
    }


def trained(config: Config, folder: Path, rows: list[Row]) -> dict[str, Any]:
    learner = Learner(config, folder)
    learner.set_reference(folder)
    kept: list[int] = []
    with saved_bytes(kept):
        steps = train(learner, rows, SupervisedLoss())
    return {
        "norms": [step["grad_norm"] for step in steps],
        "kept": sum(kept),
        "weights": weights(learner),
        "reference": learner.reference_logprobs(rows),
    }


def half(values: dict[str, Any], folder: Path, rows: list[Row], scratch: Path) -> dict[str, Any]:
    """bfloat16: how it moves under updates smaller than its spacing, and whether it resumes to the bit."""
    config = Config.model_validate({"trainer": values | {"dtype": "bfloat16"}})
    learner = Learner(config, folder)
    report: dict[str, Any] = {"start": weights(learner), "logprobs": learner.logprobs(rows)}
    exact = Learner(Config.model_validate({"trainer": values}), folder)
    for _ in range(12):
        learner.train_step(rows, SupervisedLoss(), 5e-5)
        exact.train_step(rows, SupervisedLoss(), 5e-5)
    report |= {"moved": weights(learner), "exact": weights(exact)}
    checkpoint = fresh_folder(scratch / "half-checkpoint")
    learner.save(checkpoint)
    fresh = Learner(config, folder)
    fresh.load(checkpoint)
    for each in (learner, fresh):
        train(each, rows, SupervisedLoss())
    return report | {"resumed_equal": same(weights(learner), weights(fresh))}


def head() -> dict[str, Any]:
    """Log-probs, entropies and gradients of the last layer by chunk size, from a fixed case; the weight's gradient is whole."""
    found = {}
    for chunk in (1, 3, 1000):
        case = head_case()
        ranks, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
        width = -(-HEAD_VOCAB // ranks)
        padded = torch.nn.functional.pad(case["weight"], (0, 0, 0, width * ranks - HEAD_VOCAB))
        hidden, weight = case["hidden"].requires_grad_(), padded.chunk(ranks)[rank].clone().requires_grad_()
        result = token_logprobs(hidden, weight, case["targets"], case["temperatures"], HEAD_VOCAB, chunk, True)
        (result * case["coefficients"]).sum().backward()
        parts = [torch.empty_like(weight) for _ in range(ranks)]
        dist.all_gather(parts, weight.grad, group=parallel_state.get_tensor_model_parallel_group())
        found[chunk] = [result.detach(), hidden.grad, torch.cat(parts)[:HEAD_VOCAB]]
    return found


def errors(config: Config, folder: Path, rows: list[Row], scratch: Path) -> dict[str, str]:
    """What the learner says to what it cannot use, after checking that it changed nothing."""
    learner = Learner(config, folder)
    before = weights(learner)
    said = {
        "loss": refusal(lambda: learner.train_step([changed(row, weight=float("nan")) for row in rows], SupervisedLoss(), 1e-3)),
        "token": refusal(lambda: learner.logprobs([Row(token_ids=[1, 259], prompt_length=1, loss_mask=[1])])),
    }
    if not same(before, weights(learner)):
        said["loss"] = "the weights have changed"
    return said | _files_refused(config, folder, scratch, learner) | _model_refused(learner, folder)


def _files_refused(config: Config, folder: Path, scratch: Path, learner: Learner) -> dict[str, str]:
    broken, full = scratch / "broken", fresh_folder(scratch / "full")
    shutil.copytree(folder, broken)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors")
    usage, shutil.disk_usage = shutil.disk_usage, lambda _: type("Usage", (), {"free": 1000})()
    try:
        disk = refusal(lambda: learner.save(full))
    finally:
        shutil.disk_usage = usage
    return {
        "weights": refusal(lambda: Learner(config, broken)),
        "disk": disk if not list(full.iterdir()) else "something was written",
        "checkpoint": refusal(lambda: learner.load(full)),
    }


def _model_refused(learner: Learner, folder: Path) -> dict[str, str]:
    fused = name_map(learner.architecture, fused_norms())
    learner.policy.stranger = torch.nn.Parameter(torch.zeros(1))
    beside = load_plain(folder)  # transformers compares torch's factories by identity
    return {
        "name": refusal(lambda: name_map(learner.architecture, learner.policy)),
        "engine": refusal(lambda: layer_spec(learner.architecture, transformer_engine=True)),
        "fused": ", ".join(name for names, _ in fused.values() for name in names),
        "beside": "loaded" if not any(p.is_meta for p in beside.parameters()) else "on meta",
    }


def fused_norms() -> torch.nn.Module:
    """Stands in for a layer of Transformer Engine's, which needs a GPU: only the names of the two norms are its."""
    layer = torch.nn.Module()
    layer.layer_number = 3
    for path in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        outer, inner = path.split(".")
        setattr(layer, outer, torch.nn.Module())
        setattr(getattr(layer, outer), inner, torch.nn.Module())
        getattr(getattr(layer, outer), inner).layer_norm_weight = torch.nn.Parameter(torch.zeros(1))
    model = torch.nn.Module()
    model.decoder = torch.nn.Module()
    model.decoder.layers = torch.nn.ModuleList([layer])
    return model


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except (FloatingPointError, ValueError, KeyError, OSError, UnsupportedModelError) as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - told with its kind, so that the test sees it
        return f"{type(error).__name__}: {error}"
    return "accepted"


def changed(row: Row, **changes: Any) -> Row:
    """A copy without cached values."""
    return Row(**{name: getattr(row, name) for name in Row.__dataclass_fields__} | changes)
