"""A run of PPO so small that it takes seconds: the policy writes, reads something, writes again, and is paid at the end."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from services.contract.config import Config, ObjectiveConfig
from services.trainer.learning_rate import Rates
from services.trainer.megatron.critic import Critic
from services.trainer.megatron.learner import Learner
from services.trainer.update import update
from tests.trainer.tiny_models import VOCAB, group_of, load_plain

STEPS, ROLLOUTS = 16, 24
MASK = [1, 1, 1, 0, 0, 1, 1, 1]
PAID = VOCAB // 4
"""Tokens below this are the good ones."""
OBJECTIVE = ObjectiveConfig(advantage="gae", gae_lambda=0.95, epochs=2, minibatches=2)
RATES = Rates(2e-2, 1e-2)


def toy(values: dict[str, Any], folder: Path) -> dict[str, list[float]]:
    """Mean reward of each batch; then what a fresh critic explains of the last one's returns, seeing it again and again."""
    config = Config.model_validate({"trainer": values | {"max_tokens_per_microbatch": 1024, "clip_grad": 1.0, "adam_eps": 1e-8}})
    learner = Learner(config, folder)
    critic, plain, draw = Critic(config, learner.policy), load_plain(folder), random.Random(0)
    torch.manual_seed(0)
    rewards, groups = [], []
    for step in range(STEPS):
        plain.load_state_dict(dict(learner.export()), strict=False)
        rows = play(plain, draw)
        rewards.append(sum(row["reward"] for row in rows) / ROLLOUTS)
        groups = [group_of(f"t{n}", [row]) for n, row in enumerate(rows)]
        update(learner, groups, OBJECTIVE, RATES, str(step), critic)
    critic = Critic(config, learner.policy)
    seen = [update(learner, groups, OBJECTIVE, Rates(None, 3e-3), str(step), critic) for step in range(STEPS)]
    return {"reward": rewards, "explained_variance": [figures["explained_variance"] for figures in seen]}


@torch.no_grad()
def play(model: torch.nn.Module, draw: random.Random) -> list[dict[str, Any]]:
    """Rollouts that the model sampled, each with a prompt and an observation of its own; paid by the share of good tokens."""
    tokens = torch.tensor([[draw.randrange(VOCAB) for _ in range(3)] for _ in range(ROLLOUTS)])
    logprobs = []
    for own in MASK:
        distribution = torch.distributions.Categorical(logits=model(input_ids=tokens).logits[:, -1])
        following = distribution.sample() if own else torch.tensor([draw.randrange(VOCAB) for _ in range(ROLLOUTS)])
        logprobs.append(distribution.log_prob(following) * own)
        tokens = torch.cat([tokens, following[:, None]], dim=1)
    own = torch.tensor(MASK).bool()
    paid = (tokens[:, 3:][:, own] < PAID).double().mean(1)
    columns = zip(tokens.tolist(), torch.stack(logprobs, 1).tolist(), paid.tolist(), strict=True)
    fixed = {"prompt_length": 3, "loss_mask": MASK, "temperature": 1.0}
    return [fixed | {"token_ids": ids, "engine_logprobs": sampled, "reward": reward} for ids, sampled, reward in columns]
