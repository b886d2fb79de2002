"""From a Hugging Face folder to an ONNX graph, pooling and normalisation inside it. Imports torch; needed once for each model."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from services.retriever.errors import RetrieverError
from services.retriever.families import EncoderDescription, Family
from services.retriever.onnx_session import ExportFailed, open_session
from services.retriever.transformer import check_longest_text, load_model, pool

OPSET = 17
PROBES = ["Chad", "What is the capital of Chad?", "The harbour keeps a violin, " * 12]
"""Texts of three lengths, so that padding and both dynamic sizes show."""
TOLERANCE = 1e-4
"""How far the graph's numbers may be from torch's, as a share of a vector's length."""


class Pooled(nn.Module):
    def __init__(self, model: Any, inputs: list[str], family: Family) -> None:
        super().__init__()
        self.model, self.inputs, self.family = model, inputs, family

    def forward(self, *values: Tensor) -> Tensor:
        """int64 [batch, tokens] each, in the order of `inputs`, to float32 [batch, dimension]."""
        tokens = dict(zip(self.inputs, values, strict=True))
        if self.family.pooling == "decoder":
            tokens["decoder_input_ids"] = torch.zeros_like(values[0][:, :1])
        return pool(self.model(**tokens), tokens["attention_mask"], self.family)


def export(description: EncoderDescription, path: Path) -> None:
    """Write description.folder's graph to `path`. Raises ExportFailed when it cannot be made or answers otherwise than torch."""
    assert description.folder is not None, "the hashing encoder has no graph"
    tokenizer, model = load_model(description.folder, description.family, torch.float32)
    model.set_attn_implementation("eager")  # the others' kernels have no ONNX counterpart
    check_longest_text(model.config, description.max_tokens)
    tokens = tokenizer(PROBES, padding=True, truncation=True, max_length=description.max_tokens, return_tensors="pt")
    pooled = Pooled(model, list(tokens), description.family).eval()  # the exporter puts all of it back into this mode
    try:
        _write(pooled, list(tokens.values()), path)
        with torch.inference_mode():
            expected = [pooled(*(value[: i + 1] for value in tokens.values())).numpy() for i in range(len(PROBES))]
        _compare(path, {name: value.numpy() for name, value in tokens.items()}, expected)
        if description.runtime == "onnx-int8":
            _quantize(path)
    except RetrieverError:
        raise
    except Exception as error:  # torch's exporter raises of every kind
        raise ExportFailed(
            f"{description.folder}: no ONNX graph can be made of this encoder ({type(error).__name__}: {error}); "
            'set retriever.encoder_runtime = "torch"'
        ) from error


def _write(pooled: Pooled, values: list[Tensor], path: Path) -> None:
    sizes = {name: {0: "batch", 1: "tokens"} for name in pooled.inputs}
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of the tracer, on shapes that are the same in every batch
        torch.onnx.export(
            pooled,
            tuple(values),
            str(path),
            input_names=pooled.inputs,
            output_names=["vectors"],
            dynamic_axes=sizes | {"vectors": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )


def _compare(path: Path, tokens: dict[str, np.ndarray], expected: list[np.ndarray]) -> None:
    """Batches of one, two and three texts. Raises ExportFailed when the graph does not answer as torch does."""
    session = open_session(path)
    for size, vectors in enumerate(expected, 1):
        (found,) = session.run(None, {name: tokens[name][:size] for name in (i.name for i in session.get_inputs())})
        furthest = float(np.abs(found - vectors).max() / np.linalg.norm(vectors, axis=1).max())
        if not furthest <= TOLERANCE:
            raise ExportFailed(
                f"the encoder's ONNX graph answers {furthest:.1e} away from torch, {TOLERANCE:.0e} at most: "
                'set retriever.encoder_runtime = "torch"'
            )


def _quantize(path: Path) -> None:
    """Weights to int8, a scale for each column; activations are quantised as they come."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it advises a pre-processing that changes nothing here
    try:
        quantize_dynamic(path, path, weight_type=QuantType.QInt8, per_channel=True)
    finally:
        logging.getLogger().setLevel(level)
    onnx.checker.check_model(str(path))
