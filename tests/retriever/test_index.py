"""FAISS by inner product: places without a passage are dropped, never mapped to one."""

import numpy as np
import pytest

from services.retriever.errors import IndexMismatch, RetrieverError
from services.retriever.index import FaissIndex, fill_index, new_index


def vectors(rows: int, dimension: int = 16) -> np.ndarray:
    made = np.random.default_rng(1).normal(size=(rows, dimension)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def test_flat_gives_exact_inner_products_best_first() -> None:
    data = vectors(200)
    hits = fill_index("Flat", data).search(data[:5], 10)
    exact = data[:5] @ data.T
    for row, found in enumerate(hits):
        assert [hit.row for hit in found] == np.argsort(-exact[row])[:10].tolist()
        assert [hit.score for hit in found] == pytest.approx(np.sort(exact[row])[::-1][:10].tolist(), abs=1e-6)


@pytest.mark.parametrize("factory", ["Flat", "HNSW16"])
def test_topk_beyond_the_corpus_gives_fewer_hits_and_never_minus_one(factory: str) -> None:
    data = vectors(4)
    hits = fill_index(factory, data).search(data[:1], 50)[0]
    assert sorted(hit.row for hit in hits) == [0, 1, 2, 3]
    assert all(-1.001 <= hit.score <= 1.001 for hit in hits)


def test_index_that_needs_training_is_trained() -> None:
    data = vectors(400)
    assert fill_index("IVF4,Flat", data).search(data[7:8], 1)[0][0].row == 7


def test_unknown_factory_names_the_key() -> None:
    with pytest.raises(RetrieverError, match="retriever.index_factory 'Flatt'"):
        new_index("Flatt", 16)


def test_too_few_passages_to_train_say_so() -> None:
    with pytest.raises(RetrieverError, match="cannot be trained on 10 passages"):
        fill_index("IVF64,Flat", vectors(10))


def test_truncated_file_is_refused(tmp_path) -> None:
    path = tmp_path / "index.faiss"
    fill_index("Flat", vectors(100)).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(IndexMismatch, match="cannot read"):
        FaissIndex.load(path)
