"""What making an encoder's ONNX graph and answering with it have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime

from services.retriever.errors import RetrieverError


class ExportFailed(RetrieverError):
    """No graph of the encoder can be made, or it answers otherwise than torch."""


def open_session(path: Path) -> Any:
    """An InferenceSession that computes in the thread that calls it. Raises RetrieverError when the file is not a graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no base of their own
        raise RetrieverError(f"{path}: not a graph that ONNX Runtime can load ({error}); delete it, it is made again") from None
