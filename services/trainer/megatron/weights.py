"""Tensors of a Hugging Face folder by name, read from its safetensors files one at a time."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from services.trainer.megatron.architecture import UnsupportedModelError
from services.trainer.megatron.names import EMBEDDING, HEAD

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class WeightFolder:
    """`read(name)` gives the full tensor. Files are mapped, not loaded, so a model is never in memory twice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = self._files()

    def read(self, name: str) -> Tensor:
        if name not in self.files and name == HEAD:
            # Some folders say that the embeddings are not tied and yet store one tensor for both.
            name = EMBEDDING
        if name not in self.files:
            raise UnsupportedModelError(
                f"{self.folder} has no tensor {name}, which its config.json asks for: copy the whole model folder again"
            )
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def _files(self) -> dict[str, Path]:
        from safetensors import safe_open

        index, single = self.folder / INDEX, self.folder / SINGLE
        if index.is_file():
            return {name: self.folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        if single.is_file():
            with safe_open(single, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), single)
        raise UnsupportedModelError(f"{self.folder} has neither {SINGLE} nor {INDEX}: save the model as safetensors")
