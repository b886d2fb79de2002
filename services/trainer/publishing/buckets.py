"""A policy version in the lead's memory: buckets of bytes, as they travel in a push.

The copy is taken while the engines serve, so that a push only has to send it; and it is there for the volume afterwards.
It takes as much memory as the model in `weights.dtype`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from services.contract.push import BucketLayout

PACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
"""SGLang keeps these together, one below the other in this order."""
PADDED, PADDED_TO = ("embed_tokens", "lm_head"), 64
"""SGLang fills the vocabulary up with rows of zeros to a multiple of this."""


@dataclass(frozen=True)
class Bucket:
    layout: BucketLayout
    flat: Tensor
    """[bytes] uint8 on the CPU."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor), views of `flat`."""
        start = 0
        for name, dtype, shape in zip(self.layout.names, self.layout.dtypes, self.layout.shapes, strict=True):
            kind: torch.dtype = getattr(torch, dtype)
            end = start + math.prod(shape) * kind.itemsize
            yield name, self.flat[start:end].view(kind).view(shape)
            start = end


def fill_buckets(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, most_bytes: int) -> list[Bucket]:
    """Copies of the tensors, cast to `dtype`, in buckets of at most `most_bytes`; a larger tensor has a bucket of its own."""
    buckets: list[Bucket] = []
    held: list[tuple[str, Tensor]] = []
    for name, tensor in tensors:
        size = tensor.numel() * dtype.itemsize
        if held and size + sum(t.numel() for _, t in held) * dtype.itemsize > most_bytes:
            buckets.append(_bucket(held, dtype))
            held = []
        held.append((name, tensor))
    return [*buckets, _bucket(held, dtype)] if held else buckets


def _bucket(tensors: list[tuple[str, Tensor]], dtype: torch.dtype) -> Bucket:
    layout = BucketLayout(
        [name for name, _ in tensors],
        [str(dtype).removeprefix("torch.")] * len(tensors),
        [list(tensor.shape) for _, tensor in tensors],
    )
    flat = torch.empty(sum(t.numel() for _, t in tensors) * dtype.itemsize, dtype=torch.uint8)
    bucket = Bucket(layout, flat)
    for (_, room), (_, tensor) in zip(bucket.tensors(), tensors, strict=True):
        room.copy_(tensor)
    return bucket


def all_tensors(buckets: Iterable[Bucket]) -> Iterator[tuple[str, Tensor]]:
    return (pair for bucket in buckets for pair in bucket.tensors())


def engine_checksums(buckets: Iterable[Bucket]) -> dict[str, str]:
    """What SGLang's weights checker must answer for each of its own parameters, if it holds them whole, on a CPU, in this dtype:
    the first 8 bytes of the sha256 over the parameter's bytes, in hex (`tensor_hash` of SGLang 0.5.23)."""
    parts: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in all_tensors(buckets):
        parts.setdefault(engine_name(name), []).append((name, tensor))
    order = {kind: place for place, kind in enumerate(PACKED)}
    return {whole: _checksum(sorted(pairs, key=lambda pair: order.get(_kind(pair[0]), 0))) for whole, pairs in parts.items()}


def engine_name(name: str) -> str:
    """The engine's parameter that holds the Hugging Face tensor `name`, alone or with others."""
    kind = _kind(name)
    return name.replace(f".{kind}.", f".{PACKED[kind]}.") if kind in PACKED else name


def _kind(name: str) -> str:
    return name.split(".")[-2] if "." in name else name


def _checksum(tensors: list[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if _kind(name) in PADDED:
            digest.update(bytes(-len(tensor) % PADDED_TO * tensor[0].nbytes))
    return digest.digest()[:8].hex()
