"""Rows of tokens to packed micro-batches: what the model reads, and where something is wanted from it.

Rows lie one behind another in a single sequence without padding; attention is told where each begins (`ends`). A row is cut
after its last model token, since nothing that follows can matter to a causal model. Who computes which: `packing.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rollout or demonstration. Lists other than `token_ids` have one entry per response token."""

    token_ids: Sequence[int]
    """Prompt, then response."""
    prompt_length: int
    """At least 1: the first token of all has nothing to be predicted from."""
    loss_mask: Sequence[int]
    """1 at the model's own tokens, 0 at observed ones."""
    engine_logprobs: Sequence[float] | None = None
    """What the engine said when it sampled; read at model tokens only."""
    reference_logprobs: Sequence[float] | Tensor | None = None
    advantage: float = 0.0
    weight: float = 1.0
    """Share of a supervised row relative to others."""
    temperature: float = 1.0
    """Logits are divided by it, as the engine did when it sampled."""
    token_values: Mapping[str, Sequence[float] | Tensor] = field(default_factory=dict)
    """Whatever else a loss asks for by name, such as `old_logprobs` or `returns`: one entry per response token."""

    def __post_init__(self) -> None:
        response = len(self.token_ids) - self.prompt_length
        if self.prompt_length < 1 or response < 0:
            raise ValueError(f"a row of {len(self.token_ids)} tokens cannot have prompt_length {self.prompt_length}")
        named = {name: getattr(self, name) for name in ("loss_mask", "engine_logprobs", "reference_logprobs")}
        for name, values in (named | dict(self.token_values)).items():
            if values is not None and len(values) != response:
                raise ValueError(f"{name} has {len(values)} entries for a response of {response} tokens: give one for each")
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature} is not above 0: give the one that the tokens were sampled with")

    @cached_property
    def targets(self) -> list[int]:
        """Indices into `token_ids` of the model's own tokens."""
        return [self.prompt_length + i for i, own in enumerate(self.loss_mask) if own]

    @property
    def input_length(self) -> int:
        """Tokens that the model must read: all before the last model token."""
        return self.targets[-1] if self.targets else 0


@dataclass(frozen=True)
class TokenBatch:
    """What a loss needs to know of a micro-batch's model tokens, row after row: all [n], float32 unless said."""

    advantages: Tensor
    engine_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    weights: Tensor
    rollout_tokens: Tensor
    """Model tokens of the token's row."""
    row_index: Tensor
    """int64, which of the micro-batch's rows the token is of. Rows are never cut, so sums over a row are sums over these."""
    token_values: Mapping[str, Tensor]
    """Those of `Row.token_values` that every row has."""
    entropy: Tensor | None = None
    """In nats, with gradient; only for a loss whose `wants_entropy` is true."""


@dataclass(frozen=True)
class MicroBatch:
    rows: list[int]
    """Indices into the batch, in the order of `counts`. Empty: a filler, computed only to take part."""
    counts: list[int]
    """Model tokens of each row."""
    input_ids: Tensor
    """[1, tokens], row behind row."""
    ends: Tensor
    """[rows + 1] int32: 0, then where each row ends."""
    longest: int
    """Tokens of the longest row."""
    positions: Tensor
    """[n] where in the sequence the model tokens are predicted."""
    targets: Tensor
    """[n] the model tokens themselves."""
    temperatures: Tensor
    """[n]"""
    tokens: TokenBatch


def micro_batch(rows: Sequence[Row], indices: Sequence[int], device: torch.device) -> MicroBatch:
    """The rows at `indices`, at least one and each with a model token, as tensors on `device`."""
    chosen = [rows[i] for i in indices]
    counts = [len(row.targets) for row in chosen]
    ends = [0, *accumulate(row.input_length for row in chosen)]
    positions = [start + target - 1 for start, row in zip(ends, chosen, strict=False) for target in row.targets]
    return MicroBatch(
        rows=list(indices),
        counts=counts,
        input_ids=torch.tensor([[token for row in chosen for token in row.token_ids[: row.input_length]]], device=device),
        ends=torch.tensor(ends, dtype=torch.int32, device=device),
        longest=max(row.input_length for row in chosen),
        positions=torch.tensor(positions, device=device),
        targets=torch.tensor([row.token_ids[t] for row in chosen for t in row.targets], device=device),
        temperatures=_per_token([row.temperature for row in chosen], counts, device),
        tokens=_token_batch(chosen, counts, device),
    )


def _token_batch(rows: Sequence[Row], counts: list[int], device: torch.device) -> TokenBatch:
    shared = set(rows[0].token_values).intersection(*(row.token_values for row in rows))
    return TokenBatch(
        advantages=_per_token([row.advantage for row in rows], counts, device),
        engine_logprobs=_at_model_tokens(rows, [row.engine_logprobs for row in rows], device),
        reference_logprobs=_at_model_tokens(rows, [row.reference_logprobs for row in rows], device),
        weights=_per_token([row.weight for row in rows], counts, device),
        rollout_tokens=_per_token([float(c) for c in counts], counts, device),
        row_index=torch.arange(len(rows)).repeat_interleave(torch.tensor(counts)).to(device),
        token_values={name: _required(rows, name, device) for name in sorted(shared)},
    )


def filler(device: torch.device) -> MicroBatch:
    """For a rank that got no row: it must still take part in the schedule, and its result counts for nothing."""
    row = Row(token_ids=[0, 0], prompt_length=1, loss_mask=[1])
    return replace(micro_batch([row], [0], device), rows=[], counts=[])


def _required(rows: Sequence[Row], name: str, device: torch.device) -> Tensor:
    values = _at_model_tokens(rows, [row.token_values[name] for row in rows], device)
    assert values is not None
    return values


def _per_token(values: list[float], counts: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).repeat_interleave(torch.tensor(counts)).to(device)


def _at_model_tokens(rows: Sequence[Row], lists: Sequence[Sequence[float] | Tensor | None], device: torch.device) -> Tensor | None:
    """[n], or None unless every row has it."""
    picked = []
    for row, values in zip(rows, lists, strict=True):
        if values is None:
            return None
        picked += [float(values[t - row.prompt_length]) for t in row.targets]
    return torch.tensor(picked, dtype=torch.float32, device=device)
