"""Words hashed into buckets: an encoder without a model, for tests and the smoke run."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be by did do does for from has have how in is it its of on or that the this to was were what when "
        "where which who whose with",
    )
)


class HashingEncoder:
    """Words hashed into a fixed number of signed buckets: for finding words again, not for quality."""

    NAME = "hashing-1024-v1"
    DIMENSION = 1024
    dimension = DIMENSION
    runtime = "hashing"

    def encode(self, texts: Sequence[str], role: Literal["query", "passage"]) -> np.ndarray:
        """float32 [len(texts), 1024], normalised; queries and passages alike."""
        vectors = np.zeros((len(texts), self.DIMENSION), np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            self._fill(vector, text)
        return vectors

    def _fill(self, vector: np.ndarray, text: str) -> None:
        for word, count in Counter(re.findall(r"\w+", text.casefold())).items():
            if word not in STOP_WORDS:
                code = zlib.crc32(word.encode())
                vector[code % self.DIMENSION] += (1 + math.log(count)) * (1 if code >> 31 else -1)
        length = float(np.linalg.norm(vector))
        if length > 0:
            vector /= length
