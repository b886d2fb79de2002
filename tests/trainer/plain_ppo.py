"""PPO once more in plain torch and float64, a rollout at a time: no packing, no masks, no shared code."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from tests.trainer.plain_torch import Optimizer, PlainCritic, response_logprobs
from tests.trainer.tiny_models import load_plain

PPO = {
    "advantage": "gae",
    "gae_gamma": 0.97,
    "gae_lambda": 0.9,
    "value_clip": 0.1,
    "clip_high": 0.2,
    "kl_coef": 0.5,
    "kl_in": "reward",
    "kl_estimator": "k1",
    "aggregate": "token_mean",
    "epochs": 2,
    "minibatches": 3,
}
RATES = [(1e-3, 4e-3), (5e-4, 2e-3)]
"""(the policy's, the critic's) of each batch."""
SEED = "0/1"

Row = dict[str, Any]


class PlainPPO:
    """Policy, critic and reference, all three begun with the model of a folder."""

    def __init__(self, folder: Path) -> None:
        self.policy, self.reference = load_plain(folder).double(), load_plain(folder).double()
        self.critic = PlainCritic(load_plain(folder)).double()
        self.policys, self.critics = Optimizer(self.policy), Optimizer(self.critic)

    def learn(self, rows: list[Row], rates: tuple[float, float]) -> dict[str, float]:
        """All optimizer steps on a batch. The figures are means over the steps, or over the tokens before the first."""
        batch = self._advantages([self._before(row) for row in rows])
        dealt = [part for epoch in range(PPO["epochs"]) for part in parts(batch, epoch)]
        values = [self.critics.step(self._value_loss(part), rates[1]) for part in dealt]
        steps = [self.policys.step(self._policy_loss(part), rates[0]) for part in dealt]
        returns, expected = (torch.cat([row[name] for row in batch]) for name in ("returns", "values"))
        return {
            "loss": fmean([s["loss"] for s in steps]),
            "grad_norm": fmean([s["grad_norm"] for s in steps]),
            "value_loss": fmean([s["loss"] for s in values]),
            "critic_grad_norm": fmean([s["grad_norm"] for s in values]),
            "returns_mean": returns.mean().item(),
            "explained_variance": 1 - ((returns - expected).var(correction=0) / returns.var(correction=0)).item(),
        }

    def _before(self, row: Row) -> Row:
        """The row with what is known of it before the first step, at its model tokens."""
        own = torch.tensor(row["loss_mask"]).bool()
        with torch.no_grad():
            old, reference = response_logprobs(self.policy, row)[own], response_logprobs(self.reference, row)[own]
            values = self.critic.values(row)[own]
        rewards = -PPO["kl_coef"] * (old - reference)
        rewards[-1] += row["reward"]
        engine = torch.tensor(row["engine_logprobs"]).double()[own]
        return row | {"own": own, "old": old, "values": values, "rewards": rewards, "engine": engine}

    def _advantages(self, rows: list[Row]) -> list[Row]:
        rows = [row | {"plain": gae(row["rewards"].tolist(), row["values"].tolist())} for row in rows]
        every = torch.cat([row["plain"] for row in rows])
        scale = (every.var() + 1e-8).sqrt()
        return [
            row | {"advantages": (row["plain"] - every.mean()) / scale, "returns": row["plain"] + row["values"]} for row in rows
        ]

    def _policy_loss(self, rows: list[Row]) -> Tensor:
        losses = []
        for row in rows:
            ratio = (response_logprobs(self.policy, row)[row["own"]] - row["old"]).exp()
            loss = -torch.minimum(ratio * row["advantages"], ratio.clamp(0.8, 1.2) * row["advantages"])
            losses.append(loss * (row["old"] - row["engine"]).exp().clamp(max=2.0))
        return torch.cat(losses).mean()

    def _value_loss(self, rows: list[Row]) -> Tensor:
        losses = []
        for row in rows:
            values, old, clip = self.critic.values(row)[row["own"]], row["values"], PPO["value_clip"]
            near = torch.minimum(torch.maximum(values, old - clip), old + clip)
            losses.append(torch.maximum((values - row["returns"]) ** 2, (near - row["returns"]) ** 2))
        return torch.cat(losses).mean()


def gae(rewards: list[float], values: list[float]) -> Tensor:
    """The sum of the discounted errors that follow, written out."""
    gamma, decay = PPO["gae_gamma"], PPO["gae_gamma"] * PPO["gae_lambda"]
    errors = [r + gamma * following - v for r, v, following in zip(rewards, values, [*values[1:], 0.0], strict=True)]
    sums = [sum(decay**k * error for k, error in enumerate(errors[t:])) for t in range(len(errors))]
    return torch.tensor(sums, dtype=torch.float64)


def parts(batch: list[Row], epoch: int) -> list[list[Row]]:
    order = random.Random(f"{SEED}/{epoch}").sample(batch, len(batch))
    size = len(batch) // PPO["minibatches"]
    return [order[start : start + size] for start in range(0, len(batch), size)]
