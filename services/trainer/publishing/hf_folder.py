"""A Hugging Face folder, written in one pass: safetensors shards that are hashed and synced as they are written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from services.contract.weights import FileEntry, HashedFile

SHARD_BYTES = 2 << 30
COPIED = ("*.json", "*.txt", "*.model", "*.jinja")
"""Files of the starting model that belong to every version: configuration and tokenizer."""
NOT_COPIED = ("model.safetensors.index.json", "manifest.json")
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""safetensors' own names."""


def write_hf_folder(folder: Path, starting_model: Path, tensors: Iterable[tuple[str, Tensor]], dtype: str) -> dict[str, FileEntry]:
    """Weights as shards in `dtype`, configuration and tokenizer from the starting model. Returns the shards' manifest lines."""
    for pattern in COPIED:
        for path in starting_model.glob(pattern):
            if path.name not in NOT_COPIED:
                shutil.copyfile(path, folder / path.name)
    entries: dict[str, FileEntry] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(tensors, getattr(torch, dtype)), 1):
        file = f"model-{number:05d}.safetensors"
        entries[file] = write_safetensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    if len(entries) == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
        return {"model.safetensors": entries["model-00001.safetensors"]}
    index = {"metadata": {"total_size": sum(entry.bytes for entry in entries.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return entries


def _shards(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Tensors of SHARD_BYTES or a little more, by name."""
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        held[name] = tensor.to(dtype).contiguous()
        if sum(t.nbytes for t in held.values()) > SHARD_BYTES:
            yield held
            held = {}
    if held:
        yield held


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> FileEntry:
    """One file: the header's length in 8 bytes, the header, then the tensors' bytes without gaps."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned
    with HashedFile(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            if tensor.numel():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return file.entry
