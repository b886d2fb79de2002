"""The learner's mathematics once more in plain torch, a row at a time: no padding, no micro-batches, no shared code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TRAINER = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "adam_eps": 1e-4, "clip_grad": 0.5}
"""With the usual epsilon Adam takes a full step where the true gradient is 0, and rounding decides which way."""
LEARNING_RATES = [1e-3, 5e-4, 2e-3]
ENTROPY_BONUS = 0.2
HEAD_VOCAB, HEAD_SIZE, HEAD_TOKENS = 259, 16, 7


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


def entropy_bonus(model: torch.nn.Module, rows: list[dict[str, Any]]) -> Tensor:
    """Mean over the batch's model tokens of -(log-prob + bonus · entropy)."""
    total, count = torch.zeros(()), 0
    for row in rows:
        mask, tokens = torch.tensor(row["loss_mask"]).bool(), torch.tensor(row["token_ids"])
        logits = model(input_ids=tokens[None]).logits[0, row["prompt_length"] - 1 : -1][mask] / row["temperature"]
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        total = total - (response_logprobs(model, row)[mask] + ENTROPY_BONUS * entropy).sum()
        count += int(mask.sum())
    return total / count


class PlainCritic(torch.nn.Module):
    """transformers' layers with a head of zeros on the last hidden state."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.model
        self.score = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
        torch.nn.init.zeros_(self.score.weight)

    def values(self, row: dict[str, Any]) -> Tensor:
        """[response length]"""
        hidden = self.model(input_ids=torch.tensor(row["token_ids"])[None]).last_hidden_state[0]
        return self.score(hidden)[row["prompt_length"] - 1 : -1, 0]


def head_case() -> dict[str, Tensor]:
    """Hidden states and weights of a last layer, what is asked of it, and the coefficients of the gradient [2, n]."""
    draw = torch.Generator().manual_seed(3)
    return {
        "hidden": torch.randn(HEAD_TOKENS, HEAD_SIZE, generator=draw),
        "weight": torch.randn(HEAD_VOCAB, HEAD_SIZE, generator=draw),
        "targets": torch.tensor([0, 258, 129, 130, 5, 200, 7]),
        "temperatures": torch.tensor([1.0, 0.7, 1.0, 1.3, 1.0, 1.0, 0.5]),
        "coefficients": torch.randn(2, HEAD_TOKENS, generator=draw),
    }


def head_expected() -> list[Tensor]:
    """Of `head_case` in float64: [2, n] log-probs and entropies, and the gradients by hidden states and weight."""
    case = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in head_case().items()}
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    choice = torch.distributions.Categorical(logits=hidden @ weight.t() / case["temperatures"][:, None])
    result = torch.stack([choice.log_prob(case["targets"]), choice.entropy()])
    (result * case["coefficients"]).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return [result.detach(), hidden.grad, weight.grad]


@contextmanager
def saved_bytes(found: list[int]) -> Iterator[None]:
    """Appends the bytes of each tensor that autograd keeps in a forward pass; recomputation runs in the backward one."""

    def pack(tensor: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() == -1:
            found.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


class Optimizer:
    """Clipped AdamW steps; norms and biases do not decay."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        decayed = [p for p in model.parameters() if p.dim() > 1]
        groups = [{"params": decayed}, {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
        betas = (TRAINER["beta1"], TRAINER["beta2"])
        self.adamw = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=TRAINER["adam_eps"], weight_decay=TRAINER["weight_decay"])

    def step(self, loss: Tensor, learning_rate: float) -> dict[str, float]:
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), TRAINER["clip_grad"])
        self.adamw.step()
        return {"loss": loss.item(), "grad_norm": norm.item()}


def train(model: torch.nn.Module, make_loss: Any) -> list[dict[str, float]]:
    """A step for each learning rate."""
    optimizer = Optimizer(model)
    return [optimizer.step(make_loss(model), learning_rate) for learning_rate in LEARNING_RATES]
