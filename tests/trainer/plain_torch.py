"""The learner's mathematics once more in plain torch, a row at a time: no padding, no micro-batches, no shared code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TRAINER = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "clip_grad": 0.5}
LEARNING_RATES = [1e-3, 5e-4, 2e-3]


def response_logprobs(model: torch.nn.Module, row: dict[str, Any]) -> Tensor:
    """[response length], where the mask is 0 too."""
    tokens = torch.tensor(row["token_ids"])
    logits = model(input_ids=tokens[None]).logits[0, :-1] / row["temperature"]
    return torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[row["prompt_length"] - 1 :, 0]


def grpo(model: torch.nn.Module, rows: list[dict[str, Any]], kl_coef: float) -> Tensor:
    """Mean over rollouts of the mean over model tokens: -A · min(train/engine, 2) · ratio + kl_coef · k3."""
    loss = torch.zeros(())
    for row in rows:
        mask = torch.tensor(row["loss_mask"]).bool()
        logprobs = response_logprobs(model, row)[mask]
        weight = (logprobs.detach() - torch.tensor(row["engine_logprobs"])[mask]).exp().clamp(max=2.0)
        ratio = (logprobs - logprobs.detach()).exp()
        gap = torch.tensor(row["reference_logprobs"])[mask] - logprobs
        per_token = -row["advantage"] * weight * ratio + kl_coef * (gap.exp() - 1 - gap)
        loss = loss + per_token.mean() / len(rows)
    return loss


def supervised(model: torch.nn.Module, rows: list[dict[str, Any]]) -> Tensor:
    total, weights = torch.zeros(()), 0.0
    for row in rows:
        mask = torch.tensor(row["loss_mask"]).bool()
        total = total - row["weight"] * response_logprobs(model, row)[mask].sum()
        weights += row["weight"] * int(mask.sum())
    return total / weights


def train(model: torch.nn.Module, make_loss: Any) -> list[dict[str, float]]:
    """A clipped AdamW step for each learning rate; norms and biases do not decay."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decayed}, {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    betas = (TRAINER["beta1"], TRAINER["beta2"])
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=1e-8, weight_decay=TRAINER["weight_decay"])
    steps = []
    for learning_rate in LEARNING_RATES:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.zero_grad()
        loss = make_loss(model)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINER["clip_grad"])
        optimizer.step()
        steps.append({"loss": loss.item(), "grad_norm": norm.item()})
    return steps
