"""Rows of tokens to micro-batches: which rank computes which rows, in what company, and where log-probs are wanted.

A row is cut after its last model token, since nothing that follows can matter to a causal model. Rows are sorted by
length before they are put together, so padding (on the right) stays small. A row longer than the bound goes alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

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
    """Whatever else a loss asks for by name, such as `old_logprobs`: one entry per response token."""

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
    read_tokens: int
    """Tokens of the rows that the model reads, padding left out."""
    input_ids: Tensor
    """[rows, length], padded on the right with token 0."""
    positions: Tensor
    """[n] where the model tokens are predicted, in the flattened [length, rows]."""
    targets: Tensor
    """[n] the model tokens themselves."""
    temperatures: Tensor
    """[n]"""
    tokens: TokenBatch


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices for each rank, longest first to the rank with the fewest tokens; the same on every rank."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in _longest_first(lengths):
        lightest = loads.index(min(loads))
        shares[lightest].append(index)
        loads[lightest] += lengths[index]
    return shares


def plan(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Micro-batches as lists of indices: rows × longest row ≤ max_tokens, but always at least one row."""
    batches: list[list[int]] = []
    for index in _longest_first(lengths):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def micro_batch(rows: Sequence[Row], indices: Sequence[int], device: torch.device) -> MicroBatch:
    """The rows at `indices`, each with at least one model token, as tensors on `device`."""
    chosen = [rows[i] for i in indices]
    counts = [len(row.targets) for row in chosen]
    length, width = max(row.input_length for row in chosen), len(chosen)
    input_ids = torch.zeros(width, length, dtype=torch.long)
    for i, row in enumerate(chosen):
        input_ids[i, : row.input_length] = torch.tensor(row.token_ids[: row.input_length])
    return MicroBatch(
        rows=list(indices),
        counts=counts,
        read_tokens=sum(row.input_length for row in chosen),
        input_ids=input_ids.to(device),
        positions=torch.tensor([(t - 1) * width + i for i, r in enumerate(chosen) for t in r.targets], device=device),
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
    return replace(micro_batch([row], [0], device), rows=[], counts=[], read_tokens=0)


def _per_token(values: list[float], counts: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).repeat_interleave(torch.tensor(counts)).to(device)


def _required(rows: Sequence[Row], name: str, device: torch.device) -> Tensor:
    values = _at_model_tokens(rows, [row.token_values[name] for row in rows], device)
    assert values is not None
    return values


def _at_model_tokens(rows: Sequence[Row], lists: Sequence[Sequence[float] | Tensor | None], device: torch.device) -> Tensor | None:
    """[n], or None unless every row has it."""
    picked = []
    for row, values in zip(rows, lists, strict=True):
        if values is None:
            return None
        picked += [float(values[t - row.prompt_length]) for t in row.targets]
    return torch.tensor(picked, dtype=torch.float32, device=device)
