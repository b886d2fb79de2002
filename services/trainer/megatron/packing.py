"""Which rank computes which rows, and in what company: lists of indices, no tensors.

| decided by         | rule                                                                                                |
|--------------------|-----------------------------------------------------------------------------------------------------|
| rank               | the row with most work left goes to the rank with least work                                        |
| micro-batches      | as few as hold every rank's rows within `max_tokens` (first fit, longest first)                     |
| micro-batch of row | the one with least work that has room, so that none is much larger than it must be                  |

Work is not tokens: attention grows with the square of a row's length, and the output layer runs at model tokens alone
(`Architecture.forward_flops`). Every rank computes the same plan, so nobody has to be asked.
"""

from __future__ import annotations

from collections.abc import Sequence

Indices = list[int]


def plan(tokens: Sequence[int], work: Sequence[float], ranks: int, max_tokens: int) -> list[list[Indices]]:
    """plan[rank][micro-batch] = indices of rows. Every rank has as many micro-batches, at least one; some may be empty.

    Rows of a micro-batch have at most `max_tokens` tokens together; a longer row goes alone.
    """
    shares = deal(work, ranks)
    count = max(1, *(len(_first_fit(tokens, share, max_tokens)) for share in shares))
    return [_spread(tokens, work, share, max_tokens, count) for share in shares]


def deal(work: Sequence[float], ranks: int) -> list[Indices]:
    """Indices for each rank, most work first to the rank with the least."""
    shares: list[Indices] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for index in _most_first(work, range(len(work))):
        lightest = loads.index(min(loads))
        shares[lightest].append(index)
        loads[lightest] += work[index]
    return shares


def imbalance(work: Sequence[float], shares: Sequence[Indices]) -> float:
    """Work of the busiest share over the mean of all: 1 is perfect, and what the others wait for is the rest."""
    loads = [sum(work[i] for i in share) for share in shares]
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def _first_fit(tokens: Sequence[int], share: Indices, max_tokens: int) -> list[Indices]:
    """Longest first into the first micro-batch with room (first-fit decreasing)."""
    batches: list[Indices] = []
    room: list[int] = []
    for index in _most_first(tokens, share):
        slot = next((i for i, free in enumerate(room) if free >= tokens[index]), None)
        if slot is None:
            slot = len(batches)
            batches.append([])
            room.append(max_tokens)
        batches[slot].append(index)
        room[slot] -= tokens[index]
    return batches


def _spread(tokens: Sequence[int], work: Sequence[float], share: Indices, max_tokens: int, count: int) -> list[Indices]:
    """Exactly `count` micro-batches of even work; first fit where evening them out would break the bound."""
    batches: list[Indices] = [[] for _ in range(count)]
    held, loads = [0] * count, [0.0] * count
    for index in _most_first(work, share):
        fitting = [i for i in range(count) if not batches[i] or held[i] + tokens[index] <= max_tokens]
        if not fitting:
            packed = _first_fit(tokens, share, max_tokens)
            return packed + [[] for _ in range(count - len(packed))]
        slot = min(fitting, key=lambda i: loads[i])
        batches[slot].append(index)
        held[slot] += tokens[index]
        loads[slot] += work[index]
    return batches


def _most_first(amounts: Sequence[float], indices: Sequence[int]) -> Indices:
    return sorted(indices, key=lambda i: (-amounts[i], i))
