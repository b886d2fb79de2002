"""SGLang's checksums of its weights on a CPU, several at a time. The formula and the answer are the same.

They are taken while an engine stands still in a push, and its trainer waits for them: so the cores are free, and one thread,
as SGLang 0.5.23 has it, is the longest part of that pause after the bytes themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MOST_THREADS = 8
"""Each reads memory at some GB/s: more would wait for it rather than hash."""


def install() -> None:
    """Put `_compute_checksum` in the place of SGLang's, in this process."""
    from sglang.srt.utils import weight_checker as sglang

    def compute(self: Any, skip_tensor_list: list[str] | None = None, *, role: str) -> dict[str, Any]:
        skipped = self._skip_compare_names(skip_tensor_list)
        quantized = sglang._build_quantized_set(self._get_model())
        entries = sglang._build_check_entries(dict(self._model_state()), skipped, quantized)
        tensors = {entry.name: entry.comparable.dequantize().data for entry in entries if entry.should_compare}
        checksums = at_once(sglang._hash_tensor, tensors.items())
        whole, placement = sglang.overall_checksum(checksums), self._parallelism_info(role=role)
        return sglang.ChecksumInfo(checksums=checksums, per_gpu_checksum=whole, parallelism_info=placement).model_dump()

    sglang.WeightChecker._compute_checksum = compute


def at_once(checksum: Callable[[Any], str], tensors: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Name to checksum, in the order of `tensors`. hashlib lets other threads run while it hashes."""
    pairs = list(tensors)
    with ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
        return {name: found for (name, _), found in zip(pairs, pool.map(checksum, (tensor for _, tensor in pairs)), strict=True)}
