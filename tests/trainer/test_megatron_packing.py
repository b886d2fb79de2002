"""Which rank computes which rows, in what micro-batches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.trainer.megatron.architecture import Architecture
from services.trainer.megatron.packing import deal, imbalance, plan

SMOLLM2 = Architecture("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, 1e-5, 1e5, tied_embeddings=True)
lengths = st.lists(st.integers(1, 500), max_size=40)


def square(tokens: list[int]) -> list[float]:
    return [float(n * n) for n in tokens]


@given(lengths, st.integers(1, 5), st.integers(1, 2000))
def test_every_row_is_computed_once_within_the_bound(tokens: list[int], ranks: int, bound: int) -> None:
    shares = plan(tokens, square(tokens), ranks, bound)
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(len(tokens)))
    assert all(len(batch) <= 1 or sum(tokens[i] for i in batch) <= bound for share in shares for batch in share)


@given(lengths, st.integers(1, 5), st.integers(1, 2000))
def test_every_rank_has_as_many_micro_batches(tokens: list[int], ranks: int, bound: int) -> None:
    counts = {len(share) for share in plan(tokens, square(tokens), ranks, bound)}
    assert len(counts) == 1 and counts.pop() >= 1


@given(lengths, st.integers(1, 5))
def test_ranks_differ_by_no_more_than_one_row_of_work(tokens: list[int], ranks: int) -> None:
    work = square(tokens)
    loads = [sum(work[i] for i in share) for share in deal(work, ranks)]
    assert max(loads) - min(loads) <= max(work, default=0)


def test_rows_are_packed_close() -> None:
    """300 + 200 and 260 + 240 fill 500 twice, where filling in order of length would take three."""
    assert sorted(map(sorted, plan([300, 260, 240, 200], [300, 260, 240, 200], 1, 500)[0])) == [[0, 3], [1, 2]]


def test_micro_batches_are_evened_out() -> None:
    """First fit would make them 4 rows and 1."""
    assert [len(batch) for batch in plan([100] * 6, [1.0] * 6, 1, 400)[0]] == [3, 3]


def test_a_bound_that_evening_out_would_break_is_kept() -> None:
    tokens = [6, 5, 5, 4, 4]
    batches = plan(tokens, [float(n) for n in tokens], 1, 12)[0]
    assert all(sum(tokens[i] for i in batch) <= 12 for batch in batches) and len(batches) == 2 or len(batches) == 3


def test_no_rows_make_one_empty_micro_batch_a_rank() -> None:
    assert plan([], [], 2, 100) == [[[]], [[]]]


def test_imbalance_is_what_the_busiest_has_over_the_mean() -> None:
    assert imbalance([3.0, 1.0, 2.0], [[0], [1, 2]]) == 1.0
    assert imbalance([3.0, 1.0], [[0], [1]]) == 1.5
    assert imbalance([], [[], []]) == 1.0


def test_attention_makes_a_long_row_more_work_than_two_of_half_its_length() -> None:
    one, two = SMOLLM2.forward_flops(2000, 100), 2 * SMOLLM2.forward_flops(1000, 50)
    attention = 30 * 2 * 9 * 64 * (2000**2 - 2 * 1000**2)
    assert one - two == attention


def test_work_is_two_operations_a_weight_and_token() -> None:
    weights = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert SMOLLM2.forward_flops(1, 0) == 2 * weights + 30 * 2 * 576
    assert SMOLLM2.forward_flops(1, 1) - SMOLLM2.forward_flops(1, 0) == 2 * 576 * 49152
