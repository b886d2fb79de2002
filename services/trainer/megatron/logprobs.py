"""Log-probabilities and entropies of tokens from the last hidden states, without ever holding all logits.

The output layer and the softmax are one function: logits of `chunk` tokens are made, reduced to a log-prob and an entropy
for each token, and dropped. For the gradient they are made once more, which costs a third of the output layer's work and
saves tokens × vocabulary × 4 bytes; where everything fits into one chunk it is kept instead. The vocabulary may be split
over tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from services.trainer.megatron import cpu

cpu.install()

from megatron.core import parallel_state  # noqa: E402

NO_TOKEN = -1e30
"""Logit of a padded row: probability 0, and still finite after a division by the temperature or a product with a gradient."""


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperatures: Tensor, vocab: int, chunk: int, with_entropy: bool
) -> Tensor:
    """[1, n] log-probs of `targets`, or [2, n] with the entropies in nats below them; float32, with gradient.

    hidden [n, size]; weight [padded vocab / ranks, size], this rank's rows of the output layer; targets, temperatures [n];
    vocab: the real size, rows beyond it are no tokens and get no probability; chunk: tokens whose logits are held at a time.
    With temperature T the distribution is softmax(logits / T), as the engine sampled.
    """
    return _TokenLogprobs.apply(hidden, weight, targets, temperatures, vocab, chunk, with_entropy)  # type: ignore[return-value]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperatures: Tensor, vocab: int, chunk: int, with_entropy: bool
    ) -> Tensor:
        found, normalised = [], None
        for part in _parts(len(hidden), chunk):
            normalised = _log_softmax(hidden[part], weight, temperatures[part], vocab)
            found.append(_reduce(normalised, targets[part], with_entropy))
        result = torch.cat(found, dim=1) if found else hidden.new_zeros(1 + with_entropy, 0, dtype=torch.float32)
        kept = normalised if len(found) == 1 and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, weight, targets, temperatures, result, kept)
        ctx.vocab, ctx.chunk = vocab, chunk
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, temperatures, result, kept = ctx.saved_tensors
        by_hidden, by_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for part in _parts(len(hidden), ctx.chunk):
            normalised = kept if kept is not None else _log_softmax(hidden[part], weight, temperatures[part], ctx.vocab)
            by_logits = _gradient(normalised, targets[part], result[:, part], gradients[0][:, part])
            by_logits = by_logits.div_(temperatures[part].unsqueeze(1)).to(hidden.dtype)
            torch.mm(by_logits, weight, out=by_hidden[part])
            by_weight.addmm_(by_logits.t(), hidden[part])
        if _ranks() > 1:
            dist.all_reduce(by_hidden, group=parallel_state.get_tensor_model_parallel_group())
        return by_hidden, by_weight, None, None, None, None, None


def _parts(count: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, count, chunk)]


def _ranks() -> int:
    return parallel_state.get_tensor_model_parallel_world_size()


def _log_softmax(hidden: Tensor, weight: Tensor, temperatures: Tensor, vocab: int) -> Tensor:
    """[n, size], [width, size], [n] -> this rank's part of log softmax over the whole vocabulary, [n, width] float32."""
    logits = torch.mm(hidden, weight.t()).float()
    real = vocab - parallel_state.get_tensor_model_parallel_rank() * logits.shape[1]
    if real < logits.shape[1]:
        logits[:, max(real, 0) :] = NO_TOKEN
    if (temperatures != 1).any():
        logits.div_(temperatures.unsqueeze(1))
    if _ranks() == 1:
        return logits.log_softmax(-1)
    return logits.sub_(_over_ranks(logits.logsumexp(-1)).unsqueeze(1))


def _over_ranks(logsumexp: Tensor) -> Tensor:
    """[n] of this rank's part -> [n] of the whole."""
    parts = [torch.empty_like(logsumexp) for _ in range(_ranks())]
    dist.all_gather(parts, logsumexp, group=parallel_state.get_tensor_model_parallel_group())
    return torch.stack(parts).logsumexp(0)


def _own(targets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Columns of `targets` on this rank, 0 where another rank holds them; and which ones this rank holds."""
    columns = targets - parallel_state.get_tensor_model_parallel_rank() * width
    here = (columns >= 0) & (columns < width)
    return columns.where(here, 0).unsqueeze(1), here


def _reduce(normalised: Tensor, targets: Tensor, with_entropy: bool) -> Tensor:
    """[n, width] -> [1 or 2, n]: log-prob of the target, entropy."""
    columns, here = _own(targets, normalised.shape[1])
    found = [normalised.gather(1, columns).squeeze(1).where(here, 0.0)]
    if with_entropy:
        found.append(-normalised.exp().mul_(normalised).sum(-1))
    result = torch.stack(found)
    if _ranks() > 1:
        dist.all_reduce(result, group=parallel_state.get_tensor_model_parallel_group())
    return result


def _gradient(normalised: Tensor, targets: Tensor, result: Tensor, gradient: Tensor) -> Tensor:
    """By the logits over temperature: d log p[t] = onehot(t) - p, and d H = -p · (log p + H)."""
    by_logits = normalised.exp()
    columns, here = _own(targets, normalised.shape[1])
    if len(result) == 2:
        by_logits.mul_(-(normalised + result[1].unsqueeze(1)) * gradient[1].unsqueeze(1) - gradient[0].unsqueeze(1))
    else:
        by_logits.mul_(-gradient[0].unsqueeze(1))
    return by_logits.scatter_add_(1, columns, (gradient[0] * here).unsqueeze(1))
