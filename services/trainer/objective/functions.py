"""The advantage and the loss that a run names: one of ours, or a function of one's own, tried out before the run starts.

A function of one's own is written `module:function` in the configuration and has the very shape of ours:

    advantage(batch: RolloutBatch, o: ObjectiveConfig) -> list[Tensor]           (advantages.py)
    loss(tokens: PolicyTokens, o: ObjectiveConfig) -> tuple[Tensor, Tensor]      (losses.py)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from services.contract.config import ConfigError, ObjectiveConfig
from services.trainer.objective.advantages import ADVANTAGES, AdvantageFunction, RolloutBatch
from services.trainer.objective.losses import LOSSES, PolicyTokens, TokenLoss


def advantage_function(o: ObjectiveConfig) -> AdvantageFunction:
    """Raises ConfigError when the function cannot be had."""
    return ADVANTAGES.get(o.advantage) or _load("trainer.objective.advantage", o.advantage)


def loss_function(o: ObjectiveConfig) -> TokenLoss:
    """Raises ConfigError when the function cannot be had."""
    return LOSSES.get(o.loss) or _load("trainer.objective.loss", o.loss)


def advantages_of(batch: RolloutBatch, o: ObjectiveConfig) -> list[Tensor]:
    """The batch's advantages. Raises ValueError naming the function when they have not the shape or are not finite."""
    found = advantage_function(o)(batch, o)
    if len(found) != len(batch.masks):
        raise ValueError(
            f'advantage "{o.advantage}" returned {len(found)} tensors for {len(batch.masks)} rollouts: give one for each'
        )
    for mask, values in zip(batch.masks, found, strict=True):
        if values.dim() and values.shape != mask.shape:
            raise ValueError(
                f'advantage "{o.advantage}" returned shape {tuple(values.shape)} for a response of {len(mask)} tokens: '
                "give a scalar or one value a response token"
            )
        if not (values[mask] if values.dim() else values).isfinite().all():
            raise ValueError(f'advantage "{o.advantage}" returned a value that is not finite')
    return found


def token_losses(function: TokenLoss, tokens: PolicyTokens, o: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """(loss, clipped), both [n]. Raises ValueError naming the function when they have not the shape."""
    loss, clipped = function(tokens, o)
    if loss.shape != tokens.logprobs.shape or clipped.shape != loss.shape:
        raise ValueError(
            f'loss "{o.loss}" returned shapes {tuple(loss.shape)} and {tuple(clipped.shape)} for {len(tokens.logprobs)} tokens: '
            "give two tensors with one value a token"
        )
    return loss, clipped


def check_functions(o: ObjectiveConfig) -> None:
    """Try both functions on a small batch. Raises ConfigError with the key: better now than after the warm start."""
    masks = [torch.tensor(mask) for mask in ([True, False, True], [True], [True, True], [True, False])]
    kl = [0.1 * mask.double() for mask in masks] if o.kl_in_reward else None
    values = [0.5 * mask.double() for mask in masks]
    batch = RolloutBatch(torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64), masks, kl, values)
    _try("trainer.objective.advantage", o.advantage, lambda: advantages_of(batch, o))
    logprobs = torch.tensor([-0.5, -1.0, -2.0], requires_grad=True)
    tokens = PolicyTokens(logprobs, logprobs.detach() - 0.1, torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0, 0, 1]))
    _try("trainer.objective.loss", o.loss, lambda: token_losses(loss_function(o), tokens, o)[0].sum().backward())


def _load(key: str, name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(f'{key} = "{name}": {error}; put the folder of {module} on PYTHONPATH, or correct the name') from error
    except AttributeError:
        raise ConfigError(f'{key} = "{name}": module {module} has no {attribute}; correct the name') from None
    if not callable(function):
        raise ConfigError(f'{key} = "{name}" is not a function; name one')
    return function


def _try(key: str, name: str, work: Callable[[], object]) -> None:
    try:
        work()
    except ConfigError:
        raise
    except Exception as error:  # it is the user's function
        raise ConfigError(
            f'{key} = "{name}" fails on a small example: {type(error).__name__}: {error}; mend the function'
        ) from error
