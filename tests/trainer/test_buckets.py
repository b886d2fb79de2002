"""Tensors in buckets and back; what an engine's checksums must be."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from services.trainer.publishing.buckets import all_tensors, engine_checksums, engine_name, fill_buckets

TENSORS = {
    "model.embed_tokens.weight": torch.arange(130.0).reshape(65, 2),
    "model.layers.0.self_attn.v_proj.weight": torch.full((2, 3), 3.0),
    "model.layers.0.self_attn.q_proj.weight": torch.full((4, 3), 1.0),
    "model.layers.0.self_attn.k_proj.weight": torch.full((2, 3), 2.0),
    "model.norm.weight": torch.ones(3),
}


@pytest.mark.parametrize("most_bytes", [1, 64, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_come_out_as_they_went_in_whatever_the_bucket(most_bytes: int, dtype: torch.dtype) -> None:
    buckets = fill_buckets(TENSORS.items(), dtype, most_bytes)
    out = dict(all_tensors(buckets))
    assert list(out) == list(TENSORS)
    assert all(torch.equal(out[name], tensor.to(dtype)) for name, tensor in TENSORS.items())


def test_a_bucket_keeps_to_its_bytes_unless_one_tensor_is_larger() -> None:
    buckets = fill_buckets(TENSORS.items(), torch.float32, 80)
    assert [bucket.flat.numel() for bucket in buckets] == [520, 24 + 48, 24 + 12]
    assert buckets[1].layout.shapes == [[2, 3], [4, 3]]


def test_buckets_are_copies_so_that_training_may_go_on() -> None:
    live = torch.zeros(4)
    (bucket,) = fill_buckets([("a", live)], torch.float32, 100)
    live += 1
    assert dict(bucket.tensors())["a"].sum() == 0


def test_nothing_makes_no_bucket() -> None:
    assert fill_buckets([], torch.float32, 100) == []


def first_bytes(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def test_an_engine_holds_some_tensors_one_below_the_other_and_a_padded_vocabulary() -> None:
    q, k, v = (TENSORS[f"model.layers.0.self_attn.{kind}_proj.weight"] for kind in "qkv")
    assert engine_checksums(fill_buckets(TENSORS.items(), torch.float32, 80)) == {
        "model.embed_tokens.weight": first_bytes(TENSORS["model.embed_tokens.weight"], torch.zeros(63, 2)),
        "model.layers.0.self_attn.qkv_proj.weight": first_bytes(q, k, v),
        "model.norm.weight": first_bytes(TENSORS["model.norm.weight"]),
    }


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.gate_up_proj.weight"),
        ("model.layers.3.self_attn.k_proj.bias", "model.layers.3.self_attn.qkv_proj.bias"),
        ("model.layers.3.self_attn.o_proj.weight", "model.layers.3.self_attn.o_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_are_those_of_the_engines_parameters(name: str, engine: str) -> None:
    assert engine_name(name) == engine
