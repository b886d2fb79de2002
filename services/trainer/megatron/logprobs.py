"""Log-probabilities of given tokens from logits that may be split over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from services.trainer.megatron import cpu

cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy  # noqa: E402


def token_logprobs(logits: Tensor, targets: Tensor, temperatures: Tensor, vocab: int) -> Tensor:
    """logits [n, padded vocab / ranks], overwritten; targets, temperatures [n] -> [n] float32, with gradient.

    Rows of the embedding that were added to make the vocabulary divisible are no tokens: they get no probability.
    """
    logits = logits.float()
    width = logits.shape[-1]
    real = vocab - parallel_state.get_tensor_model_parallel_rank() * width
    if real < width:
        logits[:, max(real, 0) :] = torch.finfo(logits.dtype).min
    if (temperatures != 1).any():
        logits = logits / temperatures.unsqueeze(1)
    return -vocab_parallel_cross_entropy(logits.unsqueeze(1), targets.unsqueeze(1)).squeeze(1)
